"""Neighbour copying (paper 3.1): codes of every grain merged onto the finest grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, operator


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

    Example:
        >>> coarse = torch.tensor([[[[1.0, 2.0]]]])
        >>> fine = torch.arange(10.0, 18.0).reshape(1, 1, 2, 4)
        >>> ops.neighbor_copy([coarse, fine], torch.tensor([[[0, 1]]]))
        tensor([[[[ 1.,  1., 12., 13.],
                  [ 1.,  1., 16., 17.]]]])
    """
    _validate(latents, grain_map)
    name = choose("neighbor_copy", backend, latents, grain_map)
    if name == "reference":
        check_grains(grain_map, len(latents))
        return reference.neighbor_copy(latents, grain_map)
    return _call_neighbor_copy(list(latents), grain_map, name)


def _validate(latents: Sequence[Tensor], grain_map: Tensor) -> None:
    _check.tensor("grain_map", grain_map, ndim=3, dtypes=_check.INTEGERS)
    if not isinstance(latents, (list, tuple)) or not latents:
        raise TypeError(f"latents must be a non-empty sequence of tensors, got {_check.shown(latents)}")
    for i, latent in enumerate(latents):
        _check.tensor(f"latents[{i}]", latent, ndim=4, dtypes=_check.FLOATS)
    batch, h, w = grain_map.shape
    finest = latents[-1]
    for i, latent in enumerate(latents):
        name = f"latents[{i}]"
        _check.same("dtype", "latents[-1]", finest, name, latent)
        _check.same("device", "grain_map", grain_map, name, latent)
        height, width = latent.shape[2:]
        scale = height // h if h else 1
        fits = (
            latent.shape[:2] == (batch, finest.shape[1])
            and scale >= 1
            and (height, width) == (h * scale, w * scale)
            and finest.shape[2] % max(height, 1) == 0
            and (i == 0 or height >= latents[i - 1].shape[2])
        )
        _check.require(
            fits,
            name,
            lambda: (
                f"be (B, C, h * s, w * s) with (B, h, w) = {tuple(grain_map.shape)}, C = {finest.shape[1]} "
                "and an s that divides the finest"
            ),
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


def _empty(like: Tensor, height: int, width: int) -> Tensor:
    """An unwritten tensor of the batch, channels and dtype of `like`: channels-last where that is, else contiguous."""
    shape = (*like.shape[:2], height, width)
    adjacent = like.stride(1) == 1 and like.shape[1] > 1 and like.stride(3) != 1
    layout = torch.channels_last if adjacent else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake(latents: list[Tensor], grain_map: Tensor, backend: str) -> Tensor:
    return _empty(latents[-1], *latents[-1].shape[2:])


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    latents, grain_map, backend = inputs
    ctx.save_for_backward(grain_map)
    ctx.backend = backend
    ctx.scales = [x.shape[2] // max(grain_map.shape[1], 1) for x in latents]


def _backward(ctx: Any, grad: Tensor) -> Sequence[Any]:
    (grains,) = ctx.saved_tensors
    return _call_neighbor_copy_backward(grad, grains, ctx.scales, ctx.backend), None, None


def _backward_fake(grad: Tensor, grain_map: Tensor, scales: list[int], backend: str) -> list[Tensor]:
    h, w = grain_map.shape[1:]
    return [_empty(grad, h * s, w * s) for s in scales]


def _backward_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    _, grains, _, ctx.backend = inputs
    ctx.save_for_backward(grains)


def _backward_backward(ctx: Any, *latents: Tensor) -> Sequence[Any]:
    (grains,) = ctx.saved_tensors
    return _call_neighbor_copy(list(latents), grains, ctx.backend), None, None, None


def _native(latents: list[Tensor], grain_map: Tensor) -> Tensor:
    out = _fake(latents, grain_map, "")
    if not torch.ops.d2it_C.neighbor_copy(latents, grain_map.long(), out):
        check_grains(grain_map, len(latents))  # raises: the C++ operator only reports that a grain is out of range
    return out


def _native_backward(grad: Tensor, grain_map: Tensor, scales: list[int]) -> list[Tensor]:
    grads = _backward_fake(grad, grain_map, scales, "")
    torch.ops.d2it_C.neighbor_copy_backward(grad, grain_map.long(), grads)
    return grads


def _native_fits(latents: Sequence[Tensor], grain_map: Tensor) -> list[str]:
    reasons = []
    if len(latents) > 8:
        reasons.append(f"it takes at most 8 grains, not {len(latents)}")
    dtype, device = latents[-1].dtype, latents[-1].device.type
    supported = (torch.float32, torch.float16, torch.bfloat16)
    if dtype not in supported and not (dtype == torch.float64 and device == "cpu"):
        reasons.append(f"it has no {dtype} on {device}")
    return reasons


_call_neighbor_copy = operator(
    "neighbor_copy(Tensor[] latents, Tensor grain_map, str backend) -> Tensor",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    check=lambda latents, grains: check_grains(grains, len(latents)),
    linear=True,
)
_call_neighbor_copy_backward = operator(
    "neighbor_copy_backward(Tensor grad, Tensor grain_map, SymInt[] scales, str backend) -> Tensor[]",
    fake=_backward_fake,
    setup=_backward_setup,
    backward=_backward_backward,
    linear=True,
)
register_backend("neighbor_copy", "reference")
for _backend in ("cpu", "cuda"):
    register_backend("neighbor_copy", _backend, _native_fits, native="neighbor_copy")
    implement("neighbor_copy", _backend, _native, checks_values=True)
    implement("neighbor_copy_backward", _backend, _native_backward)
