"""The schedule, noise and weights per latent code, the losses."""

from __future__ import annotations

import math

import pytest
import torch

from d2it.diffusion import (
    GaussianDiffusion,
    Guidance,
    content_loss,
    expected_signal,
    grain_loss,
    grain_weights,
    grained_noise,
    grains_to_signal,
    project_to_grains,
)
from d2it.diffusion.gaussian import discretized_log_likelihood, normal_kl
from d2it.diffusion.grains import random_grain_map
from d2it.diffusion.guidance import guide


def maps(batch, h, w, grains=2, seed=0):
    return torch.randint(0, grains, (batch, h, w), generator=torch.Generator().manual_seed(seed))


# ---- schedule -------------------------------------------------------------------------------------------------------


def test_schedule_is_the_papers():
    d = GaussianDiffusion()
    signal = 1.0
    for t in range(1000):
        signal *= 1 - (1e-4 + (2e-2 - 1e-4) * t / 999)
        if t in (0, 1, 500, 999):
            assert d.tables["sqrt_alphas_cumprod"][t].item() == pytest.approx(math.sqrt(signal), rel=1e-6)
            assert d.tables["sqrt_one_minus_alphas_cumprod"][t].item() == pytest.approx(math.sqrt(1 - signal), rel=1e-6)


def test_noise_and_back():
    d = GaussianDiffusion()
    x0, noise = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    t = torch.tensor([0, 10, 300, 900])
    xt = d.q_sample(x0, noise, t)
    # At t = 900 the signal is a hundredth of the noise: float32 keeps three digits of it.
    torch.testing.assert_close(d.predict_x0(xt, noise, t), x0, rtol=1e-3, atol=1e-4)


def test_posterior_by_bayes():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: checked on its log-density."""
    d = GaussianDiffusion(20, 1e-2, 0.3)
    betas = torch.linspace(1e-2, 0.3, 20, dtype=torch.float64)
    cumulative = (1 - betas).cumprod(0)
    normal = torch.distributions.Normal
    for t in (1, 7, 19):
        x0, xt = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
        x = torch.linspace(-3, 3, 50, dtype=torch.float64)
        log_density = normal((1 - betas[t]).sqrt() * x, betas[t].sqrt()).log_prob(xt)
        log_density += normal(cumulative[t - 1].sqrt() * x0, (1 - cumulative[t - 1]).sqrt()).log_prob(x)
        mean, log_variance = d.posterior(x0.view(1, 1, 1, 1), xt.view(1, 1, 1, 1), torch.tensor([t]))
        got = normal(mean.squeeze(), (0.5 * log_variance).exp().squeeze()).log_prob(x)
        difference = got - log_density
        assert (difference - difference.mean()).abs().max() < 1e-4


def test_vlb_vanishes_at_the_truth_and_trains_the_variance_only():
    d = GaussianDiffusion()
    x0, noise = torch.randn(3, 4, 2, 2).clamp(-1, 1), torch.randn(3, 4, 2, 2)
    t = torch.tensor([1, 500, 999])
    xt = d.q_sample(x0, noise, t)
    v = torch.full_like(x0, -1.0)  # the lower bound is the posterior's own variance
    assert d.vlb_terms(x0, xt, t, noise, v).abs().max() < 1e-3
    assert (d.vlb_terms(x0, xt, t, noise, v + 2)[0] > 0.02).all()  # and the upper one is not
    predicted = (noise + 0.1).requires_grad_()
    v = torch.zeros_like(x0, requires_grad=True)
    d.vlb_terms(x0, xt, t, predicted, v).backward(torch.rand(x0.shape))
    assert predicted.grad is None
    assert v.grad.all()


def test_kl_and_likelihood_against_torch():
    normal = torch.distributions.Normal
    m1, m2, v1, v2 = torch.randn(4, 50)
    expected = torch.distributions.kl_divergence(normal(m1, (0.5 * v1).exp()), normal(m2, (0.5 * v2).exp()))
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), expected, rtol=1e-4, atol=1e-5)
    bins = torch.linspace(-1, 1, 256)  # 2/255 apart: together they hold all the mass
    mass = discretized_log_likelihood(bins, torch.tensor(0.3), torch.tensor(math.log(0.2))).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-5)
    t0 = GaussianDiffusion().vlb_terms(
        torch.zeros(1, 1, 1, 1),
        torch.zeros(1, 1, 1, 1),
        torch.tensor([0]),
        torch.zeros(1, 1, 1, 1),
        -torch.ones(1, 1, 1, 1),
    )
    scale = math.sqrt(GaussianDiffusion().tables["posterior_log_variance"][0].exp().item())
    assert t0.item() == pytest.approx(-math.log2(math.erf(1 / 255 / scale / math.sqrt(2))), rel=1e-3)


def test_schedules_that_are_none():
    with pytest.raises(ValueError, match="num_timesteps must be at least 1"):
        GaussianDiffusion(0)
    with pytest.raises(ValueError, match="beta_start <= beta_end"):
        GaussianDiffusion(10, 0.5, 0.1)


# ---- codes ----------------------------------------------------------------------------------------------------------

CODES = {"two": (2, 1), "three": (4, 2, 1), "jump": (4, 1), "one": (1,)}


@pytest.mark.parametrize("sizes", CODES.values(), ids=CODES)
def test_one_draw_a_code(sizes):
    cells = sizes[0]
    grains = maps(200, 3, 5, len(sizes))
    noise = grained_noise(grains, 2, code_sizes=sizes, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (200, 2, 3 * cells, 5 * cells)
    cell_grain = grains.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, None].expand_as(noise)
    draws = []
    for grain, size in enumerate(sizes):
        blocks = noise.unflatten(2, (-1, size)).unflatten(4, (-1, size)).movedim(3, 4)  # (B, C, y, x, s, s)
        mine = cell_grain.unflatten(2, (-1, size)).unflatten(4, (-1, size)).movedim(3, 4)[..., 0, 0] == grain
        blocks = blocks[mine]
        assert torch.equal(blocks, blocks[:, :1, :1].expand_as(blocks))
        draws.append(blocks[:, 0, 0])
    draws = torch.cat(draws)
    assert len(draws.unique()) > 0.99 * len(draws)
    assert draws.mean().item() == pytest.approx(0, abs=0.05)
    assert draws.std().item() == pytest.approx(1, abs=0.03)
    # Every code weighs the same, whatever its size.
    weights = grain_weights(grains, code_sizes=sizes)
    assert weights.sum().item() == pytest.approx(len(draws) / 2)


def test_alpha_is_the_papers():
    assert grain_weights(torch.tensor([[[0, 1]]])).flatten(1).unique().tolist() == [0.25, 1.0]
    three = grain_weights(torch.tensor([[[0, 1, 2]]]), code_sizes=(4, 2, 1))
    assert three[0, 0, 0, ::4].tolist() == [1 / 16, 1 / 4, 1.0]


def test_projection():
    x = torch.randn(3, 2, 8, 12)
    grains = maps(3, 2, 3, 3)
    projected = project_to_grains(x, grains, code_sizes=(4, 2, 1))
    torch.testing.assert_close(project_to_grains(projected, grains, code_sizes=(4, 2, 1)), projected)
    # The mean of every region stays, fine cells stay as they are.
    torch.testing.assert_close(*(torch.nn.functional.avg_pool2d(v, 4) for v in (projected, x)))
    fine = (grains == 2).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x)
    assert torch.equal(projected[fine], x[fine])


def test_generators_make_samples_independent_of_the_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    grains = maps(3, 2, 2)
    together = grained_noise(grains, 4, generator=generators(7, 8, 9))
    assert torch.equal(grained_noise(grains[1:2], 4, generator=generators(8)), together[1:2])
    with pytest.raises(ValueError, match="one for each of the 3 samples, got 2"):
        grained_noise(grains, 4, generator=generators(7, 8))


def test_grain_signal():
    grains = maps(2, 3, 5, 3)
    signal = grains_to_signal(grains, 3)
    assert signal.shape == (2, 1, 3, 5)
    assert signal.unique().tolist() == [-1.0, 0.0, 1.0]
    logits = 50.0 * torch.nn.functional.one_hot(grains, 3).movedim(-1, 1).float()
    torch.testing.assert_close(expected_signal(logits), signal)
    torch.testing.assert_close(expected_signal(torch.zeros(2, 3, 3, 5)), torch.zeros(2, 1, 3, 5))


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_content_loss_code_by_code(learn_sigma):
    """Eq. 11 as a loop over codes: each code's mean error counts once, coarse or fine."""
    d = GaussianDiffusion(learn_sigma=learn_sigma)
    grains = maps(3, 2, 3)
    noise = grained_noise(grains, 4, generator=torch.Generator().manual_seed(0))
    x0 = grained_noise(grains, 4, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    t = torch.tensor([0, 40, 800])
    xt = d.q_sample(x0, noise, t)
    out = torch.randn(3, 8 if learn_sigma else 4, 4, 6, generator=torch.Generator().manual_seed(2))
    error = (noise - out[:, :4]).square()
    vlb = d.vlb_terms(x0, xt, t, out[:, :4], out[:, 4:]) if learn_sigma else torch.zeros_like(error)
    expected = torch.zeros(2, 3)
    for b in range(3):
        for i in range(2):
            for j in range(3):
                size = (2, 1)[grains[b, i, j]]
                for y in range(2 * i, 2 * i + 2, size):
                    for x in range(2 * j, 2 * j + 2, size):
                        for kind, term in enumerate((error, vlb)):
                            expected[kind, b] += term[b, :, y : y + size, x : x + size].mean(dim=(1, 2)).sum()
    expected = expected / (4 * 4 * 6)
    loss = content_loss(d, out, x0=x0, xt=xt, noise=noise, t=t, grain_map=grains)
    torch.testing.assert_close(loss.mse, expected[0])
    torch.testing.assert_close(loss.vlb, expected[1])
    torch.testing.assert_close(loss.loss, expected.sum(0))
    plain = content_loss(d, out, x0=x0, xt=xt, noise=noise, t=t)
    torch.testing.assert_close(plain.mse, error.mean(dim=(1, 2, 3)))


def test_grain_loss_is_eq_5():
    grains = maps(2, 3, 5, 3)
    logits = torch.randn(2, 3, 3, 5)
    expected = torch.zeros(2)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                expected[b] -= logits[b, :, i, j].log_softmax(0)[grains[b, i, j]] / 15
    torch.testing.assert_close(grain_loss(logits, grains), expected)


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_over_time():
    assert Guidance(4.0).at(0.3) == 4.0
    window = Guidance(4.0, "interval", interval=(0.2, 0.8))
    assert [window.at(f) for f in (0.1, 0.2, 0.5, 0.8, 0.9)] == [1, 4, 4, 4, 1]
    rising = Guidance(4.0, "power-cosine", power=2.0)
    assert rising.at(1.0) == pytest.approx(1.0)
    assert rising.at(0.0) == pytest.approx(4.0)
    assert rising.at(0.5) == pytest.approx(1 + 3 * (1 - math.cos(math.pi / 4)) / 2)


def test_guided_channels():
    conditional, unconditional = torch.randn(2, 8, 2, 2), torch.randn(2, 8, 2, 2)
    out = guide(conditional, unconditional, 1.5, 3)
    torch.testing.assert_close(out[:, :3], (unconditional + 1.5 * (conditional - unconditional))[:, :3])
    assert torch.equal(out[:, 3:], conditional[:, 3:])


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "linear"},
        {"scale": -1.0},
        {"scale": math.nan},
        {"interval": (0.5, 0.2)},
        {"power": 0.0},
        {"channels": 0},
    ],
    ids=str,
)
def test_guidance_that_is_none(settings):
    with pytest.raises(ValueError, match=f"guidance {next(iter(settings))}"):
        Guidance(**settings)


def test_random_maps_have_the_shares_asked_for():
    def maps(ratio, grains):
        return random_grain_map((4, 5), ratio, grains, generator=[torch.Generator().manual_seed(i) for i in range(3)])

    for ratio, grains, counts in (
        (0.3, 2, [14, 6]),
        ((0.3,), 2, [14, 6]),
        (0.3, 3, [14, 0, 6]),
        ((0.5, 0.25), 3, [10, 5, 5]),
        ((1.0, 0.5, 0.0), 4, [0, 10, 10, 0]),
    ):
        drawn = maps(ratio, grains)
        assert drawn.dtype == torch.int64
        assert [m.flatten().bincount(minlength=grains).tolist() for m in drawn] == [counts] * 3
        assert len({m.numpy().tobytes() for m in drawn}) == 3
    for wrong in ((0.5,), (0.2, 0.5), (1.5, 0.5), (0.5, 0.2, 0.1)):
        with pytest.raises(ValueError, match="fine_ratio must be 2 descending shares"):
            maps(wrong, 3)
