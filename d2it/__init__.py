"""d2it: the Dynamic Diffusion Transformer, built around its kernels.

    from d2it import D2iT, ops

The networks, `nn` and `ops` are imported at first use. `d2it.ops` needs torch and `d2it.kernels`, and imports no other
module of d2it but this one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2it import nn, ops
    from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
    from d2it.sampling import D2iT, Samples

__version__ = "0.2.0"

__all__ = ["D2iT", "DiT", "DynamicContentTransformer", "DynamicGrainTransformer", "DynamicVAE", "Samples", "nn", "ops"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("nn", "ops"):
        return importlib.import_module(f"d2it.{name}")
    room = "d2it.sampling" if name in ("D2iT", "Samples") else "d2it.models"
    return getattr(importlib.import_module(room), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
