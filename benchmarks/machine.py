"""The machine that is measured: device, versions, commit, power.

Imported first by every benchmark: it makes `d2it` importable from the repository's root.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import platform
import re
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

from revision import ROOT, commit, source_hash

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch

from d2it.devices import nvml


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


@functools.cache
def device_name() -> str:
    if device() == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.partition(':')[2].strip()}"
    return f"CPU {platform.machine()}"


def slug(name: str) -> str:
    """A device's name as a folder: lower case, dashes."""
    name = re.sub(r"\((?:r|tm)\)|@.*", "", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


@functools.cache
def header() -> dict[str, Any]:
    """Device, driver, versions and commit: what a figure means nothing without."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    info = {
        "device": device_name(),
        "small": device() == "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "source": source_hash(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info["cuda"] = torch.version.cuda
        info["driver"] = Power.driver()
        info["sms"] = properties.multi_processor_count
        info["l2_mb"] = round(properties.L2_cache_size / 2**20)
        info["memory_gb"] = round(properties.total_memory / 2**30)
    else:
        info["threads"] = torch.get_num_threads()
    return info


def title() -> str:
    info = header()
    parts = [
        info["device"],
        *(f"{k} {info[k]}" for k in ("driver", "cuda", "torch", "triton", "python") if info.get(k)),
    ]
    return ", ".join([*parts, f"commit {info['commit']}"])


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    return nvml(torch.device(device(), 0))


class Power:
    """Board power and SM clock while something runs, from NVML; empty where there is no driver."""

    PERIOD = 0.01

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @staticmethod
    def driver() -> str | None:
        found = _nvml()
        return str(found[0].nvmlSystemGetDriverVersion()) if found else None

    def _sample(self, library: Any, handle: Any) -> None:
        while not self._stop.is_set():
            try:
                watts = library.nvmlDeviceGetPowerUsage(handle) / 1000
                self._samples.append((watts, library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)))
            except library.NVMLError:
                return
            self._stop.wait(self.PERIOD)

    def __enter__(self) -> Power:
        if found := _nvml():
            self._thread = threading.Thread(target=self._sample, args=found, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def read(self) -> dict[str, float]:
        if not self._samples:
            return {}
        watts, clocks = zip(*self._samples)
        return {"watts": round(statistics.fmean(watts), 1), "sm_mhz": statistics.median(clocks)}
