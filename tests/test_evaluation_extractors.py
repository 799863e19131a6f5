"""Other networks than Inception, and what is computed of their features."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.errors import UserError
from d2it.evaluation.cli import main
from d2it.evaluation.extractors import EfficientNetLite, LocalModel, open_extractor
from d2it.evaluation.generation import compare, open_reference, spread, summarize
from d2it.evaluation.inception import Features
from d2it.evaluation.metrics import kernel_distance, nearest_mean_accuracy

lite = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="d2it[lite] is not there"
)


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


# ---- kernel distance ----------------------------------------------------------------------------------------------


def slow_discrepancy(x, y):
    """The definition, pair by pair (Binkowski et al. 2018, Eq. 4)."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


@pytest.mark.parametrize(("n", "m", "subset"), [(60, 60, 6), (60, 45, 4), (200, 31, 1000), (20, 20, 1000)])
def test_kernel_distance_is_the_mean_of_the_definition(n, m, subset):
    x, y = normal(n, 5, 1).double(), normal(m, 5, 2, 0.4).double()
    generator = torch.Generator().manual_seed(3)
    size = min(subset, min(n, m) // 10)
    parts = [p[torch.randperm(len(p), generator=generator)[: min(n, m) // size * size]].split(size) for p in (x, y)]
    expected = np.array([1000 * slow_discrepancy(a.numpy(), b.numpy()) for a, b in zip(*parts)])
    mean, error = kernel_distance(x, y, subset_size=subset, seed=3)
    assert mean == pytest.approx(expected.mean(), rel=1e-9)
    assert error == pytest.approx(expected.std(ddof=1) / len(expected) ** 0.5, rel=1e-9)
    assert len(expected) >= 10


def test_kernel_distance_agrees_with_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = normal(500, 16, 1), normal(500, 16, 2, 0.3)
    expected = kid.poly_mmd(x.double(), y.double(), degree=3, gamma=None, coef=1.0)
    means = [kernel_distance(x, y, subset_size=50, seed=seed)[0] for seed in range(40)]
    assert np.mean(means) == pytest.approx(1000 * float(expected), rel=0.05)


def test_the_standard_error_covers_what_other_draws_give():
    """Draws of the same two distributions differ by about the error that each of them states."""
    found = [kernel_distance(normal(400, 8, 2 * i), normal(400, 8, 2 * i + 1), subset_size=20) for i in range(60)]
    means, errors = np.array(found).T
    assert abs(means.mean()) < 3 * means.std(ddof=1) / 60**0.5  # unbiased: zero of equal distributions
    assert 0.6 < means.std(ddof=1) / errors.mean() < 1.5


@pytest.mark.parametrize("small", ["reference", "samples"])
def test_too_few_points_for_a_kernel_distance(small):
    sets = {"reference": normal(30, 4, 0), "samples": normal(30, 4, 1)}
    sets[small] = sets[small][:19]
    with pytest.raises(ValueError, match=f"{small} must have at least 20 points, got 19"):
        kernel_distance(**sets)


# ---- accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_nearest_mean_accuracy_is_the_loop_of_the_definition(seed):
    draw = np.random.default_rng(seed)
    classes = np.array([0, 3, 7, 8])
    labels, others = draw.choice(classes, 80), draw.choice(classes[:3], 50)
    reference, samples = (draw.normal(0, 1, (len(n), 6)) + n[:, None] / 6 for n in (labels, others))
    means = {c: reference[labels == c].mean(0) for c in classes}
    right = [min(means, key=lambda c: np.linalg.norm(x - means[c])) == n for x, n in zip(samples, others)]
    tensors = [torch.from_numpy(array) for array in (reference, labels, samples, others)]
    assert nearest_mean_accuracy(*tensors) == pytest.approx(np.mean(right))
    assert 0.2 < np.mean(right) < 1


def test_a_class_without_a_reference_is_an_error():
    with pytest.raises(ValueError, match="the reference has no images of class 5"):
        nearest_mean_accuracy(normal(4, 2, 0), torch.tensor([0, 1, 0, 1]), normal(2, 2, 1), torch.tensor([1, 5]))


# ---- sets of images -----------------------------------------------------------------------------------------------


class ByColour:
    """Eight averages of the image as features, and as "ImageNet class" the brightest channel."""

    name = "by colour"

    def __call__(self, images):
        pool = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, (2, 2)).flatten(1)[:, :8]
        mean = images.float().mean((2, 3))
        return Features(pool, None, torch.nn.functional.pad(mean, (0, 997)).softmax(1))


def coloured(n, seed, classes=3):
    """Pictures of which class c is bright in channel c."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (n, 3, 16, 16), generator=g)
    labels = torch.arange(n) % classes
    images[torch.arange(n), labels] += 130
    return images.to(torch.uint8), labels


def save_classes(path, images, labels):
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = path / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    return path


METRICS = ["fd", "kd", "precision", "recall", "accuracy", "top1"]


@pytest.mark.parametrize("kind", ["folder", "npz", "statistics"])
def test_all_metrics_of_labelled_sets(tmp_path, kind):
    images, labels = coloured(90, 0)
    if kind == "npz":
        path = tmp_path / "r.npz"
        np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    else:
        path = save_classes(tmp_path / "r", images, labels)
    reference = open_reference(path, ByColour(), metrics=METRICS, batch_size=8)
    if kind == "statistics":
        reference.save(tmp_path / "s.npz")
        reference = open_reference(tmp_path / "s.npz", ByColour(), metrics=METRICS)
    mine, numbers = coloured(60, 1)
    samples = summarize(mine.split(7), ByColour(), metrics=METRICS, labels=numbers.split(7))
    found = compare(samples, reference, METRICS)
    assert set(found) == {*METRICS, "kd_error"}
    assert (found["accuracy"], found["top1"]) == (1, 1)
    assert abs(found["kd"]) < 6 * found["kd_error"]
    wrong = summarize(mine.split(7), ByColour(), metrics=METRICS, labels=((numbers + 1) % 3).split(7))
    assert compare(wrong, reference, ["accuracy", "top1"]) == {"accuracy": 0, "top1": 0}


def test_what_a_metric_lacks_is_one_line(tmp_path):
    images, labels = coloured(30, 0)
    flat = save_classes(tmp_path / "flat", images, torch.zeros(30, dtype=int)) / "class0"
    with pytest.raises(UserError, match="flat/class0: accuracy needs labels, class folders or arr_1"):
        open_reference(flat, ByColour(), metrics=["accuracy"])
    reference = open_reference(tmp_path / "flat", ByColour(), metrics=["fd", "kd", "accuracy"])
    samples = summarize([images], ByColour(), metrics=METRICS)
    for name in ("accuracy", "top1"):
        with pytest.raises(UserError, match=f"{name} needs labels"):
            compare(samples, reference, [name])
    labelled = summarize([images], ByColour(), metrics=METRICS, labels=[labels])
    with pytest.raises(UserError, match="accuracy: the reference has no images of class 1"):
        compare(labelled, reference, ["accuracy"])
    far = summarize([images], ByColour(), metrics=METRICS, labels=[labels + 5000])
    with pytest.raises(UserError, match="top1 needs ImageNet's labels, got 5002"):
        compare(far, reference, ["top1"])
    few = summarize([images[:19]], ByColour(), metrics=METRICS)
    with pytest.raises(UserError, match="kd: the samples must be more than 19, got 19"):
        compare(few, reference, ["kd"])
    reference.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as stored:
        np.savez(tmp_path / "unlabelled.npz", **{k: v for k, v in stored.items() if k != "labels"})
        np.savez(tmp_path / "mislabelled.npz", **{**stored, "labels": np.arange(3)})
        np.savez(tmp_path / "inception.npz", **{**stored, "extractor": np.array("inception")})
    for file, message in (
        ("unlabelled", "features without labels"),
        ("mislabelled", "labels must be 30 whole numbers"),
        ("inception", "statistics of inception, the extractor is by colour"),
    ):
        with pytest.raises(UserError, match=message):
            open_reference(tmp_path / f"{file}.npz", ByColour(), metrics=["accuracy"])


def test_a_spread_is_the_mean_and_the_deviation():
    mean, deviation = spread([{"fd": 1.0, "kd": 2.0}, {"fd": 3.0, "kd": 2.0}])
    assert mean == {"fd": 2.0, "kd": 2.0}
    assert deviation == {"fd": pytest.approx(2**0.5), "kd": 0.0}


# ---- the networks -------------------------------------------------------------------------------------------------


@lite
@pytest.mark.parametrize(("name", "espresso"), [("efficientnet-lite0", 0.8), ("efficientnet-lite2", 0.8)])
def test_efficientnet_lite_sees_what_is_in_a_photo(name, espresso):
    from d2it.data import DemoPhotos

    source = DemoPhotos(256, crops=16)
    cat, coffee = (source[source.PHOTOS.index(photo)]["image"] for photo in ("chelsea.png", "coffee.png"))
    extractor, settings = open_extractor(name)
    features = extractor(torch.stack([cat, coffee]))
    assert features.pool.shape == (2, 1280)
    assert features.probabilities.shape == (2, 1000)
    assert features.spatial is None
    assert int(features.probabilities[0].argmax()) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert float(features.probabilities[1, 967]) > espresso
    assert torch.allclose(features.probabilities, extractor.network._fc(features.pool).softmax(1))
    assert settings["extractor"] == name
    assert len(settings["weights_sha256"]) == 64
    assert not any(p.requires_grad for p in extractor.parameters())


@lite
def test_efficientnet_lite_is_the_packages_own_network():
    extractor = EfficientNetLite("efficientnet-lite0")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)  # its own size: nothing is resized
    expected = extractor.network((images.float() - 127) / 128).softmax(1)
    torch.testing.assert_close(extractor(images).probabilities, expected, rtol=1e-4, atol=1e-6)


@lite
def test_the_command_compares_by_another_network(tmp_path, capsys):
    images, labels = coloured(24, 0)
    reference = save_classes(tmp_path / "r", images, labels)
    sets = [save_classes(tmp_path / f"s{i}", *coloured(22, i + 1)) for i in range(2)]
    network = ["--extractor", "efficientnet-lite0", "--device", "cpu"]
    assert main(["statistics", str(reference), "--save", str(tmp_path / "s.npz"), *network]) == 0
    words = ["generation", "--reference", str(tmp_path / "s.npz"), *network, "--output", str(tmp_path / "r.json")]
    words += ["--samples", *map(str, sets), "--metrics", "fd,kd,accuracy"]
    assert main(words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["metrics"]) == set(report["deviation"]) == {"fd", "kd", "kd_error", "accuracy"}
    assert len(report["each"]) == report["settings"]["repeats"] == 2
    assert report["settings"]["extractor"] == "efficientnet-lite0"
    assert " +- " in capsys.readouterr().out
    assert main([*words[:-1], "fid"]) == 2
    assert "fid is a metric of Inception and not of efficientnet-lite0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extractor", "nowhere"], "--extractor nowhere: no such folder; known are inception, efficientnet-lite0"),
        (["--extractor", "efficientnet-lite0", "--inception", "x"], "--inception goes with --extractor inception"),
        (["--repeats", "3"], "--repeats goes with a --checkpoint"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--metrics", "fd,nonsense"], "--metrics: unknown metric 'nonsense'"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, arguments, message):
    assert main(["generation", "--samples", "x", "--reference", "r", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_repeats_draw_other_seeds_and_report_the_spread(tmp_path, monkeypatch):
    from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
    from d2it.sampling import D2iT

    torch.manual_seed(0)
    small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
    vae = DynamicVAE.from_preset("tiny", channels=8)
    shared = {"downsampling": vae.downsampling, "in_channels": vae.config.latent_channels}
    content = DynamicContentTransformer.from_preset("tiny", image_size=32, **shared, **small)
    grain = DynamicGrainTransformer.from_preset("tiny", grid=(2, 2), **small)
    D2iT(vae.eval(), grain.eval(), content.eval()).save_pretrained(tmp_path / "run")
    images, labels = coloured(60, 0)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    reference = save_classes(tmp_path / "r", images, labels)
    monkeypatch.setattr("d2it.evaluation.cli._inception", lambda options, world: (ByColour(), {}))
    words = ["generation", "--checkpoint", tmp_path / "run", "--reference", reference, "--count", 24, "--device", "cpu"]
    words += ["--steps", 1, "--scheduler", "ddim", "--batch-size", 8, "--fine-ratio", 0.5]
    words += ["--metrics", "fd,kd,accuracy,top1", "--output", tmp_path / "report.json"]

    def report(*more):
        assert main([*map(str, words), *map(str, more)]) == 0
        return json.loads((tmp_path / "report.json").read_text())

    both = report("--seed", 5, "--repeats", 2)
    each = [report("--seed", seed)["metrics"] for seed in (5, 29)]
    assert each[0] != each[1]
    assert both["each"] == each
    for name, (mean, deviation) in {k: (both["metrics"][k], both["deviation"][k]) for k in both["metrics"]}.items():
        assert mean == pytest.approx((each[0][name] + each[1][name]) / 2)
        assert deviation == pytest.approx(abs(each[0][name] - each[1][name]) / 2**0.5)
    assert (both["settings"]["seed"], both["settings"]["repeats"]) == (5, 2)
    assert 0 <= each[0]["accuracy"] <= 1


# ---- models of a folder -------------------------------------------------------------------------------------------


PREPROCESSING = {"size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def model_folder(path, config=None, preprocessing=None, weights=b"x"):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {"model_type": "dinov2"}))
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessing or PREPROCESSING))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": None}, "not a folder of transformers"),
        ({"config": {"architecture": "vit"}}, "not a folder of transformers"),
        ({"preprocessing": {"size": 3}}, "image_mean"),
        ({"preprocessing": PREPROCESSING | {"size": {"shortest_edge": "big"}}}, "images of big x big"),
        ({"preprocessing": PREPROCESSING | {"size": -4}}, "images of -4 x -4"),
        ({"preprocessing": PREPROCESSING | {"image_std": [1, 0, 1]}}, "mean and deviation"),
        ({"preprocessing": PREPROCESSING | {"image_mean": [1]}}, "mean and deviation"),
        ({}, "dinov2|transformers|safetensors|header"),
    ],
)
def test_a_folder_that_holds_no_model_is_one_line(tmp_path, given, message):
    with pytest.raises(UserError, match=message) as caught:
        open_extractor(str(model_folder(tmp_path / "m", **given)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_vision_transformer_of_a_folder(tmp_path, pooled):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind = {True: ("Dinov2Config", "Dinov2Model"), False: ("ViTMAEConfig", "ViTMAEModel")}[pooled]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    more = {} if pooled else {"mask_ratio": 0.0, "intermediate_size": 64}
    model = getattr(transformers, kind[1])(getattr(transformers, kind[0])(**sizes, **more)).eval()
    folder = model_folder(tmp_path / "m")
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    extractor, settings = open_extractor(str(folder))
    assert isinstance(extractor, LocalModel)
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    mean, deviation = (torch.tensor(PREPROCESSING[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        torch.manual_seed(1)
        output = model(pixel_values=(images / 255 - mean) / deviation)
        expected = output.pooler_output if pooled else output.last_hidden_state[:, 0]
        torch.manual_seed(1)
        torch.testing.assert_close(extractor(images).pool, expected)
    assert settings["extractor"].startswith(("dinov2 ", "vit_mae "))
