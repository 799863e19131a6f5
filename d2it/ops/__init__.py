"""The operators of d2it, for any model with windows, regions or ragged tokens.

Every one takes `backend=None`, which chooses, or the name of a backend, which is used or raises with its reasons.
`d2it.ops.reference` is the specification in plain PyTorch.
"""

from d2it.ops import reference
from d2it.ops._dispatch import available_backends, why_not
from d2it.ops.kde_entropy import encode_grains, grain_map, kde_entropy
from d2it.ops.modulate import adaln_modulate, gated_residual
from d2it.ops.neighbor_copy import neighbor_copy
from d2it.ops.pack_tokens import TokenPlan, pack_tokens, plan_tokens, unpack_tokens
from d2it.ops.window_attention import relative_position_bias, window_attention, window_attention_qkvpacked

__all__ = [
    "TokenPlan",
    "adaln_modulate",
    "available_backends",
    "encode_grains",
    "gated_residual",
    "grain_map",
    "kde_entropy",
    "neighbor_copy",
    "pack_tokens",
    "plan_tokens",
    "reference",
    "relative_position_bias",
    "unpack_tokens",
    "why_not",
    "window_attention",
    "window_attention_qkvpacked",
]
