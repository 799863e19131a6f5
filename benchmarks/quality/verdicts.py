"""The paper's claims, and what the results say of each. Standard library only.

A difference counts where it is beyond three spreads. The spread of a difference has two parts. One is the standard
deviation over the seeds of sampling of both figures; the denoising errors of two variants are of the same noise, so
there it is that of their difference. The other part, between two trainings, is how far one training is from the next:
the standard deviation over trainings that differ by their seed alone, pooled over the variants that were repeated with
the same prediction.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from quality.tiers import VARIANTS

Result = dict[str, Any]
Results = dict[str, Result]

HOLDS, CONTRADICTED, OPEN, MISSING = "holds", "contradicted", "unresolved", "not measured"
SAME = "no difference seen"
SPREADS = 3.0
NAMES = {"error": "denoising error", "fd": "FD", "kd": "KD"}


@dataclass(frozen=True)
class Claim:
    """Of two variants the first is the better one, or (`equal`) no worse.

    Args:
        source: where the paper states it; "" is a claim beyond the paper.
        text: the claim.
        paper: its figures there.
        better: name of the variant, or "name:maps" for samples under other maps than its own.
        worse: the same.
        measures: what judges it, the first one alone decides: "error" needs variants on the same latents.
        equal: the claim is that the first is no worse than the second.
        seconds: the first is taken where it was trained for no more seconds than the second, in place of the same
            multiply-accumulates.
    """

    source: str
    text: str
    paper: str
    better: str
    worse: str
    measures: tuple[str, ...] = ("fd", "kd")
    equal: bool = False
    seconds: bool = False

    @property
    def variants(self) -> list[str]:
        """The variants that it needs."""
        return list(dict.fromkeys(name.partition(":")[0] for name in (self.better, self.worse)))


ON_LATENTS = ("error", "fd", "kd")
CLAIMS = (
    Claim("Table 3, Fig. 6", "D2iT beats DiT of the same size", "FID 34.67 → 22.11", "d2it", "dit"),
    Claim("Table 3, Fig. 6", "the same, both predicting v", "34.67 → 22.11", "d2it-v", "dit-v"),
    Claim("Table 3, Fig. 6", "the same, in the same seconds", "", "d2it-v", "dit-v", seconds=True),
    Claim("Table 3", "grained noise and the router alone beat DiT", "34.67 → 29.10", "routing", "dit"),
    Claim("Table 3", "the loss weighed by codes adds to it", "29.10 → 27.62", "refine-0", "routing", ON_LATENTS),
    Claim("Table 3", "RefineNet adds to it", "27.62 → 22.11", "d2it", "refine-0", ON_LATENTS),
    Claim("Table 4", "one block of RefineNet in six beats two", "22.11, 26.53", "d2it", "refine-2", ON_LATENTS),
    Claim("Table 4", "one block of RefineNet in six beats four", "", "d2it", "refine-4", ON_LATENTS),
    Claim(
        "Table 4", "a block of RefineNet on top of the trunk helps", "25.15 → 20.99", "added-1", "refine-0", ON_LATENTS
    ),
    Claim("Table 4", "a second one on top helps again", "20.99 → 19.96", "added-2", "added-1", ON_LATENTS),
    Claim("Table 5", "predicted maps are as good as true ones", "4.47, 4.35", "d2it", "d2it:true", equal=True),
    Claim("Table 5", "random maps are worse", "15.93, 4.47", "d2it", "d2it:random"),
    Claim("Fig. 5", "half of the regions fine beats none", "22.11, 51.33", "d2it", "fine-0"),
    Claim("Fig. 5", "half of the regions fine beats all", "22.11, 29.15", "d2it", "dit"),
    Claim("Fig. 5", "half of the regions fine beats 30 %", "", "d2it", "fine-30"),
    Claim("Fig. 5", "half of the regions fine beats 70 %", "22.11, 23.64", "d2it", "fine-70"),
    Claim("", "predicting v beats epsilon", "", "d2it-v", "d2it", ON_LATENTS),
    Claim("", "predicting v beats epsilon in a DiT too", "", "dit-v", "dit", ON_LATENTS),
    Claim("", "predicting x_0 beats v", "", "d2it-x0", "d2it-v", ON_LATENTS),
    Claim("", "the linear path with velocity beats v", "", "d2it-flow", "d2it-v", ON_LATENTS),
    Claim("", "REPA helps", "", "repa", "d2it", ("fd", "kd", "error")),
    Claim("", "three grains, on fewer tokens of the trunk, beat two", "", "d2it-3", "d2it"),
    Claim("", "the same, in the same seconds", "", "d2it-3", "d2it", seconds=True),
    Claim("", "refining 60 % of the timesteps is no worse than all", "", "until-60", "d2it", ON_LATENTS, equal=True),
)


def figure(results: Results, name: str, measure: str, seconds: float = math.inf) -> dict[str, Any] | None:
    """Mean and spread of a variant's measure.

    Args:
        results: by the variant's name.
        name: of the variant, or "variant:maps".
        measure: a key of `NAMES`.
        seconds: of its training at most: the last point of its curve within, which has one seed of sampling and takes
            the spread of the last one's.

    Returns:
        None where it was not measured, or has no point within these seconds.
    """
    variant, _, maps = name.partition(":")
    if variant not in results:
        return None
    scores = results[variant]["scores"]
    samples = scores["samples"]
    found = samples.get(maps) if maps else next(iter(samples.values()))
    last = scores["error"] if measure == "error" else found and found[measure]
    if last is None or seconds == math.inf:
        return last
    timing = results[variant]["seconds"]["training"]
    if timing is None or timing[-1] <= seconds:
        return timing and last
    points = [point[measure] for point, passed in zip(scores["curve"], timing) if passed <= seconds]
    return {"mean": points[-1], "spread": last["spread"]} if points else None


def training_spread(results: Results, name: str, measure: str) -> float | None:
    """Standard deviation of a measure over repeated trainings; None where none was repeated.

    Args:
        results: by the variant's name.
        name: of a variant: repetitions with its prediction count, or where there are none the most distant ones.
        measure: a key of `NAMES`.
    """
    groups: dict[str, list[str]] = {}
    for again in results:
        first = VARIANTS[again].repeats
        if first in results:
            groups.setdefault(first, [first]).append(again)

    def pooled(firsts: list[str]) -> float:
        squares, freedom = 0.0, 0
        for first in firsts:
            values = [own["mean"] for each in groups[first] if (own := figure(results, each, measure))]
            mean = math.fsum(values) / len(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
        return math.sqrt(squares / freedom)

    own = VARIANTS[name].diffusion
    alike = [first for first in groups if VARIANTS[first].diffusion == own]
    return pooled(alike) if alike else max((pooled([first]) for first in groups), default=None)


def follows_training(results: Results, name: str, measure: str) -> bool:
    """Whether a variant's measure has fallen by more than three spreads from its curve's first point to the last."""
    curve, own = results[name]["scores"]["curve"], figure(results, name, measure)
    return own is not None and curve[0][measure] - curve[-1][measure] > SPREADS * own["spread"]


@dataclass(frozen=True)
class Finding:
    """What one measure says of a claim.

    Args:
        measure: its key.
        better: figure of the variant that shall be the better one.
        worse: of the other one.
        spread: of their difference.
        verdict: HOLDS, CONTRADICTED, OPEN or SAME.
    """

    measure: str
    better: dict[str, Any]
    worse: dict[str, Any]
    spread: float
    verdict: str

    @property
    def spreads(self) -> float:
        """By how many spreads the first is the better one."""
        return (self.worse["mean"] - self.better["mean"]) / self.spread if self.spread else math.inf


def judge(results: Results, claim: Claim) -> list[Finding]:
    """What each measure says, the deciding one first; empty where a variant was not measured."""
    findings = []
    for measure in claim.measures:
        other = figure(results, claim.worse, measure)
        limit = math.inf
        if claim.seconds and other:
            limit = (results[claim.variants[-1]]["seconds"]["training"] or [-math.inf])[-1]
        one = figure(results, claim.better, measure, limit)
        if one is None or other is None:
            return []
        variance = one["spread"] ** 2 + other["spread"] ** 2
        if measure == "error":
            variance = statistics.variance(a - b for a, b in zip(one["values"], other["values"]))
        if len(claim.variants) > 1:
            variance += sum((training_spread(results, name, measure) or 0.0) ** 2 for name in claim.variants)
        spread = math.sqrt(variance)
        told = _verdict(other["mean"] - one["mean"], spread, claim.equal)
        vaes = {results[name]["vae"] for name in claim.variants}
        alike = [name for name, result in results.items() if result["vae"] in vaes]
        if not any(follows_training(results, name, measure) for name in alike):
            told = OPEN
        findings.append(Finding(measure, one, other, spread, told))
    return findings


def _verdict(gain: float, spread: float, equal: bool) -> str:
    if abs(gain) <= SPREADS * spread:
        return SAME if equal else OPEN
    return HOLDS if gain > 0 else CONTRADICTED


def verdict(results: Results, claim: Claim) -> str:
    """The verdict of the claim's first measure."""
    findings = judge(results, claim)
    return findings[0].verdict if findings else MISSING
