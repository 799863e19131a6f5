"""The paper's claims, and what the results say of each. Standard library only.

A difference counts where it is beyond three spreads. A spread is the standard deviation over the seeds of sampling (of
the noise, for the denoising error) of both figures together and, between two trainings, that of a repeated training:
`d2it` and `d2it-seed1` differ by nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    """

    source: str
    text: str
    paper: str
    better: str
    worse: str
    measures: tuple[str, ...] = ("fd", "kd")
    equal: bool = False

    @property
    def variants(self) -> list[str]:
        """The variants that it needs."""
        return list(dict.fromkeys(name.partition(":")[0] for name in (self.better, self.worse)))


ON_LATENTS = ("error", "fd", "kd")
CLAIMS = (
    Claim("Table 3, Fig. 6", "D2iT beats DiT of the same size", "FID 34.67 → 22.11", "d2it", "dit"),
    Claim("Table 3", "grained noise and the router alone beat DiT", "34.67 → 29.10", "routing", "dit"),
    Claim("Table 3", "the loss weighed by codes adds to it", "29.10 → 27.62", "refine-0", "routing", ON_LATENTS),
    Claim("Table 3", "RefineNet adds to it", "27.62 → 22.11", "d2it", "refine-0", ON_LATENTS),
    Claim("Table 4", "one block of RefineNet in six beats two", "22.11, 26.53", "d2it", "refine-2", ON_LATENTS),
    Claim("Table 4", "one block of RefineNet in six beats four", "", "d2it", "refine-4", ON_LATENTS),
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
    Claim("", "three grains beat two", "", "d2it-3", "d2it"),
    Claim("", "refining 60 % of the timesteps is no worse than all", "", "until-60", "d2it", ON_LATENTS, equal=True),
    Claim("", "the best of ours (v) beats DiT predicting v", "", "d2it-v", "dit-v"),
)


def figure(results: Results, name: str, measure: str) -> dict[str, float] | None:
    """Mean and spread of a variant's measure; `name` may be "variant:maps"."""
    variant, _, maps = name.partition(":")
    if variant not in results:
        return None
    scores = results[variant]["scores"]
    if measure == "error":
        return scores["error"]
    samples = scores["samples"]
    found = samples.get(maps) if maps else next(iter(samples.values()))
    return None if found is None else found[measure]


def training_spread(results: Results, measure: str) -> float | None:
    """Standard deviation of a measure over repeated trainings; None where none was repeated."""
    both = [figure(results, name, measure) for name in ("d2it", "d2it-seed1")]
    if both[0] is None or both[1] is None:
        return None
    return abs(both[0]["mean"] - both[1]["mean"]) / math.sqrt(2)


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
    better: dict[str, float]
    worse: dict[str, float]
    spread: float
    verdict: str


def judge(results: Results, claim: Claim) -> list[Finding]:
    """What each measure says, the deciding one first; empty where a variant was not measured."""
    findings = []
    for measure in claim.measures:
        one, other = figure(results, claim.better, measure), figure(results, claim.worse, measure)
        if one is None or other is None:
            return []
        variance = one["spread"] ** 2 + other["spread"] ** 2
        if len(claim.variants) > 1:
            variance += 2 * (training_spread(results, measure) or 0.0) ** 2
        spread = math.sqrt(variance)
        told = _verdict(other["mean"] - one["mean"], spread, claim.equal)
        if not any(follows_training(results, name, measure) for name in claim.variants):
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
