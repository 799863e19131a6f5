"""D2iT from Python: what is checked before anything is computed, classes by name, what is made once a call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2it.diffusion import Guidance, sample_content, sample_grain_maps
from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.sampling import D2iT, pipeline

SMALL = {"dim": 32, "depth": 1, "heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def make(num_classes: int = 3) -> D2iT:
    torch.manual_seed(0)
    return D2iT(
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=4, num_classes=num_classes, **SMALL),
        DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=num_classes, **SMALL),
        class_names=["cat", "dog", "golden retriever"][:num_classes] or None,
        sampling={"scheduler": "ddim", "steps": 2},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": -1}, "num_images must be at least 0, got -1"),
        ({"num_images": 1.5}, "num_images must be a whole number at least 0, got 1.5"),
        ({"num_images": True}, "num_images must be at least 0, got True"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"seeds": [1, -2]}, "seeds must be in 0 ... 18446744073709551615, got -2"),
        ({"seeds": ["a"]}, "seeds must be a whole number"),
        ({"seeds": [2**64]}, "seeds must be in 0"),
        ({"num_images": 2, "seeds": [1]}, "the number of images must agree"),
        ({"steps": 0}, "steps must be in 1 ... 1000, got 0"),
        ({"steps": 2.5}, "steps must be a whole number in 1 ... 1000, got 2.5"),
        ({"steps": "ten"}, "steps must be a whole number"),
        ({"grain_steps": 1001}, "grain_steps must be in 1 ... 1000, got 1001"),
        ({"scheduler": "magic"}, "scheduler must be one of ddpm, ddim"),
        ({"scheduler": 5}, "scheduler must be one of ddpm, ddim"),
        ({"grain_scheduler": "heun"}, "grain_scheduler must be one of ddpm, ddim"),
        ({"guidance": float("nan")}, "guidance scale must be finite and not negative, got nan"),
        ({"guidance": -1.0}, "guidance scale must be finite"),
        ({"guidance": 1e308}, "guidance scale must be finite"),
        ({"guidance": "strong"}, "guidance scale must be finite"),
        ({"grain_guidance": float("inf")}, "grain_guidance scale must be finite"),
        ({"guidance": Guidance(2.0, channels=5)}, "guidance channels must be at most 4, got 5"),
        ({"grain_guidance": Guidance(2.0, channels=3)}, "grain_guidance channels must be at most 2, got 3"),
        ({"labels": 1.5}, "labels must be a whole number in 0 ... 2, got 1.5"),
        ({"seeds": 5}, "seeds must be a sequence of whole numbers, got 5"),
        ({"grain_map": "fine"}, "grain_map must be a tensor, got str"),
        ({"grain_map": [[0, 1], [0]]}, "grain_map must be a tensor, got list"),
        ({"grain_map": 1}, r"grain_map must be \(N, H/S, W/S\) or \(H/S, W/S\), got \(\)"),
        ({"callback": 5}, "callback must be callable, got 5"),
        ({"labels": [3]}, r"labels must be in 0 ... 2, got 3"),
        ({"labels": [-1]}, r"labels must be in 0 ... 2, got -1"),
        ({"labels": torch.tensor([0.7])}, "labels must be a whole number in 0 ... 2, got 0.69"),
        ({"labels": [None]}, "labels must be a whole number in 0 ... 2, got None"),
        ({"labels": ["retriever"]}, "labels: no class 'retriever'; there are golden retriever, ..."),
        ({"labels": "cow"}, "labels: no class 'cow'; there are "),
        ({"labels": [0, 1], "num_images": 3}, "the number of images must agree, got num_images: 3, labels: 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": "all"}, "batch_size must be a whole number"),
        ({"autocast": torch.int8}, "autocast must be torch.bfloat16, torch.float16 or None"),
        ({"cuda_graph": True}, "cuda_graph needs a model on a GPU, got one on cpu"),
        ({"grain_map": torch.zeros(4)}, r"grain_map must be \(N, H/S, W/S\) or \(H/S, W/S\), got \(4,\)"),
        ({"grain_map": torch.zeros(4, 4)}, "grain_map must be int64"),
        ({"grain_map": torch.full((4, 4), 2)}, "grain_map must hold grains 0 ... 1, got 2 ... 2"),
        ({"grain_map": torch.zeros(5, 4, dtype=torch.int64)}, r"grain_map must be int64 \(1, 4, 4\)"),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items())[:40] if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named_before_anything_runs(arguments, message, monkeypatch):
    model = make()
    for part in model.parts.values():
        monkeypatch.setattr(part, "forward", lambda *a, **k: pytest.fail("it has run"))
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        model(**arguments)
    assert "\n" not in str(caught.value)


def test_images_that_are_not_finite_are_no_samples():
    model = make()
    with torch.no_grad():
        for name, weight in model.content_transformer.named_parameters():
            if name.endswith("final.linear.bias"):
                weight.fill_(3e38)
    with pytest.raises(ValueError, match="the images are not finite"):
        model(1, steps=4, guidance=4.0)


@pytest.mark.parametrize("device", ["cuda:77", "nowhere", "xpu"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        make().to(device)


def test_classes_by_name():
    model = make()
    for labels, numbers in (
        (["golden retriever", 0, "1"], [2, 0, 1]),
        ("dog", [1]),
        (2, [2]),
        (np.array([0, 2]), [0, 2]),
        (torch.tensor([1]), [1]),
        ((), []),
    ):
        assert model.class_numbers(labels) == numbers
    assert model(labels=["dog", 0], seed=5).labels.tolist() == [1, 0]
    assert torch.equal(model(labels=["dog"], seed=5).images, model(labels=[1], seed=5).images)
    with pytest.raises(ValueError, match="labels: this model is unconditional"):
        make(0)(labels=["cat"])
    model.class_names = ["cat", "dog", "cat"]  # ImageNet has two cranes
    assert model.class_numbers(["dog", 2, "0"]) == [1, 2, 0]
    with pytest.raises(ValueError, match="labels: 'cat' is the name of the classes 0, 2: give the number"):
        model(labels=["cat"])
    model.class_names = None
    with pytest.raises(ValueError, match=r"labels: this model has no class names, only numbers 0 ... 2, got 'cat'"):
        model(labels=["cat"])


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++", "heun", "unipc"])
def test_a_solver_is_made_once_a_call_and_serves_every_image(scheduler, monkeypatch):
    """Schedulers of diffusers keep earlier outputs: images that share one are those of samplings of their own."""
    made, make_scheduler = [], pipeline.make_scheduler
    monkeypatch.setattr(pipeline, "make_scheduler", lambda *a, **k: made.append(a[0]) or make_scheduler(*a, **k))
    model = make()
    with torch.no_grad():
        for part in model.parts.values():
            for p in part.parameters():
                p.normal_(std=0.1)
    options = {"scheduler": scheduler, "steps": 4, "guidance": 1.5}
    samples = model(4, seed=3, **options)
    assert len(made) == 2
    for i in range(4):
        alone = model(seeds=[3 + i], labels=samples.labels[i : i + 1], **options)
        assert torch.equal(alone.images[0], samples.images[i])


def test_a_weaker_model_guides(tmp_path):
    model = make()
    randomized = torch.Generator().manual_seed(5)
    weaker = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=3, **SMALL).eval()
    with torch.no_grad():
        for p in [*model.content_transformer.parameters(), *weaker.parameters()]:
            p.copy_(torch.randn(p.shape, generator=randomized) * 0.1)
    options = {"labels": [0, 2], "seed": 3, "guidance": 2.0}
    classifier_free = model(**options).images
    guided = model(**options, guide=weaker).images
    assert not torch.equal(guided, classifier_free)
    with pytest.raises(ValueError, match="guide has no effect at a guidance of 1"):
        model(2, guide=weaker)
    parts = (model.vae, model.grain_transformer, model.content_transformer)
    always = D2iT(*parts, sampling=model.sampling, guide=weaker)
    assert torch.equal(always(**options).images, guided)
    assert torch.equal(always(labels=[0, 2], seed=3).images, model(labels=[0, 2], seed=3).images)

    always.save_pretrained(tmp_path / "model")
    weaker.vae_sha256 = model.vae.weights_sha256
    weaker.save_pretrained(tmp_path / "weaker")
    D2iT(*parts[:2], weaker).save_pretrained(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "model").iterdir() if path.is_dir()) == [
        "content_transformer",
        "grain_transformer",
        "vae",
    ]
    for folder in ("weaker", "whole"):
        read = D2iT.from_pretrained(tmp_path / "model", guide=tmp_path / folder)
        torch.testing.assert_close(read(**options).images, guided, rtol=1e-3, atol=1e-4)
        assert read.to(dtype=torch.bfloat16).guide.transformer_blocks()[0].attn.qkv.weight.dtype == torch.bfloat16


def test_a_guide_that_does_not_fit_is_refused_before_anything_is_sampled():
    model = make()
    guide = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=2, **SMALL)
    with pytest.raises(ValueError, match="guide must have the num_classes of the model, 3, got 2"):
        model(1, guide=guide, guidance=2.0)
    parts = (model.vae, model.grain_transformer, model.content_transformer)
    with pytest.raises(ValueError, match="guide must have the num_classes"):
        D2iT(*parts, guide=guide)
    guide = DynamicContentTransformer.from_preset("tiny", image_size=64, num_classes=3, **SMALL)
    model.vae.weights_sha256, guide.vae_sha256 = "a" * 64, "b" * 64
    with pytest.raises(ValueError, match="guide was trained on the latents of another VAE"):
        D2iT(*parts, guide=guide)
    assert D2iT(*parts, guide=guide, any_vae=True).guide is guide


@pytest.mark.parametrize("guidance", [{"bad": 1}, {"scale": "x"}, [1], -1.0])
@pytest.mark.parametrize("name", ["guidance", "grain_guidance"])
def test_a_models_own_guidance_is_checked_when_it_is_read(name, guidance):
    model = make()
    with pytest.raises(ValueError, match=name):
        D2iT(model.vae, model.grain_transformer, model.content_transformer, sampling={name: guidance})


def test_the_callback_sees_every_step():
    model, seen = make(), []
    fine = torch.ones(4, 4, dtype=torch.int64)
    model(2, steps=3, grain_map=fine, callback=lambda i, t, x: seen.append((i, t, tuple(x.shape))))
    assert sorted({(i, t) for i, t, _ in seen}) == [(0, 999.0), (1, 666.0), (2, 332.0)]
    assert len(seen) == 6
    assert {shape for _, _, shape in seen} == {(1, 4, 8, 8)}


def test_the_loops_check_for_themselves():
    model = make()
    content, grain = model.content_transformer, model.grain_transformer
    fine = torch.ones(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be whole numbers, got torch.float32"):
        sample_content(content, fine, torch.tensor([0.7]), seeds=[1], steps=1)
    with pytest.raises(ValueError, match="seeds must be in 0"):
        sample_grain_maps(grain, torch.tensor([0]), seeds=[-1], steps=1)
