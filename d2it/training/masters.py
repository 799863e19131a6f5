"""Weights that the network holds in bfloat16, with float32 masters that everything but a training step sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2it.distributed import World


def linears(blocks: Sequence[nn.Module]) -> list[nn.Linear]:
    """Returns the Linears of attention and MLP, whose weights autocast rounds; the modulations stay float32."""
    return [
        part
        for block in blocks
        for name, part in block.named_modules()
        if isinstance(part, nn.Linear) and not name.startswith("modulation.")
    ]


class Masters:
    """Puts bfloat16 parameters in the places of the Linears' float32 weights, which become their masters.

    Forward and backward compute what they compute under autocast, which rounds float32 weights to the same values. The
    optimiser's pass updates a master by the gradient of its weight and rounds it to the weight
    (`d2it.training.adamw.AdamW`). Checkpoints, averages and evaluations take the masters, in the weights' places.

    Args:
        linears: changed in place; none leaves a network as it is.
        world: the ranks, which begin with the masters of the first.
        add_up: whether gradients of several micro-batches are added up, which takes float32.

    Attributes:
        weights: the bfloat16 weight of each master.
    """

    def __init__(self, linears: Sequence[nn.Linear], world: World, add_up: bool) -> None:
        self.weights: dict[Tensor, Tensor] = {}
        self._places = [(part, part.weight) for part in linears]
        for part, master in self._places:
            if world.size > 1:  # as DDP does with the parameters that it sees
                dist.broadcast(master.detach(), 0)
            weight = self.weights[master] = nn.Parameter(master.detach().bfloat16())
            if add_up:
                weight.grad_dtype = torch.float32
            part.weight = weight

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Has the masters in the network, for as long as the context lasts."""
        for part, master in self._places:
            part.weight = master
        try:
            yield
        finally:
            for part, master in self._places:
                part.weight = self.weights[master]

    @torch.no_grad()
    def round(self) -> None:
        """Rounds the masters to the weights, after something else than the optimiser has changed them."""
        if self.weights:
            torch._foreach_copy_(list(self.weights.values()), list(self.weights))
