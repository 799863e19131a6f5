"""The counted step against a step that runs: what its operators read and write, and what it computes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import step_count
import torch
import train_bench
from models import grain_maps, open_gates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2it.models import DynamicContentTransformer
from d2it.models.flops import fine_tokens
from d2it.models.layers import run_blocks
from d2it.nn import linear

COPIES = "gradients of q, k and v into one"
RATES = step_count.assumed_rates("H200")


def size(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


class Bytes(TorchDispatchMode):
    """What each operator reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.of[str(func.overloadpacket)] += size((args, kwargs)) + size(out)
        return out


@pytest.mark.parametrize("preset", ["D2iT-S", "D2iT-XL", "D2iT-XL-3"])
def test_operations_are_those_of_the_model(preset: str) -> None:
    """But for scores that the backward of an attention computes again: seven products where six count."""
    options = train_bench.arguments().parse_args(["--batch-size", "3", "--image-size", "256"])
    (some,) = train_bench.each_batch(options)
    config = step_count.config_of(preset, 256)
    with torch.device("meta"):
        network = DynamicContentTransformer(config)
    parameters = step_count.Parameters.of(network)
    assert parameters.total == sum(p.numel() for p in network.parameters())
    fine = fine_tokens(grain_maps(some, config.region_grid, config.num_grains), config)
    found = step_count.parts(config, 3, parameters, fine)
    counted = sum(part.flops * (6 / 7 if "attention" in part.name else 1) for part in found)
    assert counted == pytest.approx(step_count.step_flops(config, 3, fine), rel=1e-9)
    assert step_count.predicted_ms(found, RATES) == pytest.approx(
        sum(
            step_count.predicted_ms(found, RATES, where) for where in ("dense blocks", "RefineNet", "optimiser", "rest")
        )
    )


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_bytes_are_those_that_the_operators_of_a_block_move(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dense blocks, in float32: GELU, sums of bias gradients, adaLN, copies of the gradients of q, k and v."""
    monkeypatch.setattr(linear, "_sums", lambda x: True)  # as on a GPU, where GELU's output is kept
    config = dataclasses.replace(step_count.config_of("D2iT-S", 128), attention=attention)
    network = DynamicContentTransformer(config)
    open_gates(network)
    trunk, batch = network.multi_grained, 2
    x = torch.randn(batch, config.num_tokens, config.dim, requires_grad=True)
    c = torch.randn(batch, config.dim)
    with Bytes() as moved:
        out = run_blocks(trunk.blocks, trunk.final, x, c)
        out.backward(torch.randn_like(out))
    found = {
        part.name: part
        for part in step_count.parts(config, batch, step_count.Parameters.of(network), itemsize=4)
        if part.where == "dense blocks"
    }
    of_gelu = moved.of["d2it.gelu"] + moved.of["d2it.gelu_backward"]
    assert of_gelu == pytest.approx(found["GELU and its gradient"].floor, rel=0.01)  # and the bias
    ours = moved.of["d2it.gated_residual_modulate"] + moved.of["d2it.gated_residual_modulate_backward"]
    assert ours == pytest.approx(
        found["gate, residual, norm, modulate"].bytes, rel=0.2
    )  # and parameters, few rows here
    assert moved.of["aten.sum"] == pytest.approx(found["gradients of biases"].bytes, rel=0.1)
    copies = found[COPIES].bytes if attention == "sdpa" else 0.0
    of_modulations = 2 * 4 * batch * config.dim * (6 * config.depth + 2)  # the gradients of a modulation's pieces
    assert moved.of["aten.stack"] == copies + of_modulations
    assert (COPIES in found) == (attention == "sdpa")


def test_an_attention_that_writes_one_gradient_saves_its_copy() -> None:
    config = step_count.config_of("D2iT-XL", 256)
    parameters = step_count.Parameters(1, 1, 1, 1)
    names = {
        auto: [part.name for part in step_count.parts(config, 8, parameters, auto=auto)]
        for auto in ("sdpa", "d2it", "flash_attn", "xformers")
    }
    assert (
        names["d2it"] == names["flash_attn"] == names["xformers"] == [name for name in names["sdpa"] if name != COPIES]
    )
    assert COPIES in names["sdpa"]


def test_what_misses_its_floor_is_named() -> None:
    part = step_count.Part("x", "copies", bytes=1.3e9, floor=1e9, why="they need not be")
    inside = step_count.Part("x", "moves", bytes=1.2e9, floor=1e9, why="not said")
    gone = step_count.Part("x", "sums", bytes=1e9, why="another kernel has them")
    text = step_count.table([part, inside, gone], RATES, 1e12)
    assert "1.30" in text
    assert "over 1.25: they need not be" in text
    assert "not said" not in text
    assert "over 1.25: another kernel has them" in text
    assert part.predicted_ms(RATES) == pytest.approx(1.3 / 4.3)
    assert step_count.Part("x", "y", bytes=1.0, flops=1e12, kind="float32").predicted_ms(RATES) == pytest.approx(20.0)
    assert step_count.Part("x", "y", bytes=4.3e9, ms=2.0).predicted_ms(RATES) == 2.0


def test_the_table_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "--at-floor", "--model", "XL", "--batch-size", "128", "--image-size", "256", "--gpu", "H200"]
    assert train_bench.run(train_bench.arguments().parse_args(words)) == 0
    text = capsys.readouterr().out
    assert "D2iT-XL at 256 pixels, batch 128, fill 0.5, weights in bfloat16, on an H200" in text
    assert "window attention" in text
    assert text.count("% MFU\n") == 1
    assert text.rstrip().endswith("of the device's time")


def test_weights_in_bfloat16_are_not_cast() -> None:
    """Autocast's 12 bytes a weight are gone, and two of the optimiser's; its part is at its floor then."""
    config = step_count.config_of("D2iT-XL", 256)
    with torch.device("meta"):
        network = DynamicContentTransformer(config)
    parameters = step_count.Parameters.of(network)
    blocks = config.depth + config.refine_depth
    assert 4 * blocks == 112
    assert parameters.rounded == blocks * 12 * config.dim**2
    assert parameters.rounded <= parameters.matrices <= 1.001 * parameters.rounded
    plain, halved = (
        {(part.where, part.name): part for part in step_count.parts(config, 128, parameters, weights=weights)}
        for weights in ("float32", "bfloat16")
    )
    different = {key for key in plain if plain[key].bytes != halved[key].bytes}
    casts, update = ("rest", "casts of weights and gradients"), ("optimiser", "norm, clipping, AdamW, average")
    assert different == {casts, update}
    assert plain[casts].bytes - halved[casts].bytes == 12 * parameters.rounded
    assert plain[update].bytes - halved[update].bytes == 2 * parameters.rounded
    assert halved[update].over_floor == 1 < plain[update].over_floor
    exact = {part.name: part for part in step_count.parts(config, 128, parameters, itemsize=4)}
    assert casts[1] not in exact
    assert exact[update[1]].over_floor == 1
    added = {(part.where, part.name): part for part in step_count.parts(config, 128, parameters, added=True)}
    assert {key for key in added if added[key].bytes != halved[key].bytes} == {casts, update}
    assert added[casts].bytes - halved[casts].bytes == 6 * parameters.rounded  # read in 2 bytes, written in 4
    assert added[update].bytes - halved[update].bytes == 4 * parameters.rounded  # two passes, two bytes each
    small = DynamicContentTransformer.preset_config("tiny", image_size=64)
    counts = [step_count.launches(small, weights=weights).pytorch for weights in ("float32", "bfloat16")]
    counts.append(step_count.launches(small, added=True).pytorch)
    layers = 4 * (small.depth + small.refine_depth)
    assert counts[0] - counts[1] == 2 * layers  # of weights, and of their gradients
    assert counts[2] - counts[1] == layers


@pytest.mark.parametrize(("attention", "ours"), [("sdpa", 6), ("d2it", 8)])
def test_launches_grow_by_a_block_not_by_the_batch(attention: str, ours: int) -> None:
    """Every dense block adds the same operators; of ours three forward and three backward, and the attention's."""
    found = {}
    for depth in (1, 2, 3):
        config = DynamicContentTransformer.preset_config("tiny", image_size=64, num_classes=5, depth=depth)
        config = dataclasses.replace(config, attention=attention)
        found[depth] = step_count.launches(config)
        assert step_count.launches(config, batch=3) == found[depth]
    blocks = [(found[d + 1].pytorch - found[d].pytorch, found[d + 1].ours - found[d].ours) for d in (1, 2)]
    assert blocks[0] == blocks[1]
    assert blocks[0][1] == ours
    assert 4 + 8 <= blocks[0][0] <= 60  # products of four layers, their gradients, and attention
