"""Operators for any model with windows, regions or ragged tokens.

Entropy and grains (paper 3.1):
    kde_entropy                  entropy of the gray levels of every region
    grain_map                    number of thresholds that an entropy exceeds
    encode_grains                `kde_entropy` and `grain_map` in one pass over the pixels
    neighbor_copy                latents of every grain merged onto the finest grid

Packed tokens (paper 3.2.3):
    plan_tokens                  lays out the cells of fine regions as rows, as a `TokenPlan`
    plan_from_mask               lays out any cells as rows, as a `TokenPlan`
    pack_tokens                  gathers the cells of a plan into rows
    unpack_tokens                puts rows back into their cells

Attention inside windows (paper Eq. 10):
    window_attention             attention of q, k and v inside every window, dense or packed
    window_attention_qkvpacked   the same on one tensor that holds q, k and v
    slots_from_cu_seqlens        slots of ragged windows that lie one after the other
    relative_position_bias       Swin's table of relative positions as a bias

Modulation (DiT, adaLN-Zero):
    adaln_modulate               LayerNorm(x) * (1 + scale) + shift
    gated_residual               x + gate * branch
    gated_residual_modulate      both, one after the other, in one pass
    gelu                         GELU by tanh, which sums the gradient of the bias before it

Backends:
    available_backends           the backends of an operator that this machine can run
    why_not                      why a backend cannot run a call

Every operator takes `backend=None`, which chooses the fastest backend that fits, or the name of a backend, which is
used or raises a `ValueError` with the reasons why it cannot be. `d2it.ops.reference` is the specification in plain
PyTorch, one function of the same name and signature for each operator.
"""

from d2it.ops import reference
from d2it.ops._dispatch import available_backends, why_not
from d2it.ops.gelu import gelu
from d2it.ops.kde_entropy import encode_grains, grain_map, kde_entropy
from d2it.ops.modulate import adaln_modulate, gated_residual, gated_residual_modulate
from d2it.ops.neighbor_copy import neighbor_copy
from d2it.ops.pack_tokens import pack_tokens, unpack_tokens
from d2it.ops.plan import TokenPlan
from d2it.ops.plan_tokens import plan_from_mask, plan_tokens
from d2it.ops.relative_position_bias import relative_position_bias
from d2it.ops.window_attention import slots_from_cu_seqlens, window_attention, window_attention_qkvpacked

__all__ = [
    "TokenPlan",
    "adaln_modulate",
    "available_backends",
    "encode_grains",
    "gated_residual",
    "gated_residual_modulate",
    "gelu",
    "grain_map",
    "kde_entropy",
    "neighbor_copy",
    "pack_tokens",
    "plan_from_mask",
    "plan_tokens",
    "reference",
    "relative_position_bias",
    "slots_from_cu_seqlens",
    "unpack_tokens",
    "why_not",
    "window_attention",
    "window_attention_qkvpacked",
]
