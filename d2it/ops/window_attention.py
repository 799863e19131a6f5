"""Attention inside windows, with a learnable bias, over the tokens that exist (paper Eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2it.kernels.common import cdiv, num_sms, tiled_positions
from d2it.ops import _check, reference
from d2it.ops._dispatch import choose, register_backend
from d2it.ops._register import implement, known, operator, remember


class Windows(NamedTuple):
    """Which positions of a window hold tokens, and how they attend to each other: all but the queries, keys and values.

    Attributes:
        bias: (Wb, Hb, N, N) floating point, added to the scaled scores, or None.
        slots: (W, N) int32, the row of each position or -1; None for dense windows.
        segment_ids: (Ws, N) integers, tokens attend within equal ids; None where all of a window attend to each other.
        scale: factor of the scores; None is D ** -0.5.
    """

    bias: Tensor | None
    slots: Tensor | None
    segment_ids: Tensor | None
    scale: float | None

    def shape(self, x: Tensor) -> tuple[int, int]:
        """(W, N): of `slots`, or the leading dimensions of `x` where windows are dense."""
        like = x if self.slots is None else self.slots
        return like.shape[0], like.shape[1]

    def factor(self, x: Tensor) -> float:
        """The number that multiplies the scores of `x`, (..., D)."""
        return max(x.shape[-1], 1) ** -0.5 if self.scale is None else self.scale

    def check(self, name: str, x: Tensor) -> None:
        """Raises unless these windows describe `x` (W, N, ..., H, D) or (T, ..., H, D), the argument called `name`."""
        if self.slots is not None:
            _check.tensor("slots", self.slots, ndim=2, dtypes=_INT32)
            _check.same("device", name, x, "slots", self.slots)
        n, heads = self.shape(x)[1], x.shape[-2]
        if self.bias is not None:
            _check.tensor("bias", self.bias, ndim=4, dtypes=_check.FLOATS)
            _check.same("device", name, x, "bias", self.bias)
            _check.require(
                self.bias.shape[0] >= 1 and self.bias.shape[1] in (1, heads) and self.bias.shape[2:] == (n, n),
                "bias",
                lambda: f"be (Wb, 1 or {heads}, {n}, {n})",
                tuple(self.bias.shape),
            )
        if self.segment_ids is not None:
            _check.tensor("segment_ids", self.segment_ids, ndim=2, dtypes=_check.INTEGERS)
            _check.same("device", name, x, "segment_ids", self.segment_ids)
            _check.require(
                self.segment_ids.shape[0] >= 1 and self.segment_ids.shape[1] == n,
                "segment_ids",
                lambda: f"be (Ws, {n})",
                tuple(self.segment_ids.shape),
            )
        if self.scale is not None:
            _check.number("scale", self.scale, instead="multiply q by it, and pass scale=1.0")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v inside every window (paper Eq. 10).

    Dense windows are (W, N, H, D). Packed windows are rows (T, H, D) with `slots`, the row of each position of each
    window: windows may have any number of tokens, and only those cost anything.

    Args:
        q, k, v: (W, N, H, D), or (T, H, D) with `slots`; one dtype and device, any strides.
        bias: (Wb, Hb, N, N) floating point, added to the scaled scores: window i uses bias[i % Wb], Hb is 1 or H;
            (N, N) and (H, N, N) are (1, 1, N, N) and (1, H, N, N). Or None. Its gradient has the shape given, and is
            summed in a fixed order, the same bits every time.
        slots: (W, N) int32, the row of each position, or -1 (any negative). No row stands in it twice.
        segment_ids: (Ws, N) integers; tokens attend within equal ids (Swin's shifted windows). Window i uses
            segment_ids[i % Ws].
        scale: a Python number, D ** -0.5 where None. For a learnable one, multiply q by it and pass 1.0.
        backend: "reference", "cpu", "triton", "cuda", or None to choose.

    Returns:
        The shape and dtype of `q`. Rows that are in no slot are zero, and so are their gradients.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not go together; on CPU, slots with a row that does
            not exist, or with one twice. On a GPU the first is a device-side assertion, raised at the next
            synchronisation, and the row is left out; of a row that occurs twice either result may remain.

    Under autocast q, k and v are cast to its dtype, as PyTorch's own attention does.

    Example:
        >>> q, k, v = torch.randn(3, 8, 49, 4, 32).unbind()  # 8 windows of 7 x 7 tokens, 4 heads
        >>> bias = ops.relative_position_bias(torch.zeros(13 * 13, 4), window=7)
        >>> ops.window_attention(q, k, v, bias).shape
        torch.Size([8, 49, 4, 32])
        >>> slots = torch.tensor([[0, 1, 2], [3, -1, -1]], dtype=torch.int32)  # windows of 3 tokens and of 1
        >>> q, k, v = torch.randn(3, 4, 1, 8).unbind()
        >>> out = ops.window_attention(q, k, v, None, slots=slots)
        >>> torch.equal(out[3], v[3])  # a token by itself attends to itself
        True
    """
    (q, k, v), bias = _autocast(q, k, v), _bias_of_windows(bias)
    args = (q, k, v, bias, slots, segment_ids, scale)
    windows = Windows(bias, slots, segment_ids, scale)
    if (run := known("window_attention", backend, args)) is not None:
        return run(q, k, v, *windows[:3], windows.factor(q))[0]
    ndim = 4 if slots is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.tensor(name, x, ndim=ndim, dtypes=_check.FLOATS)
        _check.same("dtype", "q", q, name, x)
        _check.same("device", "q", q, name, x)
        _check.require(x.shape == q.shape, name, lambda: f"have the shape of q {tuple(q.shape)}", tuple(x.shape))
    windows.check("q", q)
    name = choose("window_attention", backend, q, k, v, bias, slots=slots, segment_ids=segment_ids)
    remember("window_attention", backend, args, name)
    if name == "reference":
        check_slots(slots, q.shape[0])
        return reference.window_attention(q, k, v, bias, slots=slots, segment_ids=segment_ids, scale=scale)
    return _call_window_attention(q, k, v, *windows[:3], windows.factor(q), name)[0]


def window_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`window_attention` on one projection, read where the linear layer left it; its gradient is one tensor too.

    Args:
        qkv: (W, N, 3, H, D), or (T, 3, H, D) with `slots`.
        bias, slots, segment_ids, scale, backend: as for `window_attention`.

    Returns:
        (W, N, H, D) or (T, H, D), the dtype of `qkv`.

    Raises:
        TypeError, ValueError: as for `window_attention`.

    Example:
        >>> x, qkv = torch.randn(8, 49, 128), torch.nn.Linear(128, 3 * 128)
        >>> ops.window_attention_qkvpacked(qkv(x).unflatten(-1, (3, 4, 32)), None).shape
        torch.Size([8, 49, 4, 32])
    """
    (qkv,), bias = _autocast(qkv), _bias_of_windows(bias)
    args = (qkv, bias, slots, segment_ids, scale)
    windows = Windows(bias, slots, segment_ids, scale)
    if (run := known("window_attention_qkvpacked", backend, args)) is not None:
        return run(qkv, *windows[:3], windows.factor(qkv))[0]
    _check.tensor("qkv", qkv, ndim=5 if slots is None else 4, dtypes=_check.FLOATS)
    _check.require(qkv.shape[-3] == 3, "qkv", "have 3 in its third dimension from the end", tuple(qkv.shape))
    windows.check("qkv", qkv)
    name = choose("window_attention_qkvpacked", backend, qkv, bias, slots=slots, segment_ids=segment_ids)
    remember("window_attention_qkvpacked", backend, args, name)
    if name == "reference":
        check_slots(slots, qkv.shape[0])
        return reference.window_attention_qkvpacked(qkv, bias, slots=slots, segment_ids=segment_ids, scale=scale)
    return _call_window_attention_qkvpacked(qkv, *windows[:3], windows.factor(qkv), name)[0]


def _bias_of_windows(bias: Tensor | None) -> Tensor | None:
    """(N, N) and (H, N, N) as (1, 1, N, N) and (1, H, N, N); anything else as it is."""
    if not isinstance(bias, Tensor) or bias.layout is not torch.strided or bias.is_nested:
        return bias
    return bias[None, None] if bias.ndim == 2 else bias[None] if bias.ndim == 3 else bias


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device, but for float64, in the dtype of autocast where that is on."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def check_slots(slots: Tensor | None, rows: int) -> None:
    """Raises unless every slot names a row below `rows`, or none, and no two name the same."""
    if slots is None or slots.numel() == 0:
        return
    # No size in the rule: torch.compile would take it for a constant.
    _check.values((slots < rows).all(), "slots must name rows that are there", lambda: f"{int(slots.max())} of {rows}")
    if slots.device.type == "cpu":
        named = slots.flatten().sort()[0]
        twice = (named[1:] == named[:-1]) & (named[1:] >= 0)
        _check.values(~twice.any(), "slots must name a row once", lambda: f"row {int(named[1:][twice][0])} twice")


def slots_from_cu_seqlens(cu_seqlens: Tensor, size: int) -> Tensor:
    """The slots of ragged windows whose rows lie one after the other, as FlashAttention's `cu_seqlens` describes them.

    Args:
        cu_seqlens: (W + 1,) int32, not descending: window i has the rows cu_seqlens[i] .. cu_seqlens[i + 1] - 1.
        size: N, positions of a window; at least the longest window.

    Returns:
        (W, N) int32 on the device of `cu_seqlens`: the rows of window i, then -1.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: offsets that are negative or descend, or a window of more than `size` rows (on a GPU as a
            device-side assertion, raised at the next synchronisation).

    Example:
        >>> ops.slots_from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=torch.int32), size=3)
        tensor([[ 0,  1, -1],
                [-1, -1, -1],
                [ 2,  3,  4]], dtype=torch.int32)
    """
    _check.tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=_INT32)
    _check.require(cu_seqlens.shape[0] >= 1, "cu_seqlens", "have at least one offset", tuple(cu_seqlens.shape))
    _check.integer("size", size, low=0)
    _check.require(
        (cu_seqlens.shape[0] - 1) * size <= _check.MOST_INTEGER,
        "size",
        lambda: f"give at most 2^31 - 1 positions to {cu_seqlens.shape[0] - 1} windows",
        size,
    )
    lengths = cu_seqlens.diff()
    _check.values(
        ((cu_seqlens >= 0).all() & (lengths >= 0).all()),
        "cu_seqlens must not be negative and not descend",
        lambda: str(cu_seqlens.tolist()) if cu_seqlens.shape[0] <= 16 else f"{cu_seqlens.shape[0]} offsets that do",
    )
    _check.values(
        (lengths <= size).all(), "size must hold the longest window", lambda: f"{size} for {int(lengths.max())} rows"
    )
    return reference.slots_from_cu_seqlens(cu_seqlens, size)


def _lse(q: Tensor, slots: Tensor | None, segment_ids: Tensor | None, backend: str) -> Tensor:
    # Windows that are one tile are computed again from the inputs; for larger ones the backward reads this.
    windows, n = (q if slots is None else slots).shape[:2]
    kept = backend == "cuda" or (backend == "triton" and n > tiled_positions(q, slots, segment_ids))
    return q.new_empty((windows, q.shape[-2], n) if kept else (0,), dtype=torch.float32)


def _setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend = inputs
    lse = output[1]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *(output if lse.ndim == 3 else (None, None)))


def _backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *attending, bias, _slots, _segment_ids, _out, _lse, _scale, needs_bias, _backend = args
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_bias else grad.new_empty(0)
    return *(x.new_empty(x.shape) for x in attending), dbias


_INT32 = frozenset((torch.int32,))
_WHERE = "Tensor? bias, Tensor? slots, Tensor? segment_ids"
_BACK = f"{_WHERE}, Tensor? out, Tensor? lse, float scale, bool needs_bias, str backend"
QKV = Callable[..., Sequence[Tensor]]


def _define(name: str, tensors: str, gradients: str, qkv: QKV) -> Callable[..., Any]:
    """Defines the operator `name` and its backward; returns the function that calls the former.

    Args:
        name: of the operator.
        tensors: those that attend, as the schema declares them.
        gradients: the same of their gradients.
        qkv: q, k and v, from the tensors that attend.
    """
    count = tensors.count("Tensor")

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        q = qkv(*args[:count])[0]
        *_, slots, segment_ids, _, backend = args
        return q.new_empty(q.shape), _lse(q, slots, segment_ids, backend)

    def composite(*args: Any) -> tuple[Tensor, None]:
        *attending, bias, slots, segment_ids, scale = args
        q, k, v = qkv(*attending)
        return reference.window_attention(q, k, v, bias, slots=slots, segment_ids=segment_ids, scale=scale), None

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Sequence[Any]:
        saved = ctx.saved_tensors
        if grad is None:
            return (None,) * len(saved)
        needs_bias = saved[count] is not None and ctx.needs[count]
        *grads, dbias = call_backward(grad, *saved, ctx.scale, needs_bias, ctx.backend)
        return *grads, dbias if needs_bias else None, None, None, None, None

    def composite_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *attending, bias, slots, segment_ids, _out, _lse, scale, needs_bias = args
        rest = (slots, segment_ids, scale)
        if needs_bias:
            return torch.func.vjp(lambda *x: composite(*x, *rest)[0], *attending, bias)[1](grad)
        grads = torch.func.vjp(lambda *x: composite(*x, bias, *rest)[0], *attending)[1](grad)
        return *grads, grad.new_empty(0)

    call_backward = operator(
        f"{name}_backward(Tensor grad, {tensors}, {_BACK}) -> ({gradients}, Tensor dbias)",
        fake=_backward_fake,
        composite=composite_backward,
    )
    return operator(
        f"{name}({tensors}, {_WHERE}, float scale, str backend) -> (Tensor out, Tensor lse)",
        fake=fake,
        setup=_setup,
        backward=backward,
        check=lambda *args: check_slots(args[count + 1], args[0].shape[0]),
        composite=composite,
    )


_call_window_attention = _define(
    "window_attention", "Tensor q, Tensor k, Tensor v", "Tensor dq, Tensor dk, Tensor dv", lambda q, k, v: (q, k, v)
)
_call_window_attention_qkvpacked = _define(
    "window_attention_qkvpacked", "Tensor qkv", "Tensor dqkv", lambda qkv: qkv.unbind(-3)
)

# ---- What a backend can take: `x` is q or qkv, called `name` ---------------------------------------------------------


def _dtype_reasons(name: str, x: Tensor, windows: Windows) -> list[str]:
    known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return [] if known else [f"{name} must be float32, float16 or bfloat16, not {x.dtype}"]


def _size_reasons(x: Tensor, windows: Windows) -> list[str]:
    reasons = [] if windows.bias is None else _dtype_reasons("bias", windows.bias, windows)
    n, width = windows.shape(x)[1], x.shape[-1]
    if n > 256:
        reasons.append(f"windows must have at most 256 positions, not {n}")
    if not 1 <= width <= 128:
        reasons.append(f"heads must be at most 128 wide, not {width}")
    return reasons


def _triton_reasons(name: str, x: Tensor, windows: Windows) -> list[str]:
    return _dtype_reasons(name, x, windows) + _size_reasons(x, windows)


CUDA_WIDTHS = (32, 64, 72, 96, 128)
"""Widths of heads that the CUDA kernels are compiled for; a head is filled up to the next."""
_EVERY_GPU = 99 * 1024  # bytes of shared memory that a block can have, from compute capability 8.0 on


def _cuda_shared(n: int, width: int) -> int:
    """Bytes of shared memory that the backward needs, as csrc/window_attention_backward.h lays it out."""
    pitch, rows = (next(w for w in CUDA_WIDTHS if w >= width) // 8 | 1) * 8, 64 if n <= 64 else 256
    return 320 * pitch + 7392 + (4 * pitch + 144) * rows


def _cuda_reasons(name: str, x: Tensor, windows: Windows) -> list[str]:
    halves = x.dtype in (torch.float16, torch.bfloat16)
    reasons = [] if halves else [f"{name} must be float16 or bfloat16, not {x.dtype}"]
    reasons += _size_reasons(x, windows)
    if not reasons and x.is_cuda:
        needed = _cuda_shared(windows.shape(x)[1], x.shape[-1])
        if needed > _EVERY_GPU:
            there = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
            if needed > there:
                reasons.append(f"a block must have {needed} bytes of shared memory, not {there}")
    return reasons


def _fits(op: str, reasons: Callable[[str, Tensor, Windows], list[str]]) -> Callable[..., list[str]]:
    """`reasons` as a function of the arguments of `op`."""

    def packed(
        qkv: Tensor, bias: Any = None, *, slots: Any = None, segment_ids: Any = None, scale: Any = None
    ) -> list[str]:
        return reasons("q" if op == "window_attention" else "qkv", qkv, Windows(bias, slots, segment_ids, scale))

    return packed if op != "window_attention" else lambda q, k, v, *rest, **given: packed(q, *rest, **given)


# ---- C++ on CPU, which keeps nothing for the backward ----------------------------------------------------------------


def _ready(windows: Windows) -> Windows:
    """The windows as C++ takes them: contiguous, the bias in float32, segments in int64."""
    bias, segment_ids = windows.bias, windows.segment_ids
    if bias is not None:
        bias = bias.float().contiguous()
    if segment_ids is not None:
        segment_ids = segment_ids.to(torch.int64).contiguous()
    return windows._replace(bias=bias, segment_ids=segment_ids)


def _native(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    windows = _ready(Windows(*args))
    # An empty tensor of slots has no address, which C++ cannot distinguish from windows without slots.
    empty = windows.slots is not None and not windows.slots.numel()
    out = q.new_zeros(q.shape) if empty else torch.empty_like(q, memory_format=torch.contiguous_format)
    if not empty and not torch.ops.d2it_C.window_attention(q, k, v, *windows, out):
        check_slots(windows.slots, q.shape[0])  # raises: the C++ operator only reports that a slot is wrong
    return out, q.new_empty(0, dtype=torch.float32)


def _native_backward(grads: Sequence[Tensor], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """Fills grads (dq, dk, dv) and returns dbias, empty where it is not needed."""
    bias, slots, segment_ids, _out, _lse, scale, needs_bias = args
    windows = _ready(Windows(bias, slots, segment_ids, scale))
    dbias = torch.zeros_like(windows.bias) if needs_bias and windows.bias is not None else None
    if slots is not None and not slots.numel():
        for gradient in grads:
            gradient.zero_()
    elif not torch.ops.d2it_C.window_attention_backward(grad, q, k, v, *windows, *grads, dbias):
        check_slots(slots, q.shape[0])
    return q.new_empty(0) if dbias is None else dbias.to(bias.dtype)


# ---- CUDA C++, which keeps every row's sum for the backward ----------------------------------------------------------


def _unnamed(q: Tensor, slots: Tensor | None) -> Tensor | None:
    return None if slots is None else torch.ones(q.shape[0], dtype=torch.uint8, device=q.device)


_LEAST_SCALE = 1e-6  # over which a bias is a number


def _cuda_ready(q: Tensor, windows: Windows, transposed: bool = False) -> tuple[Tensor, Windows]:
    """q and the windows as CUDA takes them: the bias over the scale, perhaps keys before queries. A scale that is not
    above zero moves into q."""
    scale = windows.factor(q)
    if scale < _LEAST_SCALE:
        q, scale = q * scale, 1.0
    if windows.bias is not None:
        bias = windows.bias.float().mT if transposed else windows.bias.float()
        scaled = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
        windows = windows._replace(bias=torch.mul(bias, 1 / scale, out=scaled))
    return q, _ready(windows._replace(scale=scale))


def _cuda(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    q, windows = _cuda_ready(q, Windows(*args))
    count, n = windows.shape(q)
    out = q.new_empty(q.shape)
    lse = q.new_empty((count, q.shape[-2], n), dtype=torch.float32)
    if q.numel() == 0:
        return out, lse.fill_(math.inf)
    torch.ops.d2it_C.window_attention_saved(q, k, v, *windows, out, lse, _unnamed(q, windows.slots))
    return out, lse


def _cuda_backward(grads: Sequence[Tensor], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Tensor:
    """Fills grads (dq, dk, dv) and returns dbias, empty where it is not needed."""
    bias, slots, segment_ids, out, lse, scale, needs_bias = args
    q, windows = _cuda_ready(q, Windows(bias, slots, segment_ids, scale), transposed=True)
    count, n = windows.shape(q)
    heads, bias_windows = q.shape[-2], 1 if bias is None else bias.shape[0]
    dbias = bias.new_empty(bias.shape) if needs_bias else None
    if q.numel() == 0 or count * n == 0:
        for x in grads:
            x.zero_()
        return q.new_empty(0) if dbias is None else dbias.zero_()
    # A block of every head and bias on every multiprocessor, each with a run of the windows; two times three where
    # windows are small and go in chunks.
    parts, blocks = cdiv(count, bias_windows), num_sms(q)
    if n <= 64:
        parts, blocks = cdiv(parts, min(768 // n, 64)), 6 * blocks
    splits = max(1, min(parts, blocks // (heads * bias_windows)))
    sums = None
    if needs_bias:
        sums = q.new_empty((splits, bias_windows, heads, n, cdiv(n, 32) * 32 + 8), dtype=torch.float32)
    torch.ops.d2it_C.window_attention_saved_backward(
        grad, q, k, v, *windows[:3], out, lse, windows.scale, *grads, sums, dbias, _unnamed(q, slots), splits
    )
    if scale < _LEAST_SCALE:
        grads[0].mul_(scale)
    return q.new_empty(0) if dbias is None else dbias


def _over_qkv(forward: Callable[..., Any], backward: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    """A backend's functions by operator, from those that take q, k and v apart."""

    def apart(grad: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grads = tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
        return *grads, backward(grads, grad, q, *rest)

    def packed(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        dqkv = qkv.new_empty(qkv.shape)
        return dqkv, backward(dqkv.unbind(-3), grad, *qkv.unbind(-3), *rest)

    return {
        "window_attention": forward,
        "window_attention_backward": apart,
        "window_attention_qkvpacked": lambda qkv, *rest: forward(*qkv.unbind(-3), *rest),
        "window_attention_qkvpacked_backward": packed,
    }


for _op in ("window_attention", "window_attention_qkvpacked"):
    register_backend(_op, "reference")
    register_backend(_op, "cpu", _fits(_op, _dtype_reasons), native="window_attention")
    register_backend(_op, "triton", _fits(_op, _triton_reasons))
    register_backend(_op, "cuda", _fits(_op, _cuda_reasons), native="window_attention_saved")
    implement(_op, "triton", f"d2it.kernels.window_attention:{_op}_forward")
    implement(f"{_op}_backward", "triton", f"d2it.kernels.window_attention:{_op}_backward")
register_backend("slots_from_cu_seqlens", "reference")
for _op, _function in _over_qkv(_native, _native_backward).items():
    implement(_op, "cpu", _function, checks_values=not _op.endswith("_backward"))
for _op, _function in _over_qkv(_cuda, _cuda_backward).items():
    implement(_op, "cuda", _function)
