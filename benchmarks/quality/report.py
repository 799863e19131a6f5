"""docs/evidence.md and the plots, from the result files alone. Standard library only, and matplotlib for the plots."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from quality.tiers import TIERS, VARIANTS
from quality.verdicts import CLAIMS, CONTRADICTED, HOLDS, NAMES, Claim, Results, judge, training_spread, verdict

HEAD = """# Evidence

Written by `make results` from the result files of `benchmarks/quality_bench.py`. Every variant is trained by d2it's own
stages on cached latents for the same multiply-accumulates, and scored on held-out images:

- **denoising error**: the squared error of the predicted x_0 on held-out latents of unit variance, every code counted
  once, with the same noise for all: the geometric mean over nine signal-to-noise ratios, log(a² / s²) from 4 to -4. It
  compares variants on the latents of one VAE. At more noise no network here knows more than the mean image, and the x_0
  of epsilon, which is divided by a, differs more from one training to the next than from one variant to the other.
- **FD**, **KD**: Frechet and kernel distance (times 1,000) of samples and held-out images in EfficientNet's pooled
  features. Nothing of them is comparable with figures of another network, size or number of images: of few images, FD
  is far from zero for real ones too. So the first row of the variants is as many real images, of the training set, and
  each variant has the distance of those images as its VAE rebuilds them, which a perfect transformer would have.

`±` is the standard deviation over three seeds of sampling (of noise, for the denoising error). A difference counts
where it is beyond three spreads. The spread of a difference is that over the seeds, of both figures or, of denoising
errors, whose noise is the same, of their difference; between two trainings it includes that of trainings repeated from
another seed. A measure judges only where a variant on the VAE of one of the two has gained more than three spreads from
the first point of its curve to the last: a distance that does not fall as models learn says nothing of a model. What is
not told apart is *unresolved* at this budget, which says nothing against the claim. The first measure of a row decides.
Seconds of training on a CPU are those that the process computed; other work on the machine still lengthens them.
"""


#: The variants with whole curves.
CURVES = tuple(name for name, variant in VARIANTS.items() if variant.core)


def load(folder: Path) -> Results:
    """Variant -> its result, in the order of the variants.

    Raises:
        ValueError: results of a tier with different settings, which are not comparable.
    """
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    results = {name: found[name] for name in VARIANTS if name in found}
    digests = {result["tier_digest"]: name for name, result in results.items()}
    if len(digests) > 1:
        raise ValueError(
            f"{folder}: {' and '.join(digests.values())} were measured with different settings of the tier"
        )
    return results


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
        f"of training a variant; {first['samples']} samples a seed in {tier.steps} steps of {tier.scheduler} without "
        f"guidance; {first['extractor']}.",
        "",
        f"`python benchmarks/quality_bench.py --tier {name}`",
        "",
        "### The claims",
        "",
        "| | claim | paper | here | spreads apart | verdict | command: `--only` |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(results, claim) for claim in CLAIMS]
    lines += _rebuilding(results)
    lines += ["", *_repeated(results), "### The variants", "", *_variants(results)]
    lines += ["", *_convergence(results), *_reconstruction(results)]
    folder = root / name
    if (folder / "notes.md").exists():
        lines += ["### What we think of it", "", (folder / "notes.md").read_text().strip(), ""]
    for picture, title in (
        ("curves", "Convergence"),
        ("levels", "Denoising error by noise"),
        ("shares", "Fine shares"),
    ):
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
    names, apart = " ".join(claim.variants), "; ".join(f"{found.spreads:+.1f}" for found in findings)
    cells = [claim.source, claim.text, claim.paper, here, apart, f"**{verdict(results, claim)}**", f"`{names}`"]
    return f"| {' | '.join(cells)} |"


def _rebuilding(results: Results) -> list[str]:
    """What Fig. 5 states of the VAE alone; one VAE and the same images at every share, so nothing of it is chance."""
    name = next((name for name, result in results.items() if result["settings"]["vae"] == "two"), None)
    if name is None:
        return []
    rows = results[name]["reconstruction"]
    shown = ", ".join(f"{row['rfd']:.0f} at {row['fine_share']:.0%}" for row in rows)
    slopes = [(a["rfd"] - b["rfd"]) / (b["fine_share"] - a["fine_share"]) for a, b in itertools.pairwise(rows)]
    facts = (
        ("reconstruction improves with the share of fine regions", "", min(slopes) > 0),
        ("the last 30 % of the regions bring it the least", "rFID 1.83 → 1.67", min(slopes) == slopes[-1]),
    )
    return [
        f"| Fig. 5 | {text} | {paper} | rFD {shown} | | **{HOLDS if true else CONTRADICTED}** | `{name}` |"
        for text, paper, true in facts
    ]


def _with_spread(figure: dict[str, float], measure: str) -> str:
    digits = {"error": 4, "fd": 1, "kd": 0}[measure]
    return f"{figure['mean']:.{digits}f} ± {figure['spread']:.{digits}f}"


def _repeated(results: Results) -> list[str]:
    repeated = {first: again for again in results if (first := VARIANTS[again].repeats) in results}
    if not repeated:
        return ["No training was repeated from another seed: the spreads are those of sampling alone.", ""]
    lines = ["Trainings repeated from another seed, and the standard deviation between them:", ""]
    alike: dict[str, list[str]] = {}  # pooled where they predict the same
    for first, again in repeated.items():
        alike.setdefault(VARIANTS[first].diffusion.get("prediction", "epsilon"), []).extend((first, again))
    for prediction, names in alike.items():
        shown = ", ".join(f"{NAMES[m]} {training_spread(results, names[0], m):.3g}" for m in NAMES)
        lines.append(f"- predicting {prediction} ({', '.join(f'`{name}`' for name in names)}): {shown}")
    return [*lines, ""]


def _variants(results: Results) -> list[str]:
    lines = [
        "| variant | | MMAC an image | images | s | denoising error | FD | rebuilt | KD | rebuilt | precision | recall "
        "| class right |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shares(own: dict[str, dict[str, float]]) -> list[str]:
        return [f"{own[key]['mean']:.0%} ± {own[key]['spread']:.0%}" for key in ("precision", "recall", "accuracy")]

    floor = next(iter(results.values()))["floor"]
    distances = [_with_spread(floor["fd"], "fd"), "", _with_spread(floor["kd"], "kd"), ""]
    lines.append(f"| real images | as many, of the training set | | | | | {' | '.join([*distances, *shares(floor)])} |")
    for name, result in results.items():
        scores = result["scores"]
        for i, (maps, own) in enumerate(scores["samples"].items()):
            grained = result["settings"]["refine"] is not None
            label = f"{name}, {maps} maps" if len(scores["samples"]) > 1 and grained else name
            cells = [
                f"`{label}`",
                result["what"] if i == 0 else "",
                f"{result['macs_image'] / 1e6:.1f}",
                f"{result['steps'] * result['batch_size']:,}",
                "" if (passed := result["seconds"]["training"]) is None else f"{passed[-1]:.0f}",
                _with_spread(scores["error"], "error") if i == 0 else "",
                _with_spread(own["fd"], "fd"),
                f"{scores['rebuilt']['fd']:.1f}",
                _with_spread(own["kd"], "kd"),
                f"{scores['rebuilt']['kd']:.0f}",
                *shares(own),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


CONVERGENCE = (("d2it", "dit"), ("d2it-v", "dit-v"))


def _convergence(results: Results) -> list[str]:
    """How much of DiT's budget ours need for DiT's last score."""
    lines: list[str] = []
    for pair in CONVERGENCE:
        if not set(pair) <= results.keys():
            continue
        ours, theirs = (results[name] for name in pair)
        last = theirs["scores"]["curve"][-1]["fd"]
        reached = [i for i, point in enumerate(ours["scores"]["curve"]) if point["fd"] <= last]
        if not reached:
            lines.append(f"- `{pair[0]}` does not reach the last FD of `{pair[1]}`, {last:.1f}, in the same budget.")
            continue
        share = ours["scores"]["curve"][reached[0]]["macs"] / theirs["scores"]["curve"][-1]["macs"]
        a, b = (result["seconds"]["training"] for result in (ours, theirs))
        within = f" and {a[reached[0]]:.0f} of its {b[-1]:.0f} s" if a and b else ""
        lines.append(
            f"- `{pair[0]}` has the last FD of `{pair[1]}`, {last:.1f}, after {share:.0%} of its "
            f"multiply-accumulates{within}."
        )
    if not lines:
        return []
    names = [name for name in CURVES if name in results]
    reached_at: dict[str, dict[str, str]] = {name: {} for name in names}
    for name in names:
        result = results[name]
        passed = result["seconds"]["training"] or [None] * len(result["scores"]["curve"])
        for point, seconds in zip(result["scores"]["curve"], passed):
            cell = f"{point['fd']:.1f}, {point['kd']:.0f}; {point['images']:,}"
            cell += "" if seconds is None else f", {seconds:.0f} s"
            reached_at[name][f"{point['step'] / result['steps']:.0%}"] = cell
    shares = sorted({share for cells in reached_at.values() for share in cells}, key=lambda share: int(share[:-1]))
    lines = [
        "### Convergence (Fig. 6)",
        "",
        "At equal parts of the training, by one seed of sampling:",
        "",
        *lines,
        "",
        "| share of the budget | " + " | ".join(f"`{name}` FD, KD; images, s" for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    lines += [f"| {share} | {' | '.join(reached_at[name].get(share, '') for name in names)} |" for share in shares]
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
    """Draws curves.png, levels.png and, with variants of several shares, shares.png into the folder of a tier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    axes = axes.flatten()
    floor = next(iter(results.values()))["floor"]
    panels = (
        ("thousand images of training", "images", 1e3, "fd"),
        ("thousand images of training", "images", 1e3, "kd"),
        ("10¹² multiply-accumulates of training", "macs", 1e12, "fd"),
        ("seconds of training", "seconds", 1.0, "fd"),
    )
    for axis, (title, key, unit, measure) in zip(axes, panels):
        for number, name in enumerate(CURVES):
            if name not in results:
                continue
            curve, seconds = results[name]["scores"]["curve"], results[name]["seconds"]["training"]
            if key == "seconds" and not seconds:
                continue
            x = seconds if key == "seconds" else [point[key] / unit for point in curve]
            axis.plot(x, [point[measure] for point in curve], "o-", color=f"C{number}", label=name)
            rebuilt = results[name]["scores"]["rebuilt"][measure]
            axis.axhline(rebuilt, color=f"C{number}", linewidth=0.8, linestyle=":")
        axis.axhline(floor[measure]["mean"], color="black", linewidth=0.8, linestyle="--", label="real images")
        axis.set(xlabel=title, ylabel="FD" if measure == "fd" else "KD × 1,000")
        axis.grid(alpha=0.3)
    axes[0].plot([], [], color="gray", linewidth=0.8, linestyle=":", label="rebuilt by its VAE")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize="small")
    _save(figure, folder / "curves.png")

    if "d2it-v" in results:
        figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        base = results["d2it-v"]["scores"]["error_by_level"]
        for name, result in results.items():
            if result["vae"] == results["d2it-v"]["vae"] and name != "d2it-v":
                ratios = [a / b for a, b in zip(result["scores"]["error_by_level"]["all"], base["all"])]
                axis.plot(base["levels"], ratios, "o-", label=name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(xlabel="log of signal to noise, a² / s²", ylabel="denoising error / that of d2it-v")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, folder / "levels.png")

    shares = {"fine-0": 0, "fine-30": 30, "d2it": 50, "fine-70": 70, "dit": 100}
    found = {share: results[name] for name, share in shares.items() if name in results}
    if len(found) > 2:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        own = [next(iter(result["scores"]["samples"].values()))["fd"] for result in found.values()]
        axes[0].errorbar(list(found), [f["mean"] for f in own], [f["spread"] for f in own], marker="o", capsize=3)
        rebuilt = [result["scores"]["rebuilt"]["fd"] for result in found.values()]
        axes[0].plot(list(found), rebuilt, "o:", color="gray", label="real images, rebuilt by its VAE")
        axes[0].legend()
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
