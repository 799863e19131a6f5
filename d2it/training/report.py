"""The page of a run: `report.html` in its folder, one file with everything in it.

It has the settings, the curves of the logs, the pictures that were published on the way and at the end, the entropies
of the images with the thresholds between the grains, and what a share of fine regions gives (PSNR) and costs (tokens,
operations, time).
"""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2it import pictures
from d2it.data import ImageSource, LatentCache
from d2it.diffusion import random_grain_map, ranked_grains
from d2it.files import write_text
from d2it.models import DiT, DynamicContentTransformer, DynamicVAE
from d2it.models.base import saved_kind
from d2it.models.flops import count_macs, fine_tokens
from d2it.training.meters import PICTURES, read_log
from d2it.training.stage import spread_over

REPORT = "report.html"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: The figures of a log that are drawn, by the end of their name; curves that share a panel share a tuple.
PANELS = (
    ("loss", "held_out_loss"),
    ("mse", "held_out_mse"),
    ("accuracy", "held_out_accuracy"),
    ("learning_rate",),
    ("gradient_norm",),
    ("images_per_second",),
    ("mfu",),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
img, svg { max-width: 100%; height: auto; } figure { margin: 1em 0; } figcaption { color: #555; }
table { border-collapse: collapse; } th { border-bottom: 1px solid; }
td, th { padding: 2px 12px 2px 0; text-align: right; }
pre { background: #f4f4f4; padding: 1em; overflow: auto; }
"""


class Report:
    """The parts of a page, in order."""

    def __init__(self, title: str) -> None:
        self._title, self._parts = title, [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, summary: str, text: str) -> None:
        """Text as it is, folded under its summary."""
        escaped = html.escape(summary), html.escape(text)
        self._parts.append("<details><summary>{}</summary><pre>{}</pre></details>".format(*escaped))

    def table(self, rows: Sequence[dict[str, str]]) -> None:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{head}</tr>{body}</table>")

    def picture(self, file: Path, caption: str) -> None:
        """A PNG, inside the page."""
        data = base64.b64encode(file.read_bytes()).decode()
        self._figure(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">', caption)

    def plot(self, figure: Any, caption: str) -> None:
        """A figure of matplotlib, as SVG."""
        import matplotlib

        svg = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text, not outlines: small, and quick to write
            figure.savefig(svg, format="svg", metadata={"Date": None})
        text = svg.getvalue()
        self._figure(text[text.index("<svg") :], caption)

    def _figure(self, inner: str, caption: str) -> None:
        self._parts.append(f"<figure>{inner}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def write(self, path: Path) -> None:
        head = f'<meta charset="utf-8"><title>{html.escape(self._title)}</title><style>{_STYLE}</style>'
        write_text(path, "<!doctype html>" + head + "\n".join(self._parts) + "\n")


def write_report(
    folder: Path, *, source: ImageSource | None = None, cache: Path | None = None, device: torch.device | str = "cpu"
) -> Path:
    """Writes `report.html` of a run from what is in its folder; parts that are not there are left out.

    Args:
        folder: of the run.
        source: its images, for the PSNR; None leaves that out.
        cache: folder of its latents, for the entropies.
        device: on which the costs are measured.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    report = Report(f"d2it run {folder.resolve().name}")
    if (folder / "config.yaml").is_file():
        report.code("Settings", (folder / "config.yaml").read_text())
    for name in ("dvae", "grain", "content"):
        rows = read_log(folder / "logs" / f"{name}.jsonl")
        if rows:
            report.heading(f"Stage {name}")
            report.text(_summary(name, rows))
            report.plot(_curves(name, rows), f"{name}: what the log has, by step")
            pictures_of = (folder / "logs" / PICTURES / name).glob("*.png")
            published = sorted((path for path in pictures_of if path.stem.isdecimal()), key=lambda path: int(path.stem))
            last = len(published) - 1
            for i in sorted({round(j * last / 5) for j in range(6)}) if last > 0 else ():
                report.picture(published[i], f"{name} at step {int(published[i].stem):,}")
    vae = DynamicVAE.from_pretrained(folder / "vae").to(device) if (folder / "vae").is_dir() else None
    report.heading("Results")
    for name, caption in (
        ("reconstructions", "Photographs, what the VAE rebuilds, and the grain maps"),
        ("samples", "Samples"),
        ("samples_grains", "The same with their grain maps"),
        ("denoising", "From noise to the image"),
    ):
        if (folder / f"{name}.png").is_file():
            report.picture(folder / f"{name}.png", caption)
    if cache is not None and (cache / "index.json").is_file():
        latents = LatentCache(cache, verify=False)
        if not latents.fixed and latents.num_grains > 1:
            report.heading("Entropy of the regions")
            report.plot(_entropies(latents), "Shares of all regions; the lines are the thresholds between the grains")
    if vae is not None and source is not None and vae.config.num_grains > 1:
        report.heading("Quality against the share of fine regions")
        found = quality(vae, source, device)
        report.plot(_line(SHARES, found, "share of fine regions", "PSNR, dB"), "Regions of the highest entropy first")
        report.table([{"fine": f"{s:.0%}", "PSNR": f"{p:.2f} dB"} for s, p in zip(SHARES, found)])
    content = folder / "content_transformer"
    if content.is_dir() and saved_kind(content, (DynamicContentTransformer, DiT)) is DynamicContentTransformer:
        report.heading("Cost against tokens")
        report.table(costs(DynamicContentTransformer.from_pretrained(content).to(device), device))
        where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "a CPU"
        report.text(f"One step of one image on {where}, random maps, the best of three.")
    report.write(folder / REPORT)
    return folder / REPORT


@torch.no_grad()
def quality(vae: DynamicVAE, source: ImageSource, device: torch.device | str, count: int = 16) -> list[float]:
    """PSNR in dB over `count` images of the source, by `SHARES`: regions of the highest entropy are fine."""
    images = source.fetch(spread_over(len(source), count), replace=True)["image"].to(device)
    scaled = pictures.from_uint8(images)
    entropy = vae.grain_map(images)[1].cpu()
    found = []
    for share in SHARES:
        shares, generators = [share] * (vae.config.num_grains - 1), [torch.Generator() for _ in entropy]
        grains = ranked_grains(entropy, shares, generator=generators).to(device)
        rebuilt = pictures.to_uint8(vae.decode(vae.encode(scaled, grains)[0], grains))
        error = (rebuilt.double() - images.double()).square().mean()
        found.append(float(10 * torch.log10(255**2 / error)))
    return found


@torch.no_grad()
def costs(model: DynamicContentTransformer, device: torch.device | str) -> list[dict[str, str]]:
    """Tokens, operations and milliseconds of one step of one image, by `SHARES`."""
    config, rows = model.config, []
    x = torch.randn(1, config.in_channels, *config.grid, device=device)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device) if config.num_classes else None
    for share in SHARES:
        generators = [torch.Generator().manual_seed(0)]
        maps = random_grain_map(config.region_grid, share, config.num_grains, generator=generators)
        tokens = int(config.region_tokens(maps).sum())
        macs = count_macs(config, 1, fine_tokens(maps, config)).total
        seconds = min(_seconds(model, device, x, t, label, maps.to(device), rows=tokens) for _ in range(3))
        rows.append(
            {
                "fine": f"{share:.0%}",
                "tokens": f"{config.num_tokens + tokens:,}",
                "GMAC": f"{macs / 1e9:.3g}",
                "ms": f"{1000 * seconds:.1f}",
            }
        )
    return rows


def _seconds(model: Any, device: torch.device | str, *inputs: Any, rows: int) -> float:
    started = time.perf_counter()
    model(*inputs, capacity=rows)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _summary(name: str, rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    losses = [row[f"{name}/loss"] for row in rows if f"{name}/loss" in row]
    speed = np.median([row["images_per_second"] for row in rows if "images_per_second" in row] or [0.0])
    text = f"{last['step']:,} steps, {speed:.4g} images/s in the middle"
    return text + (f"; loss {losses[0]:.4f} at step {first['step']:,}, {losses[-1]:.4f} at the end" if losses else "")


def _figure(columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = 3.6 * columns, 2.6 * rows
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.65 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.3, hspace=0.45)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _curves(name: str, rows: list[dict[str, Any]]) -> Any:
    drawn = []
    for panel in PANELS:
        keys = [key for end in panel for key in (f"{name}/{end}", end) if any(key in row for row in rows)]
        if keys:
            drawn.append(keys)
    columns = min(3, len(drawn))
    figure, axes = _figure(columns, -(-len(drawn) // columns))
    for axis, keys in zip(axes, drawn):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points), label=key.split("/")[-1].replace("_", " "))
        axis.set_title(keys[0].split("/")[-1].replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    return figure


def _entropies(cache: LatentCache) -> Any:
    shares = np.linspace(0.999, 0.001, 200)
    quantiles = np.asarray(cache.quantiles(shares.tolist()))
    figure, (axis,) = _figure(1)
    axis.hist(quantiles, bins=40)
    axis.set_xlabel("entropy, nats")
    axis.set_ylabel("share of the regions, %")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value / 2:.0f}")  # 200 quantiles
    for limit in cache.thresholds:
        axis.axvline(limit, color="red")
    return figure


def _line(x: Sequence[float], y: Sequence[float], across: str, up: str) -> Any:
    figure, axes = _figure(1)
    axes[0].plot(x, y, marker="o")
    axes[0].set_xlabel(across)
    axes[0].set_ylabel(up)
    axes[0].grid(alpha=0.3)
    return figure
