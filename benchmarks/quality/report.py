"""docs/evidence.md and the plots, from the result files alone. Standard library only, and matplotlib for the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quality.tiers import TIERS, VARIANTS
from quality.verdicts import CLAIMS, NAMES, Claim, Results, judge, training_spread, verdict

HEAD = """# Evidence

Written by `make results` from the result files of `benchmarks/quality_bench.py`. Every variant is trained by d2it's own
stages on cached latents for the same multiply-accumulates, and scored on held-out images:

- **denoising error**: the squared error of the predicted x_0 on held-out latents of unit variance, every code counted
  once: the geometric mean over ten ratios of noise to signal. It compares variants on the latents of one VAE.
- **FD**, **KD**: Frechet and kernel distance (times 1,000) of samples and held-out images in EfficientNet's pooled
  features. Nothing of them is comparable with figures of another network, size or number of images.

`±` is the standard deviation over three seeds of sampling (of noise, for the denoising error). A difference counts
where it is beyond three spreads; the spread of a difference between two trainings includes that of a training repeated
from another seed. A measure judges only where one of the two variants has gained more than three spreads from the first
point of its curve to the last: a distance that does not fall as a model learns says nothing of the model. What is not
told apart is *unresolved* at this budget, which says nothing against the claim. The first measure of a row decides.
"""


def load(folder: Path) -> Results:
    """Variant -> its result, in the order of the variants."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: found[name] for name in VARIANTS if name in found}


def document(root: Path) -> str:
    """docs/evidence.md of the results below `root`, a folder for each tier."""
    lines = [HEAD]
    tiers = {name: load(root / name) for name in TIERS}
    for name, results in tiers.items():
        if results:
            lines += tier_section(name, results, root)
    if not tiers["cpu"]:
        lines.append("The CPU tier has not been measured yet.\n")
    if not tiers["gpu"]:
        lines.append(
            "The GPU tier has never been run. It is sized to train and score its core in about four minutes of an "
            "H100,\nby estimate: `make gpu PARTS=quality`.\n"
        )
    return "\n".join(lines).rstrip() + "\n"


def tier_section(name: str, results: Results, root: Path) -> list[str]:
    tier, first = TIERS[name], next(iter(results.values()))
    threads = f", {first['threads']} thread{'s' if first['threads'] > 1 else ''}" if "threads" in first else ""
    classes = ", ".join(tier.classes) or "all classes of the pack"
    lines = [
        f"## The {name.upper()} tier",
        "",
        f"{first['device']}{threads}, torch {first['torch']}. {tier.image_size}-pixel Imagenette ({classes}); "
        f"{tier.budget:.2g} multiply-accumulates",
        f"of training a variant; {first['samples']} samples a seed in {tier.steps} steps without guidance; "
        f"{first['extractor']}.",
        "",
        f"`python benchmarks/quality_bench.py --tier {name}`",
        "",
        "### The claims",
        "",
        "| | claim | paper | here | verdict | command: `--only` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(results, claim) for claim in CLAIMS]
    lines += ["", *_repeated(results), "### The variants", "", *_variants(results)]
    lines += ["", *_convergence(results), *_reconstruction(results)]
    folder = root / name
    if (folder / "notes.md").exists():
        lines += ["### What we think of it", "", (folder / "notes.md").read_text().strip(), ""]
    for picture, title in (("curves", "Convergence"), ("times", "Denoising error by time"), ("shares", "Fine shares")):
        if (folder / f"{picture}.png").exists():
            lines += [f"![{title}](../benchmarks/results/quality/{name}/{picture}.png)", ""]
    return lines


def _row(results: Results, claim: Claim) -> str:
    findings = judge(results, claim)
    here = "; ".join(
        f"{NAMES[found.measure]} {_with_spread(found.better, found.measure)} and "
        f"{_with_spread(found.worse, found.measure)}" + ("" if i == 0 else f" ({found.verdict})")
        for i, found in enumerate(findings)
    )
    names = " ".join(claim.variants)
    return f"| {claim.source} | {claim.text} | {claim.paper} | {here} | **{verdict(results, claim)}** | `{names}` |"


def _with_spread(figure: dict[str, float], measure: str) -> str:
    digits = {"error": 4, "fd": 1, "kd": 0}[measure]
    return f"{figure['mean']:.{digits}f} ± {figure['spread']:.{digits}f}"


def _repeated(results: Results) -> list[str]:
    spreads = {measure: training_spread(results, measure) for measure in NAMES}
    if spreads["error"] is None:
        return ["No training was repeated from another seed: the spreads are those of sampling alone.", ""]
    shown = ", ".join(f"{NAMES[m]} {value:.4g}" for m, value in spreads.items())
    return [f"One training differs from a repeated one by a standard deviation of: {shown}.", ""]


def _variants(results: Results) -> list[str]:
    lines = [
        "| variant | | GMAC an image | images | s | denoising error | FD | KD | precision | recall | class right |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        scores = result["scores"]
        for i, (maps, own) in enumerate(scores["samples"].items()):
            grained = result["settings"]["refine"] is not None
            label = f"{name}, {maps} maps" if len(scores["samples"]) > 1 and grained else name
            cells = [
                f"`{label}`",
                result["what"] if i == 0 else "",
                f"{result['macs_image'] / 1e9:.4f}",
                f"{result['steps'] * result['batch_size']:,}",
                f"{result['seconds']['training'][-1]:.0f}",
                _with_spread(scores["error"], "error") if i == 0 else "",
                _with_spread(own["fd"], "fd"),
                _with_spread(own["kd"], "kd"),
                *(f"{own[key]['mean']:.0%} ± {own[key]['spread']:.0%}" for key in ("precision", "recall", "accuracy")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _convergence(results: Results) -> list[str]:
    """How much of DiT's budget D2iT needs for DiT's last score."""
    if not {"dit", "d2it"} <= results.keys():
        return []
    ours, theirs = (results[name] for name in ("d2it", "dit"))
    last = theirs["scores"]["curve"][-1]["fd"]
    reached = [i for i, point in enumerate(ours["scores"]["curve"]) if point["fd"] <= last]
    lines = ["### Convergence (Fig. 6)", ""]
    if not reached:
        lines += [f"D2iT does not reach DiT's last FD of {last:.1f} (one seed of sampling) in the same budget."]
    else:
        share = ours["scores"]["curve"][reached[0]]["macs"] / theirs["scores"]["curve"][-1]["macs"]
        seconds = ours["seconds"]["training"][reached[0]], theirs["seconds"]["training"][-1]
        lines += [
            f"D2iT has DiT's last FD of {last:.1f} (one seed of sampling) after {share:.0%} of its",
            f"multiply-accumulates and {seconds[0]:.0f} of its {seconds[1]:.0f} s, to a quarter of the training.",
        ]
    lines += ["", "| images | " + " | ".join(f"{name} FD, KD, s" for name in ("d2it", "dit")) + " |", "|---|---|---|"]
    for i, (a, b) in enumerate(zip(ours["scores"]["curve"], theirs["scores"]["curve"])):
        cells = [
            f"{p['fd']:.1f}, {p['kd']:.0f}, {r['seconds']['training'][i]:.0f} s" for p, r in ((a, ours), (b, theirs))
        ]
        lines.append(f"| {a['images']:,}, {b['images']:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def _reconstruction(results: Results) -> list[str]:
    """The VAEs by share of fine regions: the reconstruction half of Fig. 5."""
    vaes = {result["settings"]["vae"]: result["reconstruction"] for result in results.values()}
    lines = [
        "### What the VAEs keep (Fig. 5)",
        "",
        "| VAE | share of fine regions | codes an image | PSNR, dB | SSIM | rFD |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in vaes.items():
        lines += [
            f"| {name} | {row['fine_share']:.0%} | {row['codes']:.0f} | {row['psnr']:.2f} | {row['ssim']:.3f} "
            f"| {row['rfd']:.1f} |"
            for row in rows
        ]
    return [*lines, ""]


# ---- plots ----------------------------------------------------------------------------------------------------------


def plot(folder: Path, results: Results) -> None:
    """Draws curves.png, times.png and, with variants of several shares, shares.png into the folder of a tier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in ("dit", "d2it", "d2it-v", "d2it-3"):
        if name not in results:
            continue
        curve, seconds = results[name]["scores"]["curve"], results[name]["seconds"]["training"]
        images = [point["images"] for point in curve]
        axes[0].plot(images, [point["fd"] for point in curve], "o-", label=name)
        axes[1].plot(seconds, [point["fd"] for point in curve], "o-", label=name)
        axes[2].plot(images, [point["kd"] for point in curve], "o-", label=name)
    for axis, x, y in zip(axes, ("images seen", "seconds of training", "images seen"), ("FD", "FD", "KD × 1,000")):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, folder / "curves.png")

    if "d2it" in results:
        figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
        base = results["d2it"]["scores"]["error_by_time"]
        for name, result in results.items():
            if result["vae"] == results["d2it"]["vae"] and name != "d2it":
                ratios = [a / b for a, b in zip(result["scores"]["error_by_time"]["all"], base["all"])]
                axis.plot(base["times"], ratios, "o-", label=name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(xlabel="timestep of the ddpm path", ylabel="denoising error / that of d2it", yscale="log")
        axis.grid(alpha=0.3, which="both")
        if axis.has_data() and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        _save(figure, folder / "times.png")

    shares = {"fine-0": 0, "fine-30": 30, "d2it": 50, "fine-70": 70, "dit": 100}
    found = {share: results[name] for name, share in shares.items() if name in results}
    if len(found) > 2:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        own = [next(iter(result["scores"]["samples"].values()))["fd"] for result in found.values()]
        axes[0].errorbar(list(found), [f["mean"] for f in own], [f["spread"] for f in own], marker="o", capsize=3)
        axes[0].set(xlabel="fine regions, %", ylabel="FD of samples")
        rows = next(r["reconstruction"] for r in results.values() if r["settings"]["vae"] == "two")
        axes[1].plot([100 * row["fine_share"] for row in rows], [row["rfd"] for row in rows], "o-")
        axes[1].set(xlabel="fine regions, %", ylabel="rFD of one VAE")
        for axis in axes:
            axis.grid(alpha=0.3)
        _save(figure, folder / "shares.png")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=80)
    plt.close(figure)


def plots(root: Path) -> None:
    """Draws the plots of every tier that has results below `root`."""
    for name in TIERS:
        if results := load(root / name):
            plot(root / name, results)
