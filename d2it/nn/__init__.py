"""Layers on `d2it.ops`, for any model.

Linear             nn.Linear, faster in float32 on a CPU with AMX
WindowAttention    multi-head attention inside windows, dense or packed, with a learnable bias
shifted_segments   which cells of Swin's shifted windows may attend to each other
swap_swin          a Swin Transformer of timm or transformers computes its attention here
"""

from d2it.nn.linear import Linear
from d2it.nn.swin import swap_swin
from d2it.nn.window_attention import RELATIVE_BIASES, WindowAttention, shifted_segments

__all__ = ["RELATIVE_BIASES", "Linear", "WindowAttention", "shifted_segments", "swap_swin"]
