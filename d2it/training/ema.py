"""The exponential moving average of the trained parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Ema:
    """The average of all trained parameters: shadow <- decay * shadow + (1 - decay) * parameter, in a few kernels.

    Frozen parameters and buffers do not change, so they are left out. Under FSDP2 the average is sharded as the
    parameters are. A step whose update was skipped (non-finite) averages the unchanged parameters.

    Args:
        module: its parameters that require a gradient are averaged.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shadow = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        torch._foreach_lerp_(
            [local(s) for s in self.shadow.values()],
            [local(p.detach()) for p in self.parameters.values()],
            1.0 - self.decay,
        )

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the module the averaged parameters, for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        shadow = [local(s) for s in self.shadow.values()]
        trained = [local(p.detach()) for p in self.parameters.values()]
        kept = [t.clone() for t in trained]
        torch._foreach_copy_(trained, shadow)
        torch._foreach_copy_(shadow, kept)
