"""What a budget of tokens buys: the shares of the grains that spend a given share of all tokens.

A region costs what its grain costs: the trunk's tokens, and of RefineNet one a latent code. A budget is a share of what
an image costs whose regions are all of the finest grain. With two grains it decides the share r of fine regions. With
more it leaves a choice, which one number s makes: s^i of the regions are of grain i or finer. That is the paper's r for
two grains, and (0.5, 0.25) at s = 0.5 for three. docs/decisions.md has what other choices cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def grain_tokens(config: Any) -> tuple[int, ...]:
    """Returns the tokens that a region of each grain costs, coarsest first.

    Args:
        config: of a `DynamicContentTransformer`; or of a `DynamicVAE`, for which they are those of the content
            transformers' presets: one token of the trunk a region, and one of RefineNet a code of every finer grain.

    Example:
        >>> from d2it.models import DynamicContentTransformer
        >>> grain_tokens(DynamicContentTransformer.preset_config("D2iT-XL-3"))
        (1, 5, 17)
    """
    side = config.code_sizes[0]
    trunk, least = (side // getattr(config, "patch_size", side)) ** 2, getattr(config, "min_grain", 1)
    codes = [(side // size) ** 2 for size in config.code_sizes]
    return tuple(trunk + (count if grain >= least else 0) for grain, count in enumerate(codes))


def least_budget(tokens: Sequence[int]) -> float:
    """Returns the smallest budget that can be spent: that of regions which are all of the coarsest grain."""
    return tokens[0] / tokens[-1]


def spendable(tokens: Sequence[int], digits: int) -> float:
    """Returns `least_budget` rounded up to so many decimals, so that what is shown can be spent.

    Example:
        >>> least_budget((1, 17)), spendable((1, 17), 2)
        (0.058823529411764705, 0.06)
    """
    return -(-(10**digits) * tokens[0] // tokens[-1]) / 10**digits


def budget_of(shares: Sequence[float], tokens: Sequence[int]) -> float:
    """Returns the budget that these shares spend.

    Args:
        shares: k - 1 shares of the regions, of grain i + 1 or finer.
        tokens: of `grain_tokens`.

    Example:
        >>> round(budget_of([0.5, 0.25], (1, 5, 17)), 3)
        0.353
    """
    return (tokens[0] + sum(s * (b - a) for s, a, b in zip(shares, tokens, tokens[1:]))) / tokens[-1]


def shares_of(budget: float, tokens: Sequence[int]) -> list[float]:
    """Returns the k - 1 shares of the regions, of grain i + 1 or finer, that spend a budget.

    Args:
        budget: share of the tokens of the finest map.
        tokens: of `grain_tokens`.

    Raises:
        ValueError: a budget below that of the coarsest map, or above 1.

    Example:
        >>> [round(share, 3) for share in shares_of(0.353, (1, 5, 17))]
        [0.5, 0.25]
        >>> [round(share, 3) for share in shares_of(0.6, (1, 5))]
        [0.5]
    """
    check_budget("budget", budget, tokens)

    def at(s: float) -> list[float]:
        return [s**i for i in range(1, len(tokens))]

    if budget == 1:
        return at(1.0)  # exactly
    low, high = 0.0, 1.0  # the budget rises with s
    for _ in range(53):
        middle = (low + high) / 2
        low, high = (middle, high) if budget_of(at(middle), tokens) < budget else (low, middle)
    return at(high)


def check_budget(name: str, budget: float, tokens: Sequence[int]) -> None:
    """Raises ValueError unless a budget can be spent; the message names the argument."""
    least = least_budget(tokens)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or not least <= budget <= 1:
        raise ValueError(f"{name} must be a share of the tokens in {spendable(tokens, 4):g} ... 1, got {budget!r}")


@dataclass(frozen=True)
class BudgetRange:
    """The shares of a budget that is uniform in a range: a function of a number in [0, 1), as a latent cache takes it.

    Args:
        low: the smallest budget.
        high: the largest; equal to `low`, every image has the same shares.
        tokens: of `grain_tokens`.

    Raises:
        ValueError: budgets that cannot be spent, or that descend.
    """

    low: float
    high: float
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            check_budget("budget", value, self.tokens)
        if self.low > self.high:
            raise ValueError(f"budget must be [least, most], got [{self.low}, {self.high}]")

    def __call__(self, uniform: float) -> list[float]:
        return shares_of(self.low + (self.high - self.low) * uniform, self.tokens)
