"""The attention of an existing Swin Transformer on `d2it.ops`, in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from d2it import ops

M = TypeVar("M", bound=nn.Module)


def swap_swin(model: M) -> M:
    """Lets a Swin Transformer (v1) of timm or transformers compute its window attention with `d2it.ops`.

    Outputs and gradients stay equal but for rounding. Parameters, their names, buffers and hooks stay as they are: the
    state dict, an optimiser made before, compilation and saving work as with the model itself. Only the method
    `forward` of every attention layer is replaced.

    Args:
        model: a model with layers `timm.models.swin_transformer.WindowAttention` (timm 1.0) or
            `transformers.models.swin.modeling_swin.SwinAttention` (transformers 5); changed in place.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: no such layer in the model, or one with dropout of the attention weights, which the operator does
            not have.

    With transformers the attention weights are not returned, as with its own fused attention.

    Example:
        >>> import timm
        >>> from d2it.nn import swap_swin
        >>> model = swap_swin(timm.create_model("swin_tiny_patch4_window7_224"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [(name, module, swap) for name, module in model.named_modules() if (swap := _replacement(module))]
    if not found:
        raise ValueError(
            f"model has no attention of a Swin Transformer v1 of timm 1.0 or transformers 5, got {type(model).__name__}"
        )
    for name, module, _ in found:
        dropout = _dropout(module)
        if dropout:
            raise ValueError(
                f"attention dropout must be 0, got {dropout} in {name}: set attn_drop_rate=0 (timm) or "
                "attention_probs_dropout_prob=0 (transformers)"
            )
    for _, module, forward in found:
        module.forward = partial(forward, module)  # unlike a bound method it can be pickled
    return model


def _timm(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`WindowAttention.forward` of timm: x (W, N, C), mask (nW, N, N) of 0 and -100."""
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
    if self.window_size[0] == self.window_size[1]:
        bias = ops.relative_position_bias(self.relative_position_bias_table, self.window_size[0])
    else:
        bias = self._get_rel_pos_bias()
    out = ops.window_attention_qkvpacked(qkv, bias, segment_ids=_segments(mask), scale=self.scale)
    return self.proj_drop(self.proj(out.flatten(-2)))


def _transformers(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
    """`SwinAttention.forward` of transformers 5: hidden_states (W, N, C), attention_mask (nW, N, N) of 0 and -100."""
    q, k, v = (f(hidden_states).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
    position = self.relative_position_bias
    bias = ops.relative_position_bias(position.relative_position_bias_table, position.window_size[0])
    out = ops.window_attention(q, k, v, bias, segment_ids=_segments(attention_mask), scale=self.scaling)
    return self.o_proj(out.flatten(-2)), None


def _segments(mask: Tensor | None) -> Tensor | None:
    """(nW, N, N) of 0 where two cells of a shifted window see each other -> (nW, N): equal numbers do.

    A cell's number is the first cell that it sees: those that see each other see the same cells.
    """
    return None if mask is None else (mask == 0).int().argmax(-1)


_FORWARDS: dict[str, Callable[..., Any]] = {
    "timm.models.swin_transformer.WindowAttention": _timm,
    "transformers.models.swin.modeling_swin.SwinAttention": _transformers,
}


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """The forward for a layer of one of the known classes, by name: neither package is imported here."""
    kind = type(module)
    forward = _FORWARDS.get(f"{kind.__module__}.{kind.__qualname__}")
    # transformers 4 has a layer of that name around its attention.
    return None if forward is _transformers and not hasattr(module, "q_proj") else forward


def _dropout(module: nn.Module) -> float:
    dropout = getattr(module, "attn_drop", None)  # timm
    return float(dropout.p if isinstance(dropout, nn.Dropout) else getattr(module, "attention_dropout", 0.0))
