"""The figures of a run: losses, speed, utilisation, memory, energy.

Everything accumulates on the device or in host integers; `report` is the only place that waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2it.devices import Energy, memory_gib, peak_flops
from d2it.distributed import World
from d2it.errors import UserError
from d2it.files import write_text
from d2it.pictures import save_png
from d2it.training.config import RunConfig, StageConfig

#: Where published pictures are kept, below the folder of logs: pictures/<stage>/<step>.png.
PICTURES = "pictures"


@dataclass(frozen=True)
class Work:
    """What a batch costs, counted on the host.

    Args:
        images: number of images.
        tokens: number of tokens, without padding.
        macs: multiply-accumulates of a forward pass over these tokens.
    """

    images: int
    tokens: int
    macs: int


class Meters:
    """The figures of one stage. Rank 0 writes them: progress on stderr, tensorboard, a JSON line a report, wandb.

    Args:
        name: of the stage.
        run: where to write and what.
        settings: of the stage.
        first: the step to go on from; later lines of an earlier, killed run are dropped.
        world: the ranks.
    """

    def __init__(self, name: str, run: RunConfig, settings: StageConfig, first: int, world: World) -> None:
        self.name, self.steps, self.world = name, settings.steps, world
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = self._tokens = self._macs = 0
        self._loading = 0.0
        self._energy = Energy(world.device)
        self._peak = peak_flops(world.device)
        self._first, self._reported = first, first
        self._start = self._since = time.perf_counter()
        self._computed = time.process_time()
        self._joules = self._energy.joules()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        self._log: Path | None = None
        self._board: Any = None
        self._bar: Any = None
        self._wandb: Any = None
        world.together(lambda: self._open(run, settings) if world.first else None)

    def _open(self, run: RunConfig, settings: StageConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
        from tqdm import tqdm

        folder = Path(run.dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{self.name}.jsonl"
        rows = read_log(self._log)
        write_text(self._log, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= self._first))
        self._board = SummaryWriter(str(folder / self.name), purge_step=self._first + 1)
        values = {k: v if type(v) in (bool, int, float, str) else str(v) for k, v in flat(settings).items()}
        for summary in hparams(values, {f"{self.name}/loss": 0.0}):
            self._board.file_writer.add_summary(summary)
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.steps, initial=self._first, desc=self.name, unit="step", dynamic_ncols=True)
        if run.wandb:
            try:
                import wandb
            except ImportError:
                raise UserError(f"run.wandb={run.wandb}: the wandb package is not installed") from None
            place = f"{Path(run.dir).resolve()}:{self.name}"  # a resumed stage goes on in its own wandb run
            self._wandb = wandb.init(
                project=run.wandb,
                name=f"{Path(run.dir).name}-{self.name}",
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
                resume="allow",
            )

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds 0-dim device tensors; `report` returns the mean of each."""
        for key, value in values.items():
            value = value.detach()
            self._sums[key] = self._sums[key] + value if key in self._sums else value.float()
            self._counts[key] = self._counts.get(key, 0) + 1

    def count(self, work: Work) -> None:
        """Adds what a micro-batch of this rank costs."""
        self._images += work.images
        self._tokens += work.tokens
        self._macs += work.macs

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Counts the time in the context as a wait for a batch."""
        start = time.perf_counter()
        yield
        self._loading += time.perf_counter() - start

    def report(self, step: int, rate: float) -> dict[str, float]:
        """Waits for the device, averages over steps and ranks, writes, starts anew; returns the figures."""
        now, joules = None, self._energy.joules()
        keys = list(self._sums)
        device = self.world.device
        host = [self._images, self._tokens, self._macs, self._loading, 0.0]
        values = torch.stack([self._sums[k] / self._counts[k] for k in keys])
        means = self.world.mean(values).tolist()  # waits for the device
        now = time.perf_counter()
        seconds, computed = now - self._since, time.process_time()
        if joules is not None and self._joules is not None:
            host[4] = joules - self._joules
        images, tokens, macs, loading, energy = (
            self.world.mean(torch.tensor(host, dtype=torch.float64, device=device)) * self.world.size
        ).tolist()
        figures = dict(zip(keys, means)) | {
            "learning_rate": rate,
            "images_per_second": images / seconds,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / max(1, step - self._reported),
            "cpu_seconds": (computed - self._computed) / max(1, step - self._reported),
            "loader_wait": loading / self.world.size / seconds,
        }
        if self._peak is not None:
            figures["mfu"] = 6 * macs / seconds / (self._peak * self.world.size)
        figures["memory_gib"] = memory_gib(device)
        if energy:
            figures["watts"] = energy / seconds
            figures["images_per_joule"] = images / energy
        self.world.together(lambda: self._write(step, figures, now) if self.world.first else None)
        self._sums.clear()
        self._counts.clear()
        self._images = self._tokens = self._macs = 0
        self._loading = 0.0
        self._since, self._computed, self._reported, self._joules = now, computed, step, joules
        return figures

    def picture(self, name: str, image: Any, step: int) -> None:
        """Writes a picture (H, W, 3) uint8 to tensorboard, wandb and a file; called on all ranks."""

        def write() -> None:
            if self._board is not None and self._log is not None:
                with _writing(self._log.parent):
                    self._board.add_image(name, image, step, dataformats="HWC")
                    kept = self._log.parent / PICTURES / self.name
                    kept.mkdir(parents=True, exist_ok=True)
                    save_png(kept / f"{step:08d}.png", image)
            if self._wandb is not None:
                import wandb

                self._wandb.log({name: wandb.Image(image)}, step=step)

        self.world.together(write)

    def close(self) -> None:
        """Closes tensorboard, wandb and the progress bar."""
        for each in (self._bar, self._board):
            if each is not None:
                with contextlib.suppress(OSError):  # what closes a run that failed must not hide why
                    each.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, step: int, figures: dict[str, float], now: float) -> None:
        assert self._log is not None
        assert self._board is not None
        with _writing(self._log.parent):
            with self._log.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            for key, value in figures.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(figures, step=step)
        shown = {k.split("/")[-1]: v for k, v in figures.items() if k.endswith("/loss")}
        speed = f"{figures['images_per_second']:.4g} images/s"
        if "mfu" in figures:
            speed += f", MFU {figures['mfu']:.1%}"
        text = ", ".join(f"{k} {v:.4f}" for k, v in shown.items())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"{text}, {speed}")
        else:
            spent = now - self._start
            left = spent / (step - self._first) * (self.steps - step)
            when = f"{_clock(left)} left" if step < self.steps else f"took {_clock(spent)}"
            print(f"{self.name}: step {step}/{self.steps}, {text}, {speed}, {when}", file=sys.stderr, flush=True)


def flat(settings: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass and of those in it, as section.name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        inner = flat(value) if dataclasses.is_dataclass(value) else None
        found |= {field.name: value} if inner is None else {f"{field.name}.{k}": v for k, v in inner.items()}
    return found


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write the logs: {error.strerror or error}") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a stage's log ("step" and numbers), up to the first that a kill or a flipped bit damaged."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                break
            rows.append({k: v for k, v in row.items() if type(v) in (int, float) and abs(v) < 2**63})
    return rows


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
