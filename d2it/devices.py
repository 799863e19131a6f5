"""What a device is capable of and what it uses: tensor-core peak, energy, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

# Dense bf16 tensor-core peak in FLOP/s, from the vendors' data sheets; MFU is stated against it.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Returns the device's dense bf16 peak, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def nvml(device: torch.device) -> tuple[Any, Any] | None:
    """Returns NVML and its handle of a GPU, or None where there is no NVML."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


class Energy:
    """The energy counter of a GPU, where NVML has one.

    Args:
        device: any device; only a GPU has a counter.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = nvml(device)

    def joules(self) -> float | None:
        """Returns the joules used since the driver was loaded, or None."""
        if self._nvml is None:
            return None
        library, handle = self._nvml
        try:
            return library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except library.NVMLError:
            self._nvml = None
            return None


def memory_gib(device: torch.device) -> float:
    """Returns the most memory held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory_limit(device: torch.device) -> int:
    """Returns the bytes that a process can hold: those of the GPU, or of the host within the limits of the process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [soft for soft, _ in map(resource.getrlimit, (resource.RLIMIT_AS, resource.RLIMIT_DATA)) if soft > 0]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of the control group: version 2, version 1
        with contextlib.suppress(OSError, ValueError):  # "max", or no such group
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return min(limits)


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that is freed in this process for what is allocated next.

    By default it gives the end of its heap back whenever a few large tensors are freed there, and a training step on a
    CPU then takes thousands of page faults to get it again. Blocks above 32 MiB, glibc's limit, are given back still.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
