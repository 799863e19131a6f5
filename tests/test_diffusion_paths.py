"""Paths and predictions: conversions, losses, and sampling with an exact network on every one."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from d2it.diffusion import (
    FLOW_SCHEDULERS,
    DiffusionConfig,
    GaussianDiffusion,
    LinearDiffusion,
    content_loss,
    grain_weights,
    grained_noise,
    make_diffusion,
    make_scheduler,
    project_to_grains,
    sample_content,
    sample_grain_maps,
)
from d2it.diffusion.process import LEAST
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer
from d2it.training.content import ContentLosses
from d2it.training.grain import GrainLosses

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy of what diffusers does
]

KINDS = [("ddpm", p) for p in ("epsilon", "v", "sample")] + [
    ("linear", p) for p in ("epsilon", "v", "sample", "velocity")
]
GRAINS = torch.randint(0, 2, (24, 4, 6), generator=torch.Generator().manual_seed(0))


def process(path: str, **settings: Any) -> Any:
    return make_diffusion(DiffusionConfig(path=path, **settings), learn_sigma=False)


def times(diffusion: Any, count: int) -> Tensor:
    t = torch.linspace(20, 980, count)
    return t.long() if isinstance(diffusion, GaussianDiffusion) else t


# ---- conversions and losses


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_a_prediction_gives_x0_and_the_noise(path: str, prediction: str) -> None:
    """In closed form: x_t = a x_0 + s eps with a, s of the path."""
    d = process(path, prediction=prediction)
    t = times(d, 9)
    if path == "linear":
        s = t.double() / 1000
        a = 1 - s
    else:
        signal = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)[t]
        a, s = signal.sqrt(), (1 - signal).sqrt()
    a, s = a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    x0, noise = torch.randn(2, 9, 4, 6, 8, dtype=torch.float64)
    xt = d.q_sample(x0, noise, t)
    torch.testing.assert_close(xt, a * x0 + s * noise, rtol=1e-5, atol=1e-5)
    want = {"epsilon": noise, "v": a * noise - s * x0, "sample": x0, "velocity": noise - x0}[prediction]
    target = d.target(x0, noise, t)
    torch.testing.assert_close(target, want, rtol=1e-5, atol=1e-5)
    got = d.predict(target, xt, t)
    torch.testing.assert_close(got[0], x0, rtol=1e-3, atol=1e-3)  # a is 0.007 at the last
    torch.testing.assert_close(got[1], noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("path", "prediction"), KINDS)
@pytest.mark.parametrize("weighting", ["v", "min_snr"])
def test_a_weighted_loss_is_that_of_the_quantity_it_names(path: str, prediction: str, weighting: str) -> None:
    """At one x_t the error of a prediction fixes that of every other; the weights are capped near the ends."""
    d = process(path, prediction=prediction, weighting=weighting)
    t = torch.tensor([150.0, 400.0, 700.0])
    t = t.long() if path == "ddpm" else t
    x0, noise, error = torch.randn(3, 3, 4, 6, 8)
    xt = d.q_sample(x0, noise, t)
    out = d.target(x0, noise, t) + 0.1 * error
    got_x0, got_noise = d.predict(out, xt, t)
    a, s = d.coefficients(t)
    assert min(a.min(), s.min()) > LEAST
    if weighting == "min_snr":
        want = (a / s).square().clamp(max=5) * (got_x0 - x0).square()
    elif path == "linear":
        want = ((got_noise - got_x0) - (noise - x0)).square()
    else:
        want = ((a * got_noise - s * got_x0) - (a * noise - s * x0)).square()
    loss = content_loss(d, out, x0=x0, xt=xt, noise=noise, t=t).loss
    torch.testing.assert_close(loss, want.mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_weights_stay_bounded() -> None:
    for (path, prediction), weighting in itertools.product(KINDS, ("v", "min_snr")):
        d = process(path, prediction=prediction, weighting=weighting)
        t = torch.tensor([0, 999]) if path == "ddpm" else torch.tensor([1.0, 999.0])
        weight = d.loss_weight(t)
        assert weight is None or (weight.min() > 0 and weight.max() <= (1 + LEAST) ** 2 / LEAST**2)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_papers_settings_give_the_papers_loss_bit_for_bit(learn_sigma: bool) -> None:
    """The arithmetic of Eq. 11 written out, from the same random numbers in the same order."""
    torch.manual_seed(3)
    d = make_diffusion(DiffusionConfig(), learn_sigma=learn_sigma)
    x0, noise = (grained_noise(GRAINS, 4) for _ in range(2))
    t = d.sample_timesteps(len(GRAINS))
    xt = d.q_sample(x0, noise, t)
    out = torch.randn(24, 8 if learn_sigma else 4, 8, 12).requires_grad_()
    loss = content_loss(d, out, x0=x0, xt=xt, noise=noise, t=t, grain_map=GRAINS).loss.mean()
    (got,) = torch.autograd.grad(loss, out)

    torch.manual_seed(3)
    assert torch.equal(x0, grained_noise(GRAINS, 4))
    assert torch.equal(noise, grained_noise(GRAINS, 4))
    assert torch.equal(t, torch.randint(1000, (24,)))
    signal = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    a, s = (x.float()[t].view(-1, 1, 1, 1) for x in (signal.sqrt(), (1 - signal).sqrt()))
    assert torch.equal(xt, a * x0 + s * noise)
    weights = grain_weights(GRAINS)
    terms = ((noise - out[:, :4]).square() * weights).mean((1, 2, 3))
    if learn_sigma:
        terms = terms + (GaussianDiffusion().vlb_terms(x0, xt, t, out[:, :4], out[:, 4:]) * weights).mean((1, 2, 3))
    assert torch.equal(loss, terms.mean())
    assert torch.equal(got, torch.autograd.grad(terms.mean(), out)[0])


# ---- timesteps


def test_timesteps_are_drawn_as_the_settings_say() -> None:
    generator = torch.Generator().manual_seed(0)
    for path in ("ddpm", "linear"):
        uniform = process(path).sample_timesteps(20_000, generator=generator).double() / 1000
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
        assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
        normal = process(path, timesteps="logit_normal").sample_timesteps(20_000, generator=generator)
        logits = ((normal.double() + (0.5 if path == "ddpm" else 0)) / 1000).logit()
        assert logits.mean().item() == pytest.approx(0, abs=0.03)
        assert logits.std().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("path", ["ddpm", "linear"])
@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shift_multiplies_the_noise_to_signal_ratio(path: str, shift: float) -> None:
    plain, moved = (
        process(path, shift=value).sample_timesteps(2000, generator=torch.Generator().manual_seed(1))
        for value in (1.0, shift)
    )
    d = process(path)
    inside = (plain > 60) & (plain < 800)
    ratio = {
        name: (s / a).flatten() for name, (a, s) in (("plain", d.coefficients(plain)), ("moved", d.coefficients(moved)))
    }
    torch.testing.assert_close(
        (ratio["moved"] / ratio["plain"])[inside],
        torch.full_like(plain[inside], shift, dtype=torch.float32),
        rtol=0.03,
        atol=0,
    )


# ---- sampling with a network that is exact


class Exact(nn.Module):
    """The posterior mean of a mixture of two Gaussians a code, in any prediction on any path."""

    MEANS, STD, SHARE = (-1.0, 0.6), 0.2, 0.3

    def __init__(self, diffusion: DiffusionConfig) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.process = make_diffusion(diffusion, learn_sigma=False)
        self.config = SimpleNamespace(
            in_channels=2,
            num_classes=0,
            learn_sigma=False,
            grid=(8, 12),
            region_grid=(4, 6),
            num_grains=2,
            code_sizes=(2, 1),
            cells_per_region=2,
            region_tokens=lambda grain_map: 4 * grain_map,
            refines=lambda fraction: True,
            masked=True,
            diffusion=diffusion,
        )
        self.asked = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None, grain_map: Tensor, plan: None) -> Tensor:
        self.asked += 1
        t = t.double() if self.config.diffusion.path == "linear" else t.long()
        a, s = (c.double() for c in self.process.coefficients(t))
        x = x.double()
        variance = a**2 * self.STD**2 + s**2
        means = torch.tensor(self.MEANS, dtype=torch.float64).view(2, 1, 1, 1, 1)
        logits = torch.tensor([self.SHARE, 1 - self.SHARE]).log().view(2, 1, 1, 1, 1) - (x - a * means) ** 2 / (
            2 * variance
        )
        x0 = (logits.softmax(0) * (means + a * self.STD**2 * (x - a * means) / variance)).sum(0)
        prediction = self.config.diffusion.prediction
        noise = torch.where(s > 1e-9, (x - a * x0) / s.clamp(min=1e-9), torch.zeros_like(x))
        return {"epsilon": noise, "sample": x0, "velocity": noise - x0, "v": a * noise - s * x0}[prediction].float()


def draw(path: str, prediction: str, scheduler: str, steps: int = 60, **settings: Any) -> Tensor:
    model = Exact(DiffusionConfig(path=path, prediction=prediction, **settings))
    return sample_content(model, GRAINS, seeds=range(len(GRAINS)), scheduler=scheduler, steps=steps)


@pytest.mark.parametrize(
    ("path", "scheduler"), [("ddpm", "ddpm"), ("ddpm", "ddim"), *(("linear", s) for s in FLOW_SCHEDULERS)]
)
def test_every_prediction_gives_the_same_samples(path: str, scheduler: str) -> None:
    """The same network in other words; at the end the data's distribution, one value a code."""
    samples = {p: draw(path, p, scheduler) for q, p in KINDS if q == path and not (q == "linear" and p == "epsilon")}
    first = next(iter(samples.values()))
    for prediction, other in samples.items():
        torch.testing.assert_close(other, first, rtol=1e-2, atol=1e-2, msg=lambda m, p=prediction: f"{p}: {m}")
    assert torch.equal(project_to_grains(first, GRAINS), first)
    codes = first[(GRAINS == 1).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(first)]
    low = codes < -0.2
    assert low.double().mean().item() == pytest.approx(Exact.SHARE, abs=0.05)
    for part, mean in ((codes[low], -1.0), (codes[~low], 0.6)):
        assert part.mean().item() == pytest.approx(mean, abs=0.05)
        assert part.std().item() == pytest.approx(Exact.STD, rel=0.3)


def test_noise_can_be_predicted_on_the_linear_path() -> None:
    """It starts a thousandth below pure noise, where x_0 still follows from it."""
    torch.testing.assert_close(
        draw("linear", "epsilon", "euler"), draw("linear", "velocity", "euler"), rtol=0.1, atol=0.1
    )


def test_heun_asks_twice_a_step_and_errs_less() -> None:
    exact = draw("linear", "velocity", "heun", 400)
    errors = {name: (draw("linear", "velocity", name, 20) - exact).abs().mean() for name in ("euler", "heun")}
    assert errors["heun"] < 0.3 * errors["euler"]
    model = Exact(DiffusionConfig(path="linear", prediction="velocity"))
    sample_content(model, GRAINS, seeds=range(len(GRAINS)), scheduler="heun", steps=5)
    assert model.asked == 9


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_our_flow_steps_are_those_of_diffusers(name: str, shift: float) -> None:
    """In a chain of four steps; theirs begins its last step elsewhere, at the smallest of its own thousand."""
    torch.testing.assert_close(
        draw("linear", "velocity", name, 50, shift=shift),
        draw("linear", "velocity", f"flow-{name}", 50, shift=shift),
        rtol=0.03,
        atol=0.03,
    )


@pytest.mark.parametrize(
    ("path", "scheduler"), [("ddpm", "ddim"), ("linear", "euler"), ("linear", "heun"), ("linear", "unipc")]
)
def test_a_shifted_chain_ends_in_the_data(path: str, scheduler: str) -> None:
    sample = draw(path, "v", scheduler, 80, shift=2.0)
    assert (sample < -0.2).double().mean().item() == pytest.approx(Exact.SHARE, abs=0.08)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "cosine"}, "diffusion.path must be one of ddpm, linear, got 'cosine'"),
        ({"prediction": "eps"}, "diffusion.prediction must be one of"),
        ({"timesteps": None}, "diffusion.timesteps must be one of"),
        ({"weighting": "snr"}, "diffusion.weighting must be one of"),
        ({"shift": 0}, "diffusion.shift must be positive and finite, got 0"),
        ({"shift": math.inf}, "diffusion.shift must be positive and finite, got inf"),
        ({"shift": "3"}, "diffusion.shift must be positive and finite, got '3'"),
        ({"prediction": "velocity"}, "diffusion.prediction=velocity needs diffusion.path=linear"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


def test_what_does_not_fit_the_path_is_refused() -> None:
    linear = process("linear")
    with pytest.raises(ValueError, match=r"learn_sigma must be False with diffusion\.path=linear"):
        make_diffusion(DiffusionConfig(path="linear"), learn_sigma=True)
    with pytest.raises(ValueError, match="config must be of the ddpm path"):
        GaussianDiffusion(config=DiffusionConfig(path="linear"))
    with pytest.raises(ValueError, match=r"scheduler must be one of euler, heun, .*, got 'ddpm'"):
        make_scheduler("ddpm", linear, 4)
    with pytest.raises(ValueError, match=r"scheduler must be one of ddpm, .*, got 'flow-euler'"):
        make_scheduler("flow-euler", process("ddpm"), 4)
    assert isinstance(linear, LinearDiffusion)
    assert diffusers.__version__


def test_a_model_carries_its_settings(tmp_path) -> None:
    settings = DiffusionConfig(path="linear", prediction="velocity", timesteps="logit_normal", shift=2.0)
    small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 2, "diffusion": settings}
    content = DynamicContentTransformer.from_preset("tiny", image_size=64, learn_sigma=False, **small).eval()
    content.save_pretrained(tmp_path / "content")
    again = DynamicContentTransformer.from_pretrained(tmp_path / "content")
    assert again.config == content.config
    assert again.config.diffusion == settings
    grains, labels = torch.ones(2, 4, 4, dtype=torch.int64), torch.tensor([0, 1])
    told = sample_content(again, grains, labels, seeds=[1, 2], steps=4)
    named = sample_content(
        content, grains, labels, seeds=[1, 2], scheduler="euler", steps=4, diffusion=LinearDiffusion(settings)
    )
    assert torch.equal(told, named)
    maps = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **small).eval()
    assert sample_grain_maps(maps, labels, seeds=[1, 2], scheduler="heun", steps=3).shape == (2, 4, 4)
    assert DiT.from_preset("DiT-S/2").config.diffusion == DiffusionConfig()


@pytest.mark.parametrize(("path", "prediction"), KINDS)
def test_a_training_step_on_every_path(path: str, prediction: str) -> None:
    settings = DiffusionConfig(path, prediction, timesteps="logit_normal", shift=1.5, weighting="v")
    small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 2, "diffusion": settings}
    grains = torch.randint(0, 2, (3, 4, 4))
    batch = {"grain_map": grains, "label": torch.tensor([0, 1, 0]), "capacity": 192}
    batch |= {"mean": torch.randn(3, 4, 8, 8), "std": torch.rand(3, 4, 8, 8)}
    d = make_diffusion(settings, learn_sigma=False)
    content = DynamicContentTransformer.from_preset("tiny", image_size=64, learn_sigma=False, **small)
    maps = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **small)
    for losses in (ContentLosses(content, d, 1.0), GrainLosses(maps, d)):
        loss, _, _ = losses(batch)
        loss.backward()
        assert loss.isfinite()
        assert sum(p.grad.abs().sum() for p in losses.parameters() if p.grad is not None) > 0
