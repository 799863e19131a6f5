"""Global attention of an image's tokens: PyTorch's, this package's or another's, and which of them "auto" is.

What goes in is one tensor, so what comes back is best one gradient. PyTorch's attention returns three, which the
backward of the split joins: a copy, 6 C values a token. FlashAttention-2 writes into one tensor in its own package
(`flash_attn_qkvpacked_func`); xformers does where it finds q, k and v in one, and its `unbind` then joins nothing;
`d2it.ops.window_attention_qkvpacked` always does.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from d2it import ops
from d2it.nn.linear import has_tiles

ATTENTION_BACKENDS = ("auto", "sdpa", "d2it", "flash_attn", "xformers")
PACKAGES = {"flash_attn": "flash_attn", "xformers": "xformers.ops"}
"""In the order in which "auto" tries them on a GPU, with the module that has the attention."""
HALVES = (torch.float16, torch.bfloat16)
MOST_CHANNELS = 256
"""Of a head, in both packages."""

_OURS_ON_CPU = not ops.why_not("window_attention_qkvpacked", "cpu")
_HAS_TILES = has_tiles()
_OF_PACKAGES: dict[str, list[str]] = {}


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Global attention: (B, L, 3, H, D) -> (B, L, H, D).

    "sdpa" is PyTorch's own choice (flash, cuDNN, memory-efficient, or mathematics on CPU); "flash_attn" and "xformers"
    call those packages. "d2it" is `d2it.ops.window_attention_qkvpacked` with an image as its window. "auto" is
    `best_attention`.
    """
    if backend == "auto":
        compiled = torch.compiler.is_compiling()
        backend = best_attention(qkv.device.type, qkv.dtype, qkv.shape[-1], compiled=compiled)
    if backend == "d2it":
        return ops.window_attention_qkvpacked(qkv)
    if backend == "flash_attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(qkv)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention, unbind

        return memory_efficient_attention(*unbind(qkv, 2))  # (B, L, H, D) each
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def best_attention(device: str, dtype: torch.dtype, channels: int, *, compiled: bool = False) -> str:
    """Returns which backend "auto" is: the first whose backward writes one gradient, else "sdpa".

    In 16 bits on a GPU that is "flash_attn", then "xformers" (`why_not`). In float32 on a CPU it is "d2it", and in
    bfloat16 where the CPU has no AMX, by whose tiles PyTorch multiplies: against those "d2it" has not been measured.
    Nor has it on a GPU at these shapes, and is not chosen there.

    Args:
        device: type of the tensors' device.
        dtype: theirs.
        channels: of a head.
        compiled: whether the call is traced by `torch.compile`.
    """
    if device == "cpu" and _OURS_ON_CPU and (dtype == torch.float32 or (dtype == torch.bfloat16 and not _HAS_TILES)):
        return "d2it"
    if device == "cuda":
        for name in PACKAGES:
            if not why_not(name, device, dtype, channels, compiled=compiled):
                return name
    return "sdpa"


def why_not(name: str, device: str, dtype: torch.dtype, channels: int, *, compiled: bool = False) -> list[str]:
    """Returns the reasons why "auto" does not take the attention of a package; arguments as of `best_attention`."""
    reasons = []
    if device != "cuda":
        reasons.append(f"{name} needs CUDA tensors, not {device}")
    if dtype not in HALVES:
        reasons.append(f"{name} takes float16 and bfloat16 here, not {dtype}")
    if channels > MOST_CHANNELS or channels % 8:
        reasons.append(f"a head must have a multiple of 8 channels, at most {MOST_CHANNELS}, not {channels}")
    if name == "xformers" and compiled:
        reasons.append("its unbind looks at the gradients' addresses, which a compiled graph does not have")
    return reasons or of_package(name)


def of_package(name: str) -> list[str]:
    """Returns the reasons why a package does not run on this machine; looked for once."""
    if name not in _OF_PACKAGES:
        _OF_PACKAGES[name] = _look_for(name)
    return _OF_PACKAGES[name]


def _look_for(name: str) -> list[str]:
    if importlib.util.find_spec(name) is None:
        return [f"{name} is not installed"]
    try:
        importlib.import_module(PACKAGES[name])
    except (ImportError, OSError) as error:  # built for another PyTorch, or without CUDA
        return [f"{name} is installed and cannot be imported: {error}"]
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < (8, 0):
        return [f"{name} needs a GPU of compute capability 8.0, not {found[0]}.{found[1]}"]
    return []


def check_attention_backend(name: str) -> None:
    """Raises ValueError where the backend is unknown or its package is not installed."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {name!r}")
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        raise ValueError(f"attention={name!r} needs the package {name}, which is not installed")
    if name == "auto" and torch.cuda.is_available():
        for package in PACKAGES:
            of_package(package)  # found now: a compiled block cannot import
