"""Host time of a Triton launch, without a GPU: Triton's own way, and by what `kernels.common.launch` keeps.

    python benchmarks/launch_host_time.py

Kernels are compiled for sm_90; a stub stands where the driver's call is, so that call is not in the times. Both ways
take turns, and the shortest of many is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
from kernel_report.compile import AheadOfTimeDriver
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from d2it.kernels import common, modulate, modulate_gate, window_attention

MODULES = [module for name, module in sys.modules.items() if name.startswith("d2it.kernels.") and module is not common]


def stub(kernel: Any) -> Callable[..., None]:
    """Stands for the driver's call of a compiled kernel."""
    kernel.module = kernel.function = 1
    return lambda *args: None


def by_triton(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """A launch as Triton makes it."""
    kernel[(programs,)](*args, **options)


def microseconds(call: Callable[[], Any], rounds: int = 200, calls: int = 20) -> list[float]:
    """The shortest time of a call by each way."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for way, launch in enumerate((by_triton, common.launch)):
            for module in MODULES:
                module.launch = launch
            call()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            best[way] = min(best[way], (time.perf_counter() - start) / calls * 1e6)
    return best


def launchers() -> dict[str, Callable[[], Any]]:
    """Whole launchers as operators call them, allocation included, with the number of launches of each."""
    channels, heads, width = 1152, 16, 72
    x = torch.zeros((2, 16, channels), dtype=torch.bfloat16)
    shift, scale, gate = torch.zeros((2, 6 * channels)).chunk(6, dim=1)[:3]
    stats = torch.zeros(32, 2)
    qkv, slots = torch.zeros((128, 3, heads, width), dtype=torch.bfloat16), torch.zeros((1, 256), dtype=torch.int32)
    bias = torch.zeros((1, heads, 256, 256))
    fused = (x, x, x, stats, x, gate, scale, None, 1e-6)
    return {
        "adaln_modulate forward, 1": lambda: modulate.adaln_modulate_forward(x, shift, scale, None, 1e-6),
        "adaln_modulate backward, 2": lambda: modulate.adaln_modulate_backward(x, x, stats, scale, None, 1e-6),
        "gated_residual forward, 1": lambda: modulate_gate.gated_residual_forward(x, x, gate, None),
        "gated_residual_modulate backward, 3": lambda: modulate.gated_residual_modulate_backward(*fused),
        "window_attention forward, 256 packed, 4": lambda: window_attention.window_attention_qkvpacked_forward(
            qkv, bias, slots, None, 0.1
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(AheadOfTimeDriver((9, 0)))
    CompiledKernel.run = property(stub)
    common._is_gpu = lambda device: True
    CompiledKernel._init_handles = stub
    for name, call in launchers().items():
        before, after = microseconds(call)
        print(f"{name:42s} {before:6.1f} us, kept {after:6.1f} us", flush=True)


if __name__ == "__main__":
    main()
