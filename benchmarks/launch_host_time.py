"""Host time of Triton launches, without a GPU: Triton's own way, and what `kernels.launch` keeps of a launcher.

    python benchmarks/launch_host_time.py

Kernels are compiled for sm_90; a stub stands where the driver's call is, so that call is not in the times. Whole
launchers are called as operators call them. Both ways take turns, and the shortest of many is printed; beside it the
time that PyTorch takes to allocate the same tensors, and what is left for a launch without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import torch
from kernel_report.compile import AheadOfTimeDriver
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from d2it.kernels import launch, modulate, modulate_gate, pack_tokens, window_attention


def stub(kernel: Any) -> Callable[..., None]:
    """Stands for the driver's call of a compiled kernel."""
    kernel.module = kernel.function = 1
    return lambda *args: None


def microseconds(*ways: Callable[[], Any], rounds: int = 200, calls: int = 20) -> list[float]:
    """The shortest time of a call of each."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for i, way in enumerate(ways):
            way()
            start = time.perf_counter()
            for _ in range(calls):
                way()
            best[i] = min(best[i], (time.perf_counter() - start) / calls * 1e6)
    return best


def launchers() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Launchers and arguments."""
    channels, heads, width = 1152, 16, 72
    x = torch.zeros((2, 16, channels), dtype=torch.bfloat16)
    shift, scale, gate = torch.zeros((2, 6 * channels)).chunk(6, dim=1)[:3]
    stats = torch.zeros(32, 2)
    index = torch.zeros(32, dtype=torch.int32)
    qkv, slots = torch.zeros((128, 3, heads, width), dtype=torch.bfloat16), torch.zeros((1, 256), dtype=torch.int32)
    bias = torch.zeros((1, heads, 256, 256))
    fused = (x, x, x, stats, x, gate, scale, None, None, 1e-6)
    return {
        "pack_tokens": (pack_tokens.pack_tokens_forward, (x, index, index)),
        "gated_residual forward": (modulate_gate.gated_residual_forward, (x, x, gate, None, None)),
        "adaln_modulate forward": (modulate.adaln_modulate_forward, (x, shift, scale, None, 1e-6)),
        "adaln_modulate backward": (modulate.adaln_modulate_backward, (x, x, stats, scale, None, 1e-6)),
        "gated_residual_modulate backward": (modulate.gated_residual_modulate_backward, fused),
        "window_attention forward, 256 packed": (
            window_attention._qkvpacked_forward,
            (qkv, bias, slots, None, 0.1, "ieee"),
        ),
    }


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(AheadOfTimeDriver((9, 0)))
    CompiledKernel.run = property(stub)
    launch._is_gpu = lambda device: True
    CompiledKernel._init_handles = stub
    print(f"{'launcher':40s} launches   Triton's way      kept  allocation  a launch, us")
    for name, (call, args) in launchers().items():
        tape = launch.Tape(args[0].device)
        call.__wrapped__(tape, *args)
        allocated = [(t.shape, {"dtype": t.dtype, "device": t.device}) for t, _ in tape.allocated]

        def by_triton() -> None:
            call.__wrapped__(launch.Tape(args[0].device), *args)  # noqa: B023 - called here alone

        def allocate() -> None:
            for shape, options in allocated:  # noqa: B023
                torch.empty(shape, **options)

        triton, kept, allocation = microseconds(by_triton, lambda: call(*args), allocate)  # noqa: B023
        count = len(tape.launched)
        print(
            f"{name:40s} {count:8d} {triton:14.1f} {kept:9.1f} {allocation:11.1f} {(kept - allocation) / count:13.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
