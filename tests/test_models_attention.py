"""Which attention "auto" is, by what it is asked for and by what is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2it import ops
from d2it.models import attention
from d2it.models.attention import ON_GPU, best_attention, why_not

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Of each backend, why this machine does not run it; tensors are said to be on an H200 that runs them all."""
    found: dict[str, list[str]] = {name: [] for name in ON_GPU}
    monkeypatch.setattr(attention, "_HERE", found)
    monkeypatch.setitem(ops._dispatch._MACHINE, ("window_attention_qkvpacked", "cuda"), [])
    memory = SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    with FakeTensorMode():
        yield found


def tokens(device: str, dtype: torch.dtype, channels: int = 72, length: int = 256) -> Tensor:
    return torch.empty(2, length, 3, 16, channels, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_on_a_gpu_in_16_bits_the_first_that_is_there(here: dict[str, list[str]], dtype: torch.dtype) -> None:
    qkv = tokens("cuda", dtype)
    assert best_attention(qkv) == best_attention(qkv, compiled=True) == "d2it"
    here["d2it"] = ["it was built without CUDA"]
    assert best_attention(qkv) == "flash_attn"
    here["flash_attn"] = ["flash_attn is not installed"]
    assert best_attention(qkv) == "xformers"
    assert best_attention(qkv, compiled=True) == "sdpa"
    here["xformers"] = ["xformers is not installed"]
    assert best_attention(qkv) == "sdpa"


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "word"),
    [
        ("cpu", BF16, 72, "needs CUDA tensors, not cpu"),
        ("cuda", F32, 72, r"float16 and bfloat16 here, not torch\.float32|float16 or bfloat16, not torch\.float32"),
        ("cuda", BF16, 264, "at most (256|128 wide), not 264"),
    ],
)
def test_what_none_of_them_takes(
    here: dict[str, list[str]], device: str, dtype: torch.dtype, channels: int, word: str
) -> None:
    qkv = tokens(device, dtype, channels)
    for name in here:
        (reason,) = why_not(name, qkv)
        assert re.search(word, reason)
    assert best_attention(qkv) not in ("flash_attn", "xformers")


def test_what_ours_does_not_take(here: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 256 tokens, and on a GPU with less shared memory as many as these."""
    assert why_not("d2it", tokens("cuda", BF16, length=257)) == ["windows must have at most 256 positions, not 257"]
    assert best_attention(tokens("cuda", BF16, length=1024)) == "flash_attn"
    memory = SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    (reason,) = why_not("d2it", tokens("cuda", BF16))
    assert re.fullmatch(r"a block must have \d{6} bytes of shared memory, not 101376", reason)
    assert best_attention(tokens("cuda", BF16)) == "flash_attn"
    assert best_attention(tokens("cuda", BF16, length=64)) == "d2it"


def test_what_the_packages_do_not_take(here: dict[str, list[str]]) -> None:
    for name in ("flash_attn", "xformers"):
        (reason,) = why_not(name, tokens("cuda", BF16, 36))
        assert "a multiple of 8 channels" in reason
    assert best_attention(tokens("cuda", BF16, 36)) == "d2it"


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours in (True, False):
        monkeypatch.setattr(attention, "_OURS_ON_CPU", ours)
        for tiles in (True, False):
            monkeypatch.setattr(attention, "_HAS_TILES", tiles)
            assert best_attention(tokens("cpu", F32, 64)) == ("d2it" if ours else "sdpa")
            assert best_attention(tokens("cpu", BF16, 64)) == ("d2it" if ours and not tiles else "sdpa")
            assert best_attention(tokens("cpu", F16, 64)) == "sdpa"
        assert best_attention(tokens("cpu", F64, 64)) == "sdpa"


def test_a_package_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    of_machine = attention.of_machine
    monkeypatch.setattr(attention, "_HERE", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert of_machine("flash_attn") == ["flash_attn is not installed"]
    monkeypatch.setattr(attention, "_HERE", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(importlib, "import_module", broken)
    (reason,) = of_machine("xformers")
    assert reason == "xformers is installed and cannot be imported: undefined symbol"
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert of_machine("xformers") == [reason]  # looked for once


@pytest.mark.parametrize(
    ("capability", "taken"),
    [((7, 5), ()), ((8, 0), ("d2it", "flash_attn")), ((9, 0), ("d2it", "flash_attn")), ((10, 0), ("flash_attn",))],
)
def test_by_compute_capability(
    capability: tuple[int, int], taken: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_HERE", {})
    monkeypatch.setitem(ops._dispatch._MACHINE, ("window_attention_qkvpacked", "cuda"), [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = {name: attention.of_machine(name) for name in ("d2it", "flash_attn")}
    assert tuple(name for name, reasons in found.items() if not reasons) == taken
    for reasons in found.values():
        assert all(f"{capability[0]}.{capability[1]}" in reason for reason in reasons)
