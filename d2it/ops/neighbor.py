"""Neighbour copying (paper 3.1): codes of every grain merged onto the finest grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import operator


def neighbor_copy(latents: Sequence[Tensor], grain_map: Tensor, *, backend: str | None = None) -> Tensor:
    """Every region takes the codes of its own grain, repeated onto the finest grid (paper 3.1).

    Args:
        latents: k tensors (B, C, h * s_i, w * s_i), coarsest to finest; every s_i divides the last. One dtype.
        grain_map: (B, h, w) int64, values 0..k-1.
        backend: "reference", "cpu", "cuda", or None to choose.

    Returns:
        (B, C, Hf, Wf), the shape of `latents[-1]`. The gradient of a code is the sum over the cells that copy it, zero
        where its grain was not chosen; summed in a fixed order.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together, or a grain outside 0..k-1 (on a GPU a
            device-side assertion, raised at the next synchronisation).
    """
    _validate(latents, grain_map)
    name = choose("neighbor_copy", backend, latents, grain_map)
    if name == "reference":
        check_grains(grain_map, len(latents))
        return reference.neighbor_copy(latents, grain_map)
    return torch.ops.d2it.neighbor_copy(list(latents), grain_map, name)


def _validate(latents: Sequence[Tensor], grain_map: Tensor) -> None:
    _check.tensor("grain_map", grain_map, ndim=3, floating=False)
    if not isinstance(latents, (list, tuple)) or not latents:
        raise TypeError(f"latents must be a non-empty sequence of tensors, got {type(latents).__name__}")
    batch, h, w = grain_map.shape
    finest = latents[-1]
    for i, latent in enumerate(latents):
        name = f"latents[{i}]"
        _check.tensor(name, latent, ndim=4, floating=True)
        _check.same("dtype", "latents[-1]", finest, name, latent)
        _check.same("device", "grain_map", grain_map, name, latent)
        height, width = latent.shape[2:]
        scale = height // h if h else 1
        _check.require(
            latent.shape[:2] == (batch, finest.shape[1])
            and scale >= 1
            and (height, width) == (h * scale, w * scale)
            and finest.shape[2] % max(height, 1) == 0
            and (i == 0 or height >= latents[i - 1].shape[2]),
            name,
            f"be (B, C, h * s, w * s) with (B, h, w) = {tuple(grain_map.shape)}, C = {finest.shape[1]} "
            "and an s that divides the finest",
            tuple(latent.shape),
        )


def check_grains(grain_map: Tensor, grains: int) -> None:
    """Raises unless every grain is in 0..grains-1."""
    if grain_map.numel() == 0:
        return
    least, most = torch.aminmax(grain_map)
    _check.values(
        (least >= 0) & (most < grains),
        f"grain_map must have values in 0..{grains - 1}",
        lambda: f"{int(least)}..{int(most)}",
    )


def _fake(latents: list[Tensor], grain_map: Tensor, backend: str) -> Tensor:
    return torch.empty_like(latents[-1])


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    latents, grain_map, backend = inputs
    ctx.save_for_backward(grain_map)
    ctx.backend = backend
    ctx.scales = [x.shape[2] // max(grain_map.shape[1], 1) for x in latents]


def _backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    (grains,) = ctx.saved_tensors
    return torch.ops.d2it.neighbor_copy_backward(grad, grains, ctx.scales, ctx.backend), None, None


def _backward_fake(grad: Tensor, grain_map: Tensor, scales: list[int], backend: str) -> list[Tensor]:
    batch, channels = grad.shape[:2]
    h, w = grain_map.shape[1:]
    return [grad.new_empty((batch, channels, h * s, w * s)) for s in scales]


operator(
    "neighbor_copy(Tensor[] latents, Tensor grain_map, str backend) -> Tensor",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    check=lambda latents, grains: check_grains(grains, len(latents)),
)
operator(
    "neighbor_copy_backward(Tensor grad, Tensor grain_map, int[] scales, str backend) -> Tensor[]",
    fake=_backward_fake,
)
register_backend("neighbor_copy", "reference")
