"""Which attention "auto" is, by what it is asked for and by what is installed."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from d2it.models import attention
from d2it.models.attention import best_attention, why_not

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Of each package, why it does not run here; both run."""
    found: dict[str, list[str]] = {"flash_attn": [], "xformers": []}
    monkeypatch.setattr(attention, "_OF_PACKAGES", found)
    return found


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_on_a_gpu_in_16_bits_the_first_package_that_is_there(
    installed: dict[str, list[str]], dtype: torch.dtype
) -> None:
    assert best_attention("cuda", dtype, 72) == "flash_attn"
    installed["flash_attn"] = ["flash_attn is not installed"]
    assert best_attention("cuda", dtype, 72) == "xformers"
    assert best_attention("cuda", dtype, 72, compiled=True) == "sdpa"
    installed["xformers"] = ["xformers is not installed"]
    assert best_attention("cuda", dtype, 72) == "sdpa"


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "word"),
    [
        ("cpu", BF16, 72, "needs CUDA tensors, not cpu"),
        ("cuda", F32, 72, r"takes float16 and bfloat16 here, not torch\.float32"),
        ("cuda", BF16, 264, "at most 256, not 264"),
        ("cuda", BF16, 36, "a multiple of 8 channels"),
    ],
)
def test_what_no_package_takes(
    installed: dict[str, list[str]], device: str, dtype: torch.dtype, channels: int, word: str
) -> None:
    for name in installed:
        (reason,) = why_not(name, device, dtype, channels)
        assert re.search(word, reason)
    assert best_attention(device, dtype, channels) not in installed


def test_on_a_cpu(installed: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for ours in (True, False):
        monkeypatch.setattr(attention, "_OURS_ON_CPU", ours)
        for tiles in (True, False):
            monkeypatch.setattr(attention, "_HAS_TILES", tiles)
            assert best_attention("cpu", F32, 64) == ("d2it" if ours else "sdpa")
            assert best_attention("cpu", BF16, 64) == ("d2it" if ours and not tiles else "sdpa")
            assert best_attention("cpu", F16, 64) == "sdpa"
        assert best_attention("cpu", F64, 64) == "sdpa"


def test_a_package_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_OF_PACKAGES", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("flash_attn", "cuda", BF16, 64) == ["flash_attn is not installed"]
    monkeypatch.setattr(attention, "_OF_PACKAGES", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    (reason,) = why_not("xformers", "cuda", BF16, 64)
    assert reason == "xformers is installed and cannot be imported: undefined symbol"
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert why_not("xformers", "cuda", BF16, 64) == [reason]  # looked for once
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert why_not("flash_attn", "cuda", BF16, 64) == ["flash_attn needs a GPU of compute capability 8.0, not 7.5"]
