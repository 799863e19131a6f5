"""The plain DiT against the original's arithmetic, its checkpoints, and the counted multiply-accumulates."""

from __future__ import annotations

import functools
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from d2it import ops
from d2it.diffusion import random_grain_map
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, convert
from d2it.models.flops import FineTokens, all_fine, count_macs, fine_tokens
from d2it.models.layers import Attention, attention

DIM, DEPTH, HEADS, SIDE, PATCH, CLASSES = 16, 2, 2, 4, 2, 3


def original_state(learn_sigma=True):
    """A state dict with the names and shapes of the released checkpoints, at a small size."""
    generator = torch.Generator().manual_seed(0)
    return original_tensors(
        DIM, DEPTH, SIDE, CLASSES, learn_sigma, lambda *shape: torch.randn(*shape, generator=generator) * 0.2
    )


def original_tensors(dim, depth, side, classes, learn_sigma, w):
    """Names and shapes as in facebookresearch/DiT, models.py; `w` makes a tensor of a shape."""
    out = PATCH * PATCH * 4 * (2 if learn_sigma else 1)
    state = {
        "pos_embed": original_positions(side // PATCH, dim)[None],
        "x_embedder.proj.weight": w(dim, 4, PATCH, PATCH),
        "x_embedder.proj.bias": w(dim),
        "t_embedder.mlp.0.weight": w(dim, 256),
        "t_embedder.mlp.0.bias": w(dim),
        "t_embedder.mlp.2.weight": w(dim, dim),
        "t_embedder.mlp.2.bias": w(dim),
        "y_embedder.embedding_table.weight": w(classes + 1, dim),
        "final_layer.linear.weight": w(out, dim),
        "final_layer.linear.bias": w(out),
        "final_layer.adaLN_modulation.1.weight": w(2 * dim, dim),
        "final_layer.adaLN_modulation.1.bias": w(2 * dim),
    }
    for i in range(depth):
        for name, rows, columns in [
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
            ("adaLN_modulation.1", 6 * dim, dim),
        ]:
            state[f"blocks.{i}.{name}.weight"] = w(rows, columns)
            state[f"blocks.{i}.{name}.bias"] = w(rows)
    return state


def original_positions(side, dim):
    """Entry (row, column): sines and cosines of the column, then of the row, frequencies 10000^(-4 i / dim)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    rows = []
    for row in range(side):
        for column in range(side):
            rows.append(torch.cat([f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]))
    return torch.stack(rows).float()


def original_forward(state, x, t, y):
    """The published network, written from its description: convolution, adaLN-Zero blocks, unpatchify."""

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(h, shift, scale):
        return F.layer_norm(h, (DIM,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        block = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(block + "adaLN_modulation.1", c).chunk(6, dim=1)
        b, n, _ = h.shape
        qkv = linear(block + "attn.qkv", modulated(h, shift1, scale1)).reshape(b, n, 3, HEADS, DIM // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(DIM // HEADS)).softmax(-1)
        h = h + gate1[:, None] * linear(block + "attn.proj", (weights @ v).transpose(1, 2).reshape(b, n, DIM))
        hidden = linear(block + "mlp.fc1", modulated(h, shift2, scale2))
        h = h + gate2[:, None] * linear(block + "mlp.fc2", F.gelu(hidden, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale))
    side = SIDE // PATCH
    out = out.reshape(len(x), side, side, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, SIDE, SIDE)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_original_checkpoints(tmp_path, learn_sigma):
    state = original_state(learn_sigma)
    x, t, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([10, 900]), torch.tensor([1, CLASSES])
    expected = original_forward(state, x, t, y)
    model = convert.convert_dit(state, heads=HEADS)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), expected)
    torch.save({"model": {}, "ema": state}, tmp_path / "checkpoint.pt")
    loaded = convert.load_dit(tmp_path / "checkpoint.pt", heads=HEADS)
    assert loaded.config == model.config
    assert loaded.config.learn_sigma == learn_sigma


@pytest.mark.parametrize("image_size", [256, 512])
def test_the_released_sizes_are_our_presets(image_size):
    state = original_tensors(1152, 28, image_size // 8, 1000, True, torch.empty)  # memory that is never touched
    assert convert.convert_dit(state).config == DiT.preset_config("DiT-XL/2", image_size=image_size)


def test_checkpoints_of_something_else(tmp_path):
    state = original_state()
    for change, message in [
        ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "it has blocks.0.attn.q_norm.weight"),
        ({"pos_embed": torch.randn(1, 4, DIM)}, "pos_embed is not"),
        ({"x_embedder.proj.bias": torch.ones(3)}, "of another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.convert_dit({**state, **change}, heads=HEADS)
    with pytest.raises(ValueError, match="heads must be given for a width of 16"):
        convert.convert_dit(state)
    del state["pos_embed"]
    with pytest.raises(ValueError, match="it has no pos_embed"):
        convert.convert_dit(state, heads=HEADS)


@pytest.mark.parametrize("kind", ["text", "empty", "pickle", "fifo", "folder", "missing", "list", "numbers", "shapes"])
def test_a_file_that_is_no_dit_is_one_line(tmp_path, kind):
    """Nothing of what torch says to a developer, such as how to trust the file."""
    path = tmp_path / "x.pt"
    shapes = {
        "x_embedder.proj.weight": torch.zeros(16, 4, 0, 0),
        "pos_embed": torch.zeros(1, 4, 16),
        "final_layer.linear.weight": torch.zeros(32, 16),
        "y_embedder.embedding_table.weight": torch.zeros(4, 16),
        "blocks.0.mlp.fc1.weight": torch.zeros(64, 16),
    }
    saved = {"list": [1], "numbers": dict.fromkeys(shapes, 5), "shapes": shapes}
    said = {
        "fifo": "not a regular file",
        "folder": "a folder, not a file",
        "missing": "No such file or directory",
        "list": "must hold a state dict, got list",
        "numbers": "x_embedder.proj.weight must be a tensor, got int",
        "shapes": r"x_embedder.proj.weight must have 4 dimensions, none of them 0, got \(16, 4, 0, 0\)",
    }
    if kind in ("text", "empty", "pickle"):
        path.write_bytes({"text": b"not a pickle", "empty": b"", "pickle": pickle.dumps(print)}[kind])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in saved:
        torch.save(saved[kind], path)
    with pytest.raises(ValueError, match=said.get(kind, "x.pt cannot be read as weights: ")) as raised:
        convert.load_dit(path)
    assert len(str(raised.value).splitlines()) == 1
    assert "torch.load" not in str(raised.value)


# ---- attention over all tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "sdpa", "d2it"])
@pytest.mark.parametrize("shape", [(2, 70, 3, 2, 24), (1, 300, 3, 1, 16), (3, 1, 3, 2, 8)])
def test_attention_against_float64(name: str, shape: tuple[int, ...]) -> None:
    """Value and gradient: the error is at most four times that of PyTorch's plain formulas in float32."""
    rng = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(*shape[:2], *shape[3:], generator=rng, dtype=torch.float64)

    def plain(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q @ k.mT * shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)

    def of(call, qkv: torch.Tensor) -> list[torch.Tensor]:
        out = call(qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, cotangent.to(out.dtype))]

    rough = exact.detach().float().requires_grad_()
    wanted, allowed = of(plain, exact), of(plain, rough)
    for found, want, near in zip(of(lambda qkv: attention(qkv, name), rough), wanted, allowed):
        error = (found.double() - want).abs().max()
        assert error <= 4 * (near.double() - want).abs().max() + 1e-7 * want.abs().max()


@pytest.mark.skipif("cpu" not in ops.available_backends("window_attention"), reason="needs the C++ operators")
def test_the_gradient_of_q_k_and_v_is_written_in_place() -> None:
    """On a CPU nothing is joined or filled in the backward of dense attention; PyTorch's joins three tensors."""
    joined = {"aten::cat", "aten::stack", "aten::zero_", "aten::copy_", "aten::clone"}
    counted = {}
    for name in ("auto", "sdpa"):
        layer, x = Attention(32, 2, name), torch.randn(2, 20, 32, requires_grad=True)
        out = layer(x)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            out.backward(torch.ones_like(out))
        counted[name] = sum(event.count for event in found.key_averages() if event.key in joined)
    assert counted["auto"] == 0
    assert counted["sdpa"] > 0


# ---- multiply-accumulates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gmac"), [("DiT-XL/2", 118.6), ("DiT-L/2", 80.7), ("DiT-B/2", 23.0), ("DiT-S/2", 6.06)]
)
def test_gmacs_of_dits_paper(name, gmac):
    assert count_macs(DiT.preset_config(name)).total / 1e9 == pytest.approx(gmac, rel=2e-3)


def measured(model, *inputs):
    # PyTorch counts no flash attention on CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


def test_macs_against_torchs_counter():
    t, y = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    dit = DiT.from_preset("tiny", image_size=(64, 96))
    assert measured(dit, torch.randn(3, 4, 8, 12), t, y) == count_macs(dit.config, 3).total
    grain = DynamicGrainTransformer.from_preset("tiny", grid=(4, 6), num_grains=3)
    assert measured(grain, torch.randn(3, 1, 4, 6), t, y) == count_macs(grain.config, 3).total
    content = DynamicContentTransformer.from_preset("tiny", image_size=(64, 96))
    x, grains = torch.randn(3, 4, 8, 12), torch.ones(3, 4, 6, dtype=torch.long)
    assert measured(content, x, t, y, grains) == count_macs(content.config, 3).total
    content.forward, asked = functools.partial(content.forward, refine=False), content.forward
    assert measured(content, x, t, y, grains) == count_macs(content.config, 3).dense
    content.forward = asked
    three = DynamicContentTransformer.from_preset("tiny", image_size=(64, 128), downsampling=(8, 16, 32))
    x, grains = torch.randn(3, 4, 8, 16), torch.randint(0, 3, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    fine = fine_tokens(grains, three.config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        three(x, t, y, grains, capacity=fine.rows)
    # PyTorch's counter sees the shapes of the windows: all of their positions, not the tokens in them.
    positions = 3 * 8 * 16 * three.config.window**2 - fine.pairs
    unfilled = positions * three.config.refine_depth * 2 * three.config.dim
    assert counter.get_total_flops() / 2 - unfilled == count_macs(three.config, 3, fine).total
    x, grains = torch.randn(3, 4, 8, 12), torch.ones(3, 4, 6, dtype=torch.long)
    content.config.masked = True
    assert measured(content, x, t, y, 0 * grains) == count_macs(content.config, 3, FineTokens(0, 0)).total


def test_three_grains_cost_less_than_dit():
    """At the shares of its configuration: half of the regions at 16 pixels or finer, a quarter at 8."""
    config = DynamicContentTransformer.preset_config("D2iT-XL-3")
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    maps = random_grain_map(config.region_grid, (0.5, 0.25), 3, generator=generators)
    fine = fine_tokens(maps, config)
    assert fine.rows == 64 * (16 * 4 + 16 * 16)
    gmac = count_macs(config, 64, fine).total / 64e9
    assert gmac == pytest.approx(49.7, abs=0.1)
    assert gmac < 0.43 * count_macs(DiT.preset_config("DiT-XL/2")).total / 1e9


@pytest.mark.parametrize("packed", [True, False])
def test_flop_formulas_of_window_attention(packed):
    """Two products forward, five backward, over every slot of every window."""
    windows, n, heads, width = 3, 16, 2, 8
    rows = (windows * n,) if packed else (windows, n)
    with torch.device("meta"):  # the operators' shapes, whatever backends this machine has
        qkv = torch.empty(*rows, 3, heads, width, requires_grad=True)
        slots = torch.empty(windows, n, dtype=torch.int32) if packed else None
        cotangent = torch.empty(*rows, heads, width)
    ops_of = torch.ops.d2it
    for call in (
        lambda: ops_of.window_attention_qkvpacked(qkv, None, slots, None, 1.0, "triton"),
        lambda: ops_of.window_attention(*qkv.unbind(-3), None, slots, None, 1.0, "triton"),
    ):
        with FlopCounterMode(display=False) as counter:
            out, _ = call()
            out.backward(cotangent)
        assert counter.get_total_flops() == (2 + 5) * 2 * windows * heads * n * n * width


@pytest.mark.parametrize("window", [8, 4, 2])
def test_tokens_of_codes_and_their_pairs(window):
    config = DynamicContentTransformer.preset_config(
        "tiny", image_size=(64, 128), downsampling=(4, 8, 32), window=window
    )
    grains = torch.randint(0, 3, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    rows = pairs = 0
    for image in grains:
        for i in range(0, 16, window):
            for j in range(0, 32, window):
                tokens = 0
                for y in range(i, i + window):
                    for x in range(j, j + window):
                        grain = int(image[y // 8, x // 8])
                        size = (8, 2, 1)[grain]
                        tokens += grain > 0 and y % size == 0 and x % size == 0
                rows, pairs = rows + tokens, pairs + tokens**2
    assert fine_tokens(grains, config) == (rows, pairs)
    assert config.region_tokens(grains).sum() == rows
    assert fine_tokens(torch.full_like(grains, 2), config) == all_fine(config, 3)


def test_fine_tokens_and_their_pairs():
    config = DynamicContentTransformer.preset_config("tiny", image_size=(64, 96))
    grains = torch.randint(0, 2, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    cells = grains.repeat_interleave(2, 1).repeat_interleave(2, 2)
    rows = pairs = 0
    for image in cells:
        for i in range(0, 8, 4):
            for j in range(0, 12, 4):
                tokens = int(image[i : i + 4, j : j + 4].sum())
                rows, pairs = rows + tokens, pairs + tokens**2
    assert fine_tokens(grains, config) == (rows, pairs)
    assert fine_tokens(torch.ones_like(grains), config) == all_fine(config, 3)
    few = count_macs(config, 3, fine_tokens(grains, config))
    none, full = count_macs(config, 3, FineTokens(0, 0)), count_macs(config, 3)
    assert none.dense == few.dense == full.dense
    assert none.refine < few.refine < full.refine
