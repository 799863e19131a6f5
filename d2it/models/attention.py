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
"""With the module that has the attention."""
ON_GPU = ("d2it", *PACKAGES)
"""In the order in which "auto" tries them there; "sdpa" is what is left."""
HALVES = (torch.float16, torch.bfloat16)
MOST_CHANNELS = 256
"""Of a head, in both packages."""

_OURS = "window_attention_qkvpacked"
_OURS_ON_CPU = not ops.why_not(_OURS, "cpu")
_HAS_TILES = has_tiles()
_HERE: dict[str, list[str]] = {}


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Global attention: (B, L, 3, H, D) -> (B, L, H, D).

    "sdpa" is PyTorch's own choice (flash, cuDNN, memory-efficient, or mathematics on CPU); "flash_attn" and "xformers"
    call those packages. "d2it" is `d2it.ops.window_attention_qkvpacked` with an image as its window. "auto" is
    `best_attention`.
    """
    if backend == "auto":
        backend = best_attention(qkv, compiled=torch.compiler.is_compiling())
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


def best_attention(qkv: Tensor, *, compiled: bool = False) -> str:
    """Returns which backend "auto" is: the first whose backward writes one gradient, else "sdpa".

    In 16 bits on a GPU that is "d2it" in CUDA C++, for up to 256 tokens, then "flash_attn", then "xformers"
    (`why_not`): an order by count and not by measurement, which docs/scaling.md has. In float32 on a CPU it is "d2it",
    and in bfloat16 where the CPU has no AMX, by whose tiles PyTorch multiplies: against those "d2it" has not been
    measured.

    Args:
        qkv: (B, L, 3, H, D).
        compiled: whether the call is traced by `torch.compile`.
    """
    device, dtype = qkv.device.type, qkv.dtype
    if device == "cpu" and _OURS_ON_CPU and (dtype == torch.float32 or (dtype == torch.bfloat16 and not _HAS_TILES)):
        return "d2it"
    if device == "cuda":
        for name in ON_GPU:
            if not why_not(name, qkv, compiled=compiled):
                return name
    return "sdpa"


def why_not(name: str, qkv: Tensor, *, compiled: bool = False) -> list[str]:
    """Returns the reasons why "auto" does not take a backend of `ON_GPU`; arguments as of `best_attention`."""
    if qkv.device.type != "cuda":
        return [f"{name} needs CUDA tensors, not {qkv.device.type}"]
    if name == "d2it":
        return of_machine(name) or ops.why_not(_OURS, "cuda", qkv)
    reasons, channels = [], qkv.shape[-1]
    if qkv.dtype not in HALVES:
        reasons.append(f"{name} takes float16 and bfloat16 here, not {qkv.dtype}")
    if channels > MOST_CHANNELS or channels % 8:
        reasons.append(f"a head must have a multiple of 8 channels, at most {MOST_CHANNELS}, not {channels}")
    if name == "xformers" and compiled:
        reasons.append("its unbind looks at the gradients' addresses, which a compiled graph does not have")
    return reasons or of_machine(name)


def of_machine(name: str) -> list[str]:
    """Returns the reasons why a backend of `ON_GPU` is not taken on this machine; looked for once."""
    if name not in _HERE:
        _HERE[name] = _look_for(name)
    return _HERE[name]


def _look_for(name: str) -> list[str]:
    if name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            return [f"{name} is not installed"]
        try:
            importlib.import_module(PACKAGES[name])
        except (ImportError, OSError) as error:  # built for another PyTorch, or without CUDA
            return [f"{name} is installed and cannot be imported: {error}"]
    elif reasons := ops.why_not(_OURS, "cuda"):
        return reasons
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return [f"{name} needs a GPU of compute capability 8.0, not {major}.{minor}"]
        if name == "d2it" and major > 9:
            return [f"it is counted for compute capability 8.0 to 9.0, not for {major}.{minor}"]
    return []


def check_attention_backend(name: str) -> None:
    """Raises ValueError where the backend is unknown or its package is not installed."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_BACKENDS)}, got {name!r}")
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        raise ValueError(f"attention={name!r} needs the package {name}, which is not installed")
    if name == "auto" and torch.cuda.is_available():
        for backend in ON_GPU:
            of_machine(backend)  # found now: a compiled block cannot import
