"""The C++ and CUDA operators, `torch.ops.d2it_C`: loaded once, at first use; or why they are absent."""

import functools
from pathlib import Path

import torch

_LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"


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
    return None


def why_not(op: str, device_type: str) -> list[str]:
    """Returns why `torch.ops.d2it_C.<op>` cannot run on `device_type` ("cpu", "cuda"); empty if it can."""
    if reason := _load():
        return [reason]
    if not hasattr(torch.ops.d2it_C, op):
        return [f"{_LIBRARY.name} is older than {op}: build it again (make build)"]
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"d2it_C::{op}", key):
        return [f"d2it was built without {key} operators: reinstall with D2IT_BUILD={device_type}"]
    return []
