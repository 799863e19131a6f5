"""Sampling: every scheduler reaches a known distribution, and the state stays grained on the way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from d2it.diffusion import (
    GRAIN_SCHEDULERS,
    SCHEDULERS,
    DiffusionConfig,
    GaussianDiffusion,
    Guidance,
    make_scheduler,
    project_to_grains,
    sample_content,
    sample_grain_maps,
    sampling,
)
from d2it.diffusion.solvers import draw_noise, make_generators
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer
from d2it.nn import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),  # numpy of what diffusers does
]

MEAN, STD = 0.5, 0.3


class Known(nn.Module):
    """The exact noise prediction for data N(mean, STD^2), code by code; `mean` may depend on the label."""

    def __init__(self, learn_sigma=False, v=0.0, means=(MEAN, 0.0)):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.v = v
        self.means = torch.tensor(means)
        self.plans = 0
        self.config = SimpleNamespace(
            in_channels=4,
            num_classes=len(means) - 1,
            class_dropout_prob=0.1,
            learn_sigma=learn_sigma,
            grid=(8, 12),
            region_grid=(4, 6),
            num_grains=2,
            code_sizes=(2, 1),
            cells_per_region=2,
            region_tokens=lambda grain_map: 4 * grain_map,
            refines=lambda fraction: True,
            min_grain=1,
            window=4,
            masked=False,
            diffusion=DiffusionConfig(),
        )
        signal = GaussianDiffusion().tables["sqrt_alphas_cumprod"].double()
        self.register_buffer("signal", signal)

    def make_plan(self, grain_map, capacity=None):
        self.plans += 1
        assert capacity == 4 * int(grain_map.sum())
        return ("plan", grain_map.shape[0])

    def forward(self, x, t, y, grain_map=None, plan=None):
        assert plan == ("plan", x.shape[0])
        # Between whole timesteps (Euler's own) the logarithm of the signal is near enough to linear.
        low = t.long()
        a = (
            torch.lerp(self.signal[low], self.signal[(low + 1).clamp(max=999)], t.double() - low)
            .float()
            .view(-1, 1, 1, 1)
        )
        mean = self.means[y].view(-1, 1, 1, 1)
        noise = (1 - a**2).sqrt() * (x - a * mean) / (a**2 * STD**2 + 1 - a**2)
        # What a network does inside a coarse code: its cells disagree, their mean is right.
        checker = torch.ones(8, 12)
        checker[::2, ::2] = checker[1::2, 1::2] = -1
        noise = noise + 0.5 * checker * (grain_map == 0).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
        return torch.cat([noise, torch.full_like(x, self.v)], 1) if self.config.learn_sigma else noise


def cells_of(grains, grain):
    return (grains == grain).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 4, -1, -1)


@pytest.mark.parametrize(("name", "learn_sigma"), [*((n, False) for n in SCHEDULERS), ("ddpm", True), ("ddim", True)])
def test_schedulers_sample_the_known_distribution(name, learn_sigma):
    batch = 48
    grains = torch.randint(0, 2, (batch, 4, 6), generator=torch.Generator().manual_seed(0))
    model = Known(learn_sigma, v=-1.0)
    states = []
    out = sample_content(
        model,
        grains,
        torch.zeros(batch, dtype=torch.long),
        seeds=range(batch),
        scheduler=name,
        steps=100,
        callback=lambda i, t, x: states.append(x),
    )
    assert len(states) >= 100
    for state in states:
        assert torch.equal(project_to_grains(state, grains), state), "the state left its codes"
    # Averaging the four draws of a coarse code would shrink its noise; 100 steps lose up to a tenth of the spread.
    for grain in (0, 1):
        sample = out[cells_of(grains, grain)]
        assert sample.mean().item() == pytest.approx(MEAN, abs=0.03)
        assert sample.std().item() == pytest.approx(STD, rel=0.12)
    assert model.plans == 1


@pytest.mark.parametrize(
    ("name", "steps"), [*((n, s) for n in SCHEDULERS for s in (1, 7)), *((n, 1000) for n in ("sde-dpm++", "unipc"))]
)
def test_any_number_of_steps(name, steps):
    seen = []
    model = Known()
    model.register_forward_pre_hook(lambda m, args: seen.append(float(args[1][0])))
    grains = torch.zeros(1, 4, 6, dtype=torch.long)
    out = sample_content(model, grains, torch.zeros(1, dtype=torch.long), seeds=[0], scheduler=name, steps=steps)
    assert out.isfinite().all()
    assert seen[0] == 999
    assert len(seen) == len(set(seen)) or name in ("heun", "pndm", "dpm2-a")  # which look twice


def test_learned_range_reaches_both_bounds():
    """With exact predictions the upper variance overshoots what the lower one undershoots."""
    batch = 64
    grains = torch.zeros(batch, 4, 6, dtype=torch.long)
    spread = []
    for v in (-1.0, 1.0):
        out = sample_content(
            Known(True, v=v), grains, torch.zeros(batch, dtype=torch.long), seeds=range(batch), steps=10
        )
        spread.append(out.std().item())
    assert spread[0] < STD < spread[1]


def test_guidance_and_its_plans():
    batch = 16
    grains = torch.ones(batch, 4, 6, dtype=torch.long)
    labels = torch.zeros(batch, dtype=torch.long)

    def run(guidance):
        model = Known()
        out = sample_content(model, grains, labels, seeds=range(batch), scheduler="ddim", steps=50, guidance=guidance)
        return out.mean(dim=(0, 2, 3)), model.plans

    plain, plans = run(None)
    assert plans == 1
    guided, plans = run(Guidance(2.0))
    assert plans == 2
    assert (guided > plain + 0.3).all()  # away from the null's mean of 0, beyond the label's
    some, _ = run(Guidance(2.0, channels=3))
    torch.testing.assert_close(some[:3], guided[:3])
    torch.testing.assert_close(some[3], plain[3])
    never, _ = run(Guidance(2.0, "interval", interval=(0.0, 0.0)))
    assert (never - plain).abs().max() < 0.05


def test_a_weaker_model_guides_with_the_plans_of_the_model():
    """Between two normals of one deviation a guided step is that of the normal at mean_0 + w (mean_1 - mean_0)."""
    batch = 32
    grains, labels = torch.ones(batch, 4, 6, dtype=torch.long), torch.zeros(batch, dtype=torch.long)

    def run(model, weaker, **options):
        options = {"guide": weaker, "guidance": Guidance(3.0), "scheduler": "ddim", "steps": 50, **options}
        return sample_content(model, grains, labels, seeds=range(batch), **options)

    model, weaker = Known(means=(0.6, 0.0)), Known(means=(0.4, 0.0))
    out = run(model, weaker)
    torch.testing.assert_close(out, run(Known(means=(1.0, 0.0)), None, guidance=None), rtol=0, atol=2e-3)
    assert (model.plans, weaker.plans) == (1, 0)
    first = run(model, weaker, guidance=Guidance(3.0, channels=1))
    torch.testing.assert_close(first[:, :1], out[:, :1])
    torch.testing.assert_close(first[:, 1:], run(model, None, guidance=None)[:, 1:])
    model, weaker = Known(means=(0.6, 0.0)), Known(means=(0.4, 0.0))
    weaker.config.window = 2
    torch.testing.assert_close(run(model, weaker), out)
    assert (model.plans, weaker.plans) == (1, 1)


@pytest.mark.parametrize("kind", [DynamicContentTransformer, DiT])
def test_a_model_that_guides_itself_changes_nothing(kind):
    model = make(kind, image_size=64, learn_sigma=True)
    grains = torch.randint(2, (2, 4, 4)) if kind is DynamicContentTransformer else None
    arguments = {"grain_map": grains, "labels": torch.tensor([0, 2]), "seeds": [1, 2], "steps": 3}
    guided = sample_content(model, **arguments, guidance=Guidance(4.0), guide=model)
    torch.testing.assert_close(guided, sample_content(model, **arguments))
    wider = kind.from_preset("tiny", image_size=64, num_classes=3, dim=64, heads=2, depth=1, learn_sigma=False).eval()
    other = sample_content(model, **arguments, guidance=Guidance(4.0), guide=wider)
    assert (other - guided).abs().max() > 0.01


def test_a_weaker_model_guides_without_classes():
    settings = {"image_size": 64, "dim": 32, "heads": 2, "depth": 1, "num_classes": 0}
    model, weaker = (DynamicContentTransformer.from_preset("tiny", **settings).eval() for _ in range(2))
    with torch.no_grad():
        for p in weaker.parameters():
            p.add_(0.1 * torch.randn_like(p))
    grains, options = torch.ones(1, 4, 4, dtype=torch.long), {"seeds": [1], "steps": 2}
    plain = sample_content(model, grains, **options)
    assert not torch.equal(plain, sample_content(model, grains, **options, guide=weaker, guidance=Guidance(2.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 4}, "guide must have the num_classes of the model, 3, got 4"),
        ({"image_size": 128}, r"guide must have the image_size of the model, \(64, 64\), got \(128, 128\)"),
        ({"downsampling": (8, 32)}, r"guide must have the downsampling of the model, \(8, 16\), got \(8, 32\)"),
        ({"in_channels": 8}, "guide must have the in_channels of the model, 4, got 8"),
        (
            {"diffusion": {"prediction": "v"}},
            "guide must have the diffusion.prediction of the model, 'epsilon', got 'v'",
        ),
        ({"diffusion": {"path": "linear"}, "learn_sigma": False}, "guide must have the diffusion.path of the model"),
        ({"diffusion": {"shift": 2.0}}, "guide must have the diffusion.shift of the model, 1.0, got 2.0"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_a_guide_that_does_not_fit_is_refused_by_name(settings, message):
    sizes = {"image_size": 64, "dim": 32, "heads": 2, "depth": 1, "num_classes": 3}
    model = DynamicContentTransformer.from_preset("tiny", **sizes)
    guide = DynamicContentTransformer.from_preset("tiny", **{**sizes, **settings})
    arguments = {"labels": torch.tensor([0]), "seeds": [1], "guidance": Guidance(2.0)}
    with pytest.raises(ValueError, match=message):
        sample_content(model, torch.ones(1, 4, 4, dtype=torch.long), **arguments, guide=guide)
    plain = DiT.from_preset("tiny", **sizes)
    with pytest.raises(ValueError, match="guide must be a DynamicContentTransformer as the model is, got DiT"):
        sample_content(model, torch.ones(1, 4, 4, dtype=torch.long), **arguments, guide=plain)


def make(cls, **settings):
    model = cls.from_preset("tiny", dim=32, heads=2, depth=2, num_classes=3, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.mark.parametrize("name", ["ddpm", "sde-dpm++", "ddim"])
def test_a_sample_does_not_depend_on_its_batch(name):
    model = make(DynamicContentTransformer, image_size=64)
    grains = torch.randint(0, 2, (4, 4, 4), generator=torch.Generator().manual_seed(0))
    labels, seeds = torch.tensor([0, 1, 2, 3]), [11, 12, 13, 14]
    options = {"scheduler": name, "steps": 4, "guidance": Guidance(1.5)}
    together = sample_content(model, grains, labels, seeds=seeds, **options)
    for i in range(4):
        alone = sample_content(model, grains[i : i + 1], labels[i : i + 1], seeds=seeds[i : i + 1], **options)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    other = sample_content(model, grains, labels, seeds=[1, 2, 3, 4], **options)
    assert not torch.allclose(other, together, atol=0.1)


def test_plain_dit_and_packed_and_masked():
    dit = make(DiT, image_size=64)
    out = sample_content(dit, labels=torch.tensor([0, 1]), seeds=[1, 2], scheduler="dpm++", steps=4)
    assert out.shape == (2, 4, 8, 8)
    assert len(out[0, 0].unique()) == 64
    model = make(DynamicContentTransformer, image_size=64)
    grains = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    arguments = {"labels": torch.tensor([0, 1]), "seeds": [1, 2], "steps": 3, "guidance": Guidance(2.0)}
    packed = sample_content(model, grains, **arguments)
    model.config.masked = True
    torch.testing.assert_close(sample_content(model, grains, **arguments), packed, rtol=1e-4, atol=1e-4)


def test_half_precision_follows_float32():
    model = make(DynamicContentTransformer, image_size=64)
    grains = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    arguments = {"labels": torch.tensor([0, 1]), "seeds": [1, 2], "steps": 3, "scheduler": "ddim"}
    exact = sample_content(model, grains, **arguments)
    for out in (
        sample_content(model, grains, autocast=torch.bfloat16, **arguments),
        sample_content(model.bfloat16(), grains, **arguments),
    ):
        assert out.dtype == torch.float32
        assert (out - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize(("name", "learned"), [("ddpm", False), ("ddpm", True), ("ddim", False)])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_ddpm_and_ddim_step_as_diffusers_do(name, learned, prediction, steps):
    ours = make_scheduler(name, GaussianDiffusion(), steps, prediction=prediction, learned_range=learned)
    settings = {"beta_start": 1e-4, "beta_end": 2e-2, "clip_sample": False, "prediction_type": prediction}
    if name == "ddpm":
        variance = "learned_range" if learned else "fixed_small"
        theirs = diffusers.DDPMScheduler(timestep_spacing="linspace", variance_type=variance, **settings)
    else:
        theirs = diffusers.DDIMScheduler(timestep_spacing="trailing", **settings)
    theirs.set_timesteps(steps)
    assert ours.timesteps == theirs.timesteps.tolist()
    for i in {0, steps // 2, steps - 1}:
        x, out = torch.randn(2, 4, 3, 5), torch.rand(2, 8 if learned else 4, 3, 5) * 2 - 1
        noise = draw_noise(ours, i, x, make_generators([3, 4]))
        wanted = theirs.step(out, theirs.timesteps[i], x, generator=make_generators([3, 4])).prev_sample
        # 1e-5 of 157, by which x_0 is divided at t = 999; theirs computes the schedule in float32.
        torch.testing.assert_close(ours.step(out, torch.tensor(i), x, noise)[0], wanted, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "heun"])
def test_a_step_is_captured_once_and_replayed(name, monkeypatch):
    """A trace holds what the host had at the first step, as a CUDA graph does: later steps are right all the same."""
    traces = []

    def traced(run, *inputs):
        traces.append(make_fx(run, _error_on_data_dependent_ops=False)(*inputs))  # the operators check on a CPU
        return traces[-1]

    monkeypatch.setattr(sampling, "capture", traced)
    # Layers have C++ of their own on a CPU, which rounds otherwise and which a trace does not hold.
    monkeypatch.setattr(linear, "computed_only", lambda: False)
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    options = {"scheduler": name, "steps": 6, "seeds": seeds, "guidance": Guidance(3.0, "power-cosine", power=1.0)}
    content, dit = make(DynamicContentTransformer, image_size=64), make(DiT, image_size=64)
    half = make(DynamicContentTransformer, image_size=64, refine_until=0.5)
    grains = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    for model, maps in ((content, grains), (half, grains), (dit, None)):
        replayed = sample_content(model, maps, labels, cuda_graph=True, **options)
        torch.testing.assert_close(replayed, sample_content(model, maps, labels, **options))
    if name in GRAIN_SCHEDULERS:
        grain = make(DynamicGrainTransformer, grid=(4, 6))
        replayed = sample_grain_maps(grain, labels, cuda_graph=True, **options)
        assert torch.equal(replayed, sample_grain_maps(grain, labels, **options))
    assert len(traces) == (5 if name in GRAIN_SCHEDULERS else 4)  # two with and without RefineNet


@pytest.mark.parametrize(
    ("scheduler", "diffusion", "refined", "steps"),
    [
        ("ddim", DiffusionConfig(), 3, 6),
        ("ddpm", DiffusionConfig(), 3, 6),
        ("euler", DiffusionConfig(), 3, 6),  # of diffusers, between whole timesteps
        ("euler", DiffusionConfig(path="linear", prediction="velocity"), 2, 6),  # at 1, 5/6, ... and 1/2 is not below
        ("heun", DiffusionConfig(path="linear", prediction="velocity"), 4, 11),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_noisy_steps_leave_refinenet_out(scheduler, diffusion, refined, steps, masked):
    """Below half of T it runs, above it does not, and the samples are those of a model that leaves out itself."""
    settings = {"image_size": 64, "learn_sigma": False, "diffusion": diffusion, "refine_until": 0.5, "masked": masked}
    model = make(DynamicContentTransformer, **settings)
    grains = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    arguments = {"labels": torch.tensor([0, 1]), "seeds": [1, 2], "steps": 6, "scheduler": scheduler}
    calls = []
    model.refine.register_forward_hook(lambda module, args, out: calls.append(1))
    trunk = []
    model.multi_grained.register_forward_hook(lambda module, args, out: trunk.append(1))
    out = sample_content(model, grains, guidance=Guidance(2.0), **arguments)
    assert (len(calls), len(trunk)) == (refined, steps)

    asked = model.forward
    model.forward = lambda x, t, y, grain_map, plan=None, refine=True: asked(x, t, y, grain_map)
    torch.testing.assert_close(sample_content(model, grains, guidance=Guidance(2.0), **arguments), out)
    assert len(calls) == refined + steps
    model.config.refine_until = 1.0
    everywhere = sample_content(model, grains, guidance=Guidance(2.0), **arguments)
    assert (everywhere - out).abs().max() > 1e-3


def test_a_guide_leaves_out_its_own_noisy_steps():
    model = make(DynamicContentTransformer, image_size=64)
    weaker = make(DynamicContentTransformer, image_size=64, refine_until=0.5)
    calls = {"model": 0, "guide": 0}
    for name, network in (("model", model), ("guide", weaker)):

        def count(*_, name=name):
            calls[name] += 1

        network.refine.register_forward_hook(count)
    grains = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    options = {"labels": torch.tensor([0, 1]), "seeds": [1, 2], "steps": 6, "scheduler": "ddim"}
    out = sample_content(model, grains, guide=weaker, guidance=Guidance(2.0), **options)
    assert calls == {"model": 6, "guide": 3}
    weaker.config.refine_until = 1.0
    assert not torch.equal(sample_content(model, grains, guide=weaker, guidance=Guidance(2.0), **options), out)


class KnownMap(nn.Module):
    """Logits of a fixed map; with the null label, of its opposite."""

    def __init__(self, grain_map):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.grain_map = grain_map
        self.config = SimpleNamespace(
            num_classes=1,
            class_dropout_prob=0.1,
            levels=3,
            grid=tuple(grain_map.shape[1:]),
            diffusion=DiffusionConfig(),
        )
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append((float(t[0]), x[: len(self.grain_map)].clone()))
        target = torch.where(y[:, None, None] == 1, 2 - self.grain_map[0], self.grain_map[0])
        return 12.0 * nn.functional.one_hot(target, 3).movedim(-1, 1).float()


@pytest.mark.parametrize("name", GRAIN_SCHEDULERS)
def test_grain_maps_reach_the_clean_map(name, monkeypatch):
    grains = torch.randint(0, 3, (1, 4, 6), generator=torch.Generator().manual_seed(0))
    model = KnownMap(grains)
    labels = torch.zeros(1, dtype=torch.long)
    ends, chain = [], sampling._Chain.__call__
    monkeypatch.setattr(sampling._Chain, "__call__", lambda *args: ends.append(chain(*args)) or ends[-1])
    out = sample_grain_maps(model, labels, seeds=[3], scheduler=name, steps=20, guidance=Guidance(2.0))
    assert torch.equal(out, grains)
    torch.testing.assert_close(ends[0][0][:, 0], grains - 1.0, atol=0.15, rtol=0)
    first_t, first_x = model.seen[0]
    assert first_t > 900
    assert first_x.std().item() == pytest.approx(1, abs=0.35)


def test_grain_transformer_samples():
    model = make(DynamicGrainTransformer, grid=(4, 6))
    labels = torch.tensor([0, 1, 3])
    maps = sample_grain_maps(model, labels, seeds=[1, 2, 3], steps=5)
    assert maps.shape == (3, 4, 6)
    assert maps.dtype == torch.int64
    assert torch.equal(sample_grain_maps(model, labels[1:2], seeds=[2], steps=5), maps[1:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": "magic"}, r"scheduler must be one of ddpm, ddim, dpm\+\+.*got 'magic'"),
        ({"steps": 0}, "steps must be in 1 ... 1000, got 0"),
        ({"labels": None}, "labels must be one for each of the 2 seeds"),
        ({"labels": torch.tensor([0, 4])}, r"labels must be in 0 ... 2 \(3 for none\), got 0 ... 4"),
        ({"grain_map": torch.zeros(2, 4, 5, dtype=torch.long)}, r"grain_map must be int64 \(2, 4, 4\)"),
        ({"grain_map": torch.full((2, 4, 4), 2)}, "grain_map must hold grains 0 ... 1, got 2 ... 2"),
        ({"grain_map": torch.zeros(2, 4, 4)}, "grain_map must be int64"),
        ({"guidance": Guidance(2.0, channels=5)}, "guidance channels must be at most 4, got 5"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_wrong_use(change, message):
    model = make(DynamicContentTransformer, image_size=64)
    arguments = {
        "grain_map": torch.zeros(2, 4, 4, dtype=torch.long),
        "labels": torch.tensor([0, 1]),
        "seeds": [1, 2],
        "steps": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sample_content(model, **arguments)


def test_guidance_without_classes():
    model = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), num_classes=None)
    with pytest.raises(ValueError, match="guidance needs a model with classes"):
        sample_grain_maps(model, seeds=[1], steps=2, guidance=Guidance(2.0))
    with pytest.raises(ValueError, match="scheduler must be one of"):
        sample_grain_maps(model, seeds=[1], steps=2, scheduler="heun")
    assert math.prod(sample_grain_maps(model, seeds=[1, 2], steps=2).shape) == 32
