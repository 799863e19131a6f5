"""The C++ and CUDA operators, `torch.ops.d2it_C`: loaded once, at first use; or why they are absent."""

import functools
import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"

ARGUMENTS = {
    "neighbor_copy": 3,
    "neighbor_copy_backward": 3,
    "kde_entropy": 11,
    "pack_tokens": 2,
    "unpack_tokens": 5,
    "plan_tokens": 10,
    "adaln_modulate": 5,
    "adaln_modulate_backward": 5,
    "gated_residual": 4,
    "gated_residual_backward": 5,
    "gated_residual_modulate": 7,
    "gated_residual_modulate_backward": 9,
    "window_attention": 8,
    "window_attention_backward": 12,
    "window_attention_saved": 10,
    "window_attention_saved_backward": 17,
    "matmul": 4,
    "gelu": 2,
    "gelu_backward": 5,
    "square_sum": 2,
    "adamw": 15,
}
"""The operators of csrc/registration.cpp that are called from Python, and how many arguments each takes."""


@functools.cache
def _load() -> str | None:
    """Loads the library; returns why it cannot be loaded, or None."""
    if not _LIBRARY.exists():
        return (
            "d2it was installed without its C++ operators (torch or a compiler was missing at the time): "
            "reinstall with D2IT_BUILD=cpu or D2IT_BUILD=cuda and pip's --no-build-isolation"
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"{_LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    for name, count in ARGUMENTS.items():
        op = getattr(torch.ops.d2it_C, name, None)
        if op is None or len(op.default._schema.arguments) != count:
            reason = f"{_LIBRARY} was built from other sources than these ({name} differs): build it again (make build)"
            warnings.warn(f"{reason}; until then the slow reference runs in its place", stacklevel=2)
            return reason
    return None


def why_not(op: str, device_type: str) -> list[str]:
    """Returns why `torch.ops.d2it_C.<op>` cannot run on `device_type` ("cpu", "cuda"); empty if it can."""
    if reason := _load():
        return [reason]
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"d2it_C::{op}", key):
        return [f"d2it was built without {key} operators: reinstall with D2IT_BUILD={device_type}"]
    return []
