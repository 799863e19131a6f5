"""Weights that the network holds in bfloat16, with float32 masters that everything but a training step sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIRST = 2**64 - 1
"""The priority of nodes that autograd runs as soon as it can, such as those that add up gradients."""


def linears(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    """Returns the Linears of attention and MLP, whose weights autocast rounds; the modulations stay float32."""
    return [
        part
        for block in blocks
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and not name.startswith("modulation.")
    ]


class Masters:
    """Puts bfloat16 weights in the places of the Linears' float32 ones, which become their masters.

    Forward and backward compute what they compute under autocast, which rounds float32 weights to the same values. The
    optimiser's pass updates a master by the gradient of its weight and rounds it to the weight
    (`d2it.training.adamw.AdamW`). Checkpoints, averages and evaluations take the masters, in the weights' places.

    Where nothing is added to a gradient, the optimiser takes it in bfloat16, as the backward writes it. Where those of
    several micro-batches or ranks are added up, that is done in float32, as under autocast: to autograd a weight is a
    copy of its master, to which its gradient goes, widened, and DDP knows the masters alone.

    Args:
        linears: changed in place; none leaves a network as it is.
        added: whether gradients are added up.

    Attributes:
        weights: the bfloat16 weight of each master, as the optimiser takes it.

    Example:
        >>> import torch
        >>> from d2it.training.masters import Masters
        >>> layer = torch.nn.Linear(2, 2)
        >>> masters = Masters([layer], added=False)
        >>> layer.weight.dtype
        torch.bfloat16
        >>> with masters.in_place():
        ...     layer.weight.dtype
        torch.float32
    """

    def __init__(self, linears: Sequence[nn.Linear], *, added: bool) -> None:
        self.weights: dict[Tensor, Tensor] = {}
        self._places: list[tuple[nn.Linear, Tensor, Tensor]] = []
        for part in linears:
            master = part.weight
            weight = _copy(master) if added else nn.Parameter(master.detach().bfloat16())
            self.weights[master] = weight.detach() if added else weight  # the same memory
            self._places.append((part, master, weight))
            _put(part, weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the masters in the network, for as long as the context lasts."""
        for part, master, _ in self._places:
            _put(part, master)
        try:
            yield
        finally:
            for part, _, weight in self._places:
                _put(part, weight)

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters to the weights, after something else than the optimiser has changed them."""
        if self.weights:
            torch._foreach_copy_(list(self.weights.values()), list(self.weights))


@torch.enable_grad()
def _copy(master: Tensor) -> Tensor:
    """Returns the master in bfloat16; autograd adds the gradient of this copy to the master's, in every backward."""
    weight = master.bfloat16()
    # Of two nodes that are ready, autograd runs the one made later. This one is older than any forward: it would wait
    # for the end of the backward, and so would DDP's buckets.
    node: Any = weight.grad_fn
    node._set_sequence_nr(FIRST)
    return weight


def _put(part: nn.Linear, weight: Tensor) -> None:
    places: dict[str, Any] = part._parameters  # nn.Module would refuse a parameter that is no leaf
    places["weight"] = weight
