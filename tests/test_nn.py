"""`d2it.nn`: the layer against the formula in float64, and Swin Transformers of other libraries with it inside."""

import copy
import doctest
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2it import nn, ops

SMALL = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}


def formula(layer: nn.WindowAttention, x: Tensor, allowed: Tensor) -> Tensor:
    """x (W, N, C) float64, allowed (W, N, N): softmax(q k^T / sqrt(D) + bias) v, in float64, head by head."""
    w, heads = layer.window, layer.heads
    parameters = {name: p.double() for name, p in layer.named_parameters()}
    qkv = torch.nn.functional.linear(x, parameters["qkv.weight"], parameters.get("qkv.bias"))
    i = torch.arange(w * w)
    dy, dx = i[:, None] // w - i // w, i[:, None] % w - i % w
    outputs = []
    for h, (q, k, v) in enumerate(zip(*(t.chunk(heads, -1) for t in qkv.chunk(3, -1)))):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if layer.relative_bias == "table":
            scores = scores + parameters["bias"][(dy + w - 1) * (2 * w - 1) + dx + w - 1, h]
        elif layer.relative_bias == "matrix":
            scores = scores + parameters["bias"][0, h]
        outputs.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v)
    return torch.nn.functional.linear(torch.cat(outputs, -1), parameters["proj.weight"], parameters["proj.bias"])


def layer_of(relative_bias: str, window: int = 3, **given: bool) -> nn.WindowAttention:
    torch.manual_seed(0)
    layer = nn.WindowAttention(24, 3, window, relative_bias, **given)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def assert_agrees(got: Tensor, want: Tensor, x: Tensor, layer: torch.nn.Module) -> None:
    """Values, and the gradients of the input and of every parameter."""
    cotangent = torch.randn(want.shape, dtype=torch.float64)
    leaves = (x, *layer.parameters())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(got, leaves, cotangent.to(got.dtype))
    for g, w in zip(grads, torch.autograd.grad(want, leaves, cotangent)):
        torch.testing.assert_close(g, w.to(g.dtype), rtol=1e-4, atol=1e-5 * w.abs().max().item())


@pytest.mark.parametrize("relative_bias", nn.RELATIVE_BIASES)
def test_windows_of_all_cells(relative_bias: str) -> None:
    layer = layer_of(relative_bias, qkv_bias=relative_bias != "none")
    x = torch.randn(8, 9, 24, requires_grad=True)
    segments = torch.randint(0, 3, (4, 9))
    allowed = (segments[:, :, None] == segments[:, None]).repeat(2, 1, 1)
    assert_agrees(layer(x, segments=segments), formula(layer, x.double(), allowed), x, layer)
    # All cells of two images in window order are the same windows.
    assert torch.equal(layer(x.view(2, 36, 24), segments=segments).view(8, 9, 24), layer(x, segments=segments))


def test_packed_windows() -> None:
    layer = layer_of("table")
    plan = ops.plan_from_mask(torch.rand(2, 6, 9) < 0.4, window=3)
    rows = torch.randn(plan.capacity, 24, requires_grad=True)
    there = plan.slots >= 0
    windows = rows.double()[plan.slots.clamp_min(0).long()]
    allowed = there[:, None, :] | ~there[:, :, None]  # a row that is not there sees all, and is not looked at
    want = torch.zeros(plan.capacity, 24, dtype=torch.float64) + layer.proj.bias.double()
    want = want.index_put((plan.slots[there].long(),), formula(layer, windows, allowed)[there])
    assert_agrees(layer(rows, plan.slots), want, rows, layer)


@pytest.mark.parametrize(("grid", "window", "shift"), [((6, 9), 3, 1), ((4, 4), 4, 2), ((14, 7), 7, 3), ((4, 6), 2, 0)])
def test_cells_that_the_roll_brought_together_do_not_attend(grid: tuple[int, int], window: int, shift: int) -> None:
    segments = nn.shifted_segments(grid, window, shift)
    height, width = grid
    assert segments.shape == (height // window * (width // window), window**2)
    for number in range(segments.shape[0]):
        top, left = window * (number // (width // window)), window * (number % (width // window))
        cells = [(top + i // window + shift, left + i % window + shift) for i in range(window**2)]
        wrapped = torch.tensor([(y >= height, x >= width) for y, x in cells])
        expected = (wrapped[:, None] == wrapped[None]).all(-1)
        assert torch.equal(segments[number][:, None] == segments[number][None], expected)


def test_arguments_are_checked() -> None:
    for call, message in [
        (lambda: nn.WindowAttention(10, 3, 7), "dim must be a multiple of heads, got 10 and 3"),
        (
            lambda: nn.WindowAttention(12, 3, 7, "tabel"),
            "relative_bias must be one of matrix, table, none, got 'tabel'",
        ),
        (lambda: nn.shifted_segments((7, 8), 7, 3), r"grid must be multiples of window, got \(7, 8\) and 7"),
        (lambda: nn.shifted_segments((7, 7), 7, 7), "shift must be in 0 ... 6, got 7"),
        (lambda: nn.swap_swin(torch.nn.Linear(2, 2)), "model has no attention of a Swin Transformer v1 .* got Linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="got str"):
        nn.swap_swin("swin_tiny_patch4_window7_224")  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["WindowAttention", "shifted_segments"])
def test_the_example_runs(name: str) -> None:
    found = doctest.DocTestFinder(recurse=False).find(getattr(nn, name), name, globs={})
    assert found[0].examples
    report: list[str] = []
    assert not doctest.DocTestRunner(verbose=False).run(found[0], out=report.append).failed, "".join(report)


# ---- Swin Transformers of other libraries ----------------------------------------------------------------------------


def of_timm(**given: object) -> torch.nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=112, num_classes=5, **SMALL, **given)


def of_transformers(**given: object) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers.models.swin.modeling_swin, "SwinRelativePositionBias"):
        pytest.skip(f"transformers {transformers.__version__} is older than 5")
    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "image_size": 112, "window_size": 7}
    return transformers.SwinModel(transformers.SwinConfig(**sizes, drop_path_rate=0.0, **given))


def result(model: torch.nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


@pytest.mark.parametrize("make", [of_timm, of_transformers])
def test_a_swapped_swin_computes_the_same(make: Callable[..., torch.nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    swapped = nn.swap_swin(copy.deepcopy(model))
    assert swapped.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 112, 112)
    want, got = result(model, x), result(swapped, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.equal(got, want), "nothing was swapped"
    cotangent = torch.randn_like(want)
    pairs = zip(model.named_parameters(), swapped.parameters())
    named = [(name, a, b) for (name, a), b in pairs if not name.startswith(("head", "norm.", "layernorm."))]
    grads = [
        torch.autograd.grad(out, [entry[i] for entry in named], cotangent, allow_unused=True)
        for i, out in ((1, want), (2, got))
    ]
    scale = max(g.abs().max().item() for g in grads[0] if g is not None)
    for (name, _, _), w, g in zip(named, *grads):
        assert (w is None) == (g is None), name
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}")
    # A copy and a pickle are models of their own.
    for other in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        torch.nn.init.zeros_(next(p for n, p in other.named_parameters() if n.endswith("qkv.weight") or "q_proj" in n))
        assert torch.equal(result(swapped, x), got)
        assert not torch.equal(result(other, x), got)


def test_windows_that_are_no_squares() -> None:
    model = of_timm().eval()
    model.set_input_size(img_size=(112, 56), window_size=(7, 14))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 112, 56)
    want = model(x)
    torch.testing.assert_close(nn.swap_swin(model)(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "given"), [(of_timm, "attn_drop_rate"), (of_transformers, "attention_probs_dropout_prob")]
)
def test_attention_dropout_is_refused(make: Callable[..., torch.nn.Module], given: str) -> None:
    model = make(**{given: 0.25})
    before = [module.forward for module in model.modules()]
    with pytest.raises(ValueError, match=f"attention dropout must be 0, got 0.25 in .*{given}"):
        nn.swap_swin(model)
    assert [module.forward for module in model.modules()] == before
