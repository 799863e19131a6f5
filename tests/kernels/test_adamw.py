"""The optimiser's pass against torch.optim.AdamW in float64, on every backend of the machine."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import d2it.kernels
from d2it.kernels.common import COMPILE_CASES, INTERPRET
from d2it.training.adamw import AdamW, why_not
from d2it.training.ema import Ema, PowerEma
from tests.kernels.harness import DEVICE, ROOT

BACKENDS = [name for name in ("cpu", "triton", "torch") if not why_not(name, [torch.zeros(1, device=DEVICE)])]
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
FEW = [(), (1,), (1028,), (5, 7), (33, 31)]
SHAPES = [*FEW, (3,), (1024,), (2049,), (16, 8, 3, 3), (0, 4)]


class Weights(nn.Module):
    """Parameters in the middle of NaN, some at odd addresses, one channels-last; all but every third are `halved`: the
    masters of bfloat16 weights."""

    def __init__(self, shapes: list[tuple[int, ...]], rng: torch.Generator, halved: bool = False) -> None:
        super().__init__()
        self.rooms: list[tuple[Tensor, int, int]] = []
        self.rounded: dict[nn.Parameter, nn.Parameter] = {}
        for i, shape in enumerate(shapes):
            master = self.placed(torch.randn(shape, generator=rng), i)
            self.register_parameter(f"p{i}", master)
            if halved and i % 3:
                self.rounded[master] = self.placed(master.detach().bfloat16(), i + i // 3)

    def placed(self, values: Tensor, place: int) -> nn.Parameter:
        """A parameter of these values, at an odd address where `place` is odd."""
        begin, end, shape = 64 + place % 2, 64 + place % 2 + values.numel(), values.shape
        room = torch.full((values.numel() + 131,), float("nan"), device=DEVICE, dtype=values.dtype)
        inner = room[begin:end].view(shape)
        if len(shape) == 4:
            inner = room[begin:end].view([shape[k] for k in (0, 2, 3, 1)]).permute(0, 3, 1, 2)
        inner.copy_(values)
        self.rooms.append((room, begin, end))
        return nn.Parameter(inner)

    def untouched(self) -> bool:
        """Whether everything around the parameters is still NaN."""
        return all(room[:begin].isnan().all() and room[end:].isnan().all() for room, begin, end in self.rooms)


def gradients(module: nn.Module, step: int, rng: torch.Generator) -> list[Tensor | None]:
    """Of very different sizes; one is missing in every third step, one has other strides than its parameter."""
    found: list[Tensor | None] = []
    for i, p in enumerate(module.parameters()):
        grad = torch.randn(p.shape, generator=rng) * 10.0 ** (i % 5 - 3)
        found.append(None if i == 3 and step % 3 == 1 else grad.to(DEVICE))
    return found


def exact_step(module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None, skipped: bool) -> None:
    """A step of PyTorch's plain formulas."""
    if skipped:
        return
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()


def rounded(x: Tensor) -> Tensor:
    """To bfloat16, as a kernel rounds; the interpreter cuts off."""
    return (x.view(torch.int32) & -(2**16)).view(torch.float32).bfloat16() if INTERPRET else x.bfloat16()


def run(
    backend: str,
    seed: int,
    clip: float | None,
    shapes: list[tuple[int, ...]] = SHAPES,
    steps: int = 4,
    halved: torch.dtype | None = None,
) -> None:
    """Steps of ours, of PyTorch's in float64 and in float32: our error is at most twice that of float32.

    `halved`: some parameters are masters of bfloat16 weights; their gradients are of this dtype, the weights' where it
    is bfloat16, else their own.
    """
    rng = torch.Generator().manual_seed(seed)
    ours = Weights([*shapes, (int(torch.randint(1, 1500, (), generator=rng)),)], rng, halved is not None)
    exact, plain = (
        nn.ParameterList(p.detach().to(kind, copy=True) for p in ours.parameters())
        for kind in (torch.float64, torch.float32)
    )
    optimizer = AdamW(ours.parameters(), **SETTINGS, weights=ours.rounded, backend=backend)
    optimizers = [torch.optim.AdamW(module.parameters(), **SETTINGS, foreach=False) for module in (exact, plain)]
    averages = [[Ema(module, 0.9), PowerEma(module, 0.1)] for module in (ours, exact, plain)]
    for step in range(steps):
        given = gradients(ours, step, rng)
        if halved == torch.bfloat16:
            given = [
                g.bfloat16().float() if g is not None and p in ours.rounded else g
                for g, p in zip(given, ours.parameters())
            ]
        skipped = step == 2
        for module in (ours, exact, plain):
            for p, grad in zip(module.parameters(), given):
                p.grad = None if grad is None else grad.to(p.dtype).clone()
                if (
                    backend == "torch" and grad is not None
                ):  # its fused kernel takes gradients laid out as autograd does
                    p.grad = torch.empty_like(p).copy_(grad)
        for master, weight in ours.rounded.items() if halved == torch.bfloat16 else ():
            weight.grad, master.grad = None if master.grad is None else master.grad.bfloat16(), None
        norm = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None]).norm()
        if skipped:
            of = ours.rounded.get(ours.p4, ours.p4) if halved == torch.bfloat16 else ours.p4
            of.grad[7, 5] = float("inf") if seed % 2 else float("nan")
        found, bad = optimizer.update(step, clip=clip, averages=averages[0])
        assert bad == float(skipped)
        assert found.isfinite() == (not skipped)
        if not skipped:
            torch.testing.assert_close(found.double(), norm, rtol=1e-6, atol=0)
        for module, one, several in zip((exact, plain), optimizers, averages[1:]):
            exact_step(module, one, clip, skipped)
            for average in several:
                average.update(step)
    assert ours.untouched()
    for master, weight in ours.rounded.items():
        assert torch.equal(weight, rounded(master.detach()) if backend == "triton" else master.bfloat16())
    results = []
    for module, one, several in zip((ours, exact, plain), (optimizer, *optimizers), averages):
        named = list(module.parameters())
        moments = [one.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step") for p in named]
        results.append([*named, *moments, *(s for average in several for s in average.shadow.values())])
    for mine, wanted, near in zip(*results):
        scale = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
        error, allowed = ((x.double() - wanted).abs().max() if x.numel() else 0.0 for x in (mine, near))
        assert error <= 2 * allowed + 2 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "clip"), [(0, 0.5), (1, None), (2, 1e6)])
def test_against_float64(backend: str, seed: int, clip: float | None) -> None:
    run(backend, seed, clip)


@pytest.mark.parametrize("halved", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "clip"), [(0, 0.5), (1, None), (2, 1e6)])
def test_masters_against_float64(backend: str, seed: int, clip: float | None, halved: torch.dtype) -> None:
    run(backend, seed, clip, halved=halved)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_exact_but_for_one_rounding(dtype: torch.dtype) -> None:
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        given = [torch.randn(size, generator=rng).to(dtype) for size in (1023, 2049, 7, 1)]
        squares = torch.empty((), dtype=torch.float64)
        torch.ops.d2it_C.square_sum(given, squares)
        exact = torch.cat([each.double() for each in given]).norm()
        assert abs(squares.sqrt() / exact - 1) < 2**-25


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ operators")
def test_a_master_is_updated_as_a_float32_weight_is() -> None:
    """To the bit, by the same gradients, and the norm too."""
    ours, plain = (Weights(SHAPES, torch.Generator().manual_seed(6), halved) for halved in (True, False))
    optimizers = [AdamW(each.parameters(), **SETTINGS, weights=each.rounded) for each in (ours, plain)]
    averages = [Ema(each, 0.9) for each in (ours, plain)]
    rng = torch.Generator().manual_seed(7)
    for step in range(4):
        given = [None if grad is None else grad.bfloat16() for grad in gradients(ours, step, rng)]
        for p, q, grad in zip(ours.parameters(), plain.parameters(), given):
            q.grad = None if grad is None else grad.float()
            weight = ours.rounded.get(p, p)
            weight.grad = None if grad is None else grad.to(weight.dtype)
        found = [one.update(step, clip=0.5, averages=[each]) for one, each in zip(optimizers, averages)]
        assert torch.equal(found[0][0], found[1][0])
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))
    assert all(map(torch.equal, *(each.shadow.values() for each in averages)))


MUTATIONS = {
    "decay of the second moment": ("b_square * beta2 +", "b_square +"),
    "decoupled decay": ("b_parameter * kept", "b_parameter"),
    "bias of the second moment": ("b_root = tl.sqrt(_one_minus_power(b_step * log_beta2))", "b_root = 1.0"),
    "skipping": ("tl.zeros((BLOCK,), tl.float32) == tl.load(found_inf)", "tl.zeros((BLOCK,), tl.float32) < 1.0"),
    "clipping": ("b_gradient *= tl.load(factor)", "b_gradient *= 1.0"),
    "the average takes the old weights": ("b_average + shares[i] * (b_parameter - b_average)", "b_average"),
    "an element is left out": ("o_x, o_x < b_size", "o_x, o_x < b_size - 4"),
    "a weight is another value": ("tl.store(p_weight, b_parameter.to", "tl.store(p_weight, b_mean.to"),
    "a weight is its first element": (
        "tensors, 1, i_tensor, ALIGNED) + o_x",
        "tensors, 1, i_tensor, ALIGNED) + 0 * o_x",
    ),
    "a skipped step writes weights": (
        "b_parameter.to(weights.dtype.element_ty), mask=m_updated",
        "(b_parameter + 1).to(weights.dtype.element_ty), mask=m_x",
    ),
    "every block is the first": ("(tl.program_id(0) - b_first) * BLOCK", "(tl.program_id(0) - b_first) * 0"),
    "the series ends early": ("tl.static_range(6)", "tl.static_range(1)"),
    "squares are not squares": ("tl.sum(b_x * b_x)", "tl.sum(b_x * tl.abs(b_x))"),
}


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton, or its interpreter")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_noticed(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = MUTATIONS[mutation]
    source = (ROOT / "kernels" / "adamw.py").read_text()
    assert source.count(old) == 1
    copied = tmp_path / "adamw.py"
    copied.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutated_adamw", copied)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutated_adamw", module)  # Triton looks a kernel's globals up there
    monkeypatch.setitem(COMPILE_CASES, "mutated_adamw", lambda: iter(()))
    spec.loader.exec_module(module)
    monkeypatch.setattr(d2it.kernels, "adamw", module, raising=False)
    with pytest.raises(AssertionError):
        run("triton", 0, 0.5, FEW, 3, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_state_is_that_of_torch(backend: str) -> None:
    """Either optimiser goes on from the other's state, and the layout of the state is the same."""
    rng = torch.Generator().manual_seed(3)
    shapes = [*FEW, (16, 8, 3, 3)]
    ours, theirs = Weights(shapes, rng), Weights(shapes, rng)
    theirs.load_state_dict(ours.state_dict())
    mine = AdamW(ours.parameters(), **SETTINGS, backend=backend)
    other = torch.optim.AdamW(theirs.parameters(), **SETTINGS, fused=True)
    for step in range(6):
        for p, q, grad in zip(ours.parameters(), theirs.parameters(), gradients(ours, step, rng)):
            p.grad = q.grad = None if grad is None else torch.empty_like(p).copy_(grad)
        mine.update(step)
        other.step()
        if step == 2:
            states = copy.deepcopy((mine.state_dict(), other.state_dict()))
            assert states[0]["state"].keys() == states[1]["state"].keys()
            for one, two in zip(*(state["state"].values() for state in states)):
                assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
                    k: (v.shape, v.dtype) for k, v in two.items()
                }
            assert states[0]["param_groups"] == states[1]["param_groups"]
            mine.load_state_dict(states[1])
            other.load_state_dict(states[0])
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


def test_a_moment_of_another_layout_is_laid_out() -> None:
    """A file holds them contiguous; a channels-last weight has its moments channels-last again."""
    rng = torch.Generator().manual_seed(4)
    weights = Weights([(16, 8, 3, 3)], rng)
    optimizer = AdamW(weights.parameters(), **SETTINGS)
    weights.p0.grad = torch.randn(16, 8, 3, 3, generator=rng).to(DEVICE)
    optimizer.update()
    state = optimizer.state_dict()
    expected = state["state"][0]["exp_avg"].clone()
    state["state"][0]["exp_avg"] = expected.contiguous()
    optimizer.load_state_dict(state)
    found = optimizer.state[weights.p0]["exp_avg"]
    assert found.stride() == weights.p0.stride()
    assert torch.equal(found, expected)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the C++ operators")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    def once(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        rng = torch.Generator().manual_seed(5)
        weights = Weights([(70_001,), (300, 301)], rng)
        optimizer = AdamW(weights.parameters(), **SETTINGS, backend="cpu")
        for p, grad in zip(weights.parameters(), gradients(weights, 0, rng)):
            p.grad = grad
        norm, _ = optimizer.update(clip=1.0)
        return [norm, *weights.parameters()]

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, once(1), once(3)))
    finally:
        torch.set_num_threads(before)


def test_a_backend_that_cannot_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64, device=DEVICE))
    assert AdamW([weight]).backend == "torch"
    with pytest.raises(ValueError, match=r"AdamW has no backend 'tpu'; it has cpu, torch, triton"):
        AdamW([weight], backend="tpu")
    if DEVICE == "cpu" and "cpu" in BACKENDS:
        with pytest.raises(ValueError, match=r"backend='cpu' cannot run AdamW: it updates float32, not float64"):
            AdamW([weight], backend="cpu")
        with pytest.raises(ValueError, match=r"its tensors are contiguous or channels-last"):
            AdamW([nn.Parameter(torch.zeros(4, 3).t())], backend="cpu")


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(4, 3).bfloat16(), torch.zeros(4, 3).bfloat16().t()])
def test_a_weight_that_is_not_its_masters_is_refused(weight: Tensor) -> None:
    master = nn.Parameter(torch.zeros(3, 4, device=DEVICE))
    with pytest.raises(
        ValueError, match=r"weights must be bfloat16 and laid out as their masters, \(3, 4\) at strides"
    ):
        AdamW([master], weights={master: nn.Parameter(weight.to(DEVICE))})
