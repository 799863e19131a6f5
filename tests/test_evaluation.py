"""Numbers that can stand beside the literature's: each metric against an independent implementation."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from d2it.errors import UserError
from d2it.evaluation.cli import main
from d2it.evaluation.generation import compare, open_reference, summarize
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import Features, Inception, resize_tensorflow1
from d2it.evaluation.metrics import Gaussian, GaussianStatistics, inception_score, precision_recall
from d2it.files import sha256_of
from d2it.npz import image_writer
from d2it.sampling import cli as sampling


def normal(n, d, seed, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g) / d**0.5
    return torch.randn(n, d, generator=g) @ mix + shift


class SmallExtractor:
    """A fixed random projection in Inception's place: the tests carry no weights."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.pool = torch.randn(3 * 8 * 8, 16, generator=g) / 14
        self.classes = torch.randn(16, 5, generator=g)

    def __call__(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)
        pool = (small @ self.pool).tanh()
        return Features(pool, small[:, :12], (pool @ self.classes).softmax(1))


def pictures(n, seed, size=16, contrast=1.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.randn(n, 3, 4, 4, generator=g), size, mode="bilinear")
    return (127 + 60 * contrast * x).clamp(0, 255).to(torch.uint8)


# ---- mathematics --------------------------------------------------------------------------------------------------


def test_streamed_statistics_are_numpys():
    x = normal(301, 24, 1, shift=1000.0)
    statistics = GaussianStatistics(24)
    for part in x.split(64):
        statistics.update(part)
    found = statistics.gaussian()
    np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def gaussian_of(x):
    statistics = GaussianStatistics(x.shape[1])
    statistics.update(x)
    return statistics.gaussian()


@pytest.mark.parametrize("n", [20, 400])  # fewer and more samples than dimensions
def test_frechet_distance_agrees_with_scipys_matrix_root(n):
    a, b = gaussian_of(normal(n, 32, 2)), gaussian_of(normal(n + 7, 32, 3, shift=0.3))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy() + (n < 32) * 1e-12 * np.eye(32))
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    assert a.frechet_distance(b) == pytest.approx(expected - 2 * np.trace(root).real, abs=1e-3)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Identity(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x.flatten(1)

    a, b = normal(200, 16, 4), normal(300, 16, 5, shift=0.5)
    metric = fid.FrechetInceptionDistance(feature=Identity(), input_img_size=(1, 4, 4)).set_dtype(torch.float64)
    metric.update(a.double().reshape(-1, 1, 4, 4), real=True)
    metric.update(b.double().reshape(-1, 1, 4, 4), real=False)
    assert gaussian_of(a).frechet_distance(gaussian_of(b)) == pytest.approx(float(metric.compute()), abs=1e-3)


def test_frechet_distance_of_two_normals_with_a_closed_form():
    one = Gaussian(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    two = Gaussian(torch.tensor([1.0, 5.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double())
    assert one.frechet_distance(two) == pytest.approx(9 + (2 - 1) ** 2 + (3 - 1) ** 2)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    found = gaussian_of(normal(150, 256, 6))
    assert abs(found.frechet_distance(found)) < 1e-3


def test_inception_score_of_certain_and_uncertain_classifiers():
    certain = torch.eye(10).repeat(50, 1)
    assert inception_score(certain) == pytest.approx(10)
    assert inception_score(torch.full((500, 10), 0.1)) == pytest.approx(1)
    # The mean over splits, not the score of the whole: two pure halves score 1 each.
    halves = torch.eye(2).repeat_interleave(100, 0)
    assert inception_score(halves, split_size=100) == pytest.approx(1)
    assert inception_score(halves, split_size=200) == pytest.approx(2)


def slow_precision_recall(reference, samples, k):
    def radii(points):
        return [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]

    def covered(points, centers, reach):
        return np.mean([any(np.linalg.norm(centers - p, axis=1) <= reach) for p in points])

    return covered(samples, reference, radii(reference)), covered(reference, samples, radii(samples))


def test_precision_and_recall_are_the_loops_of_the_definition():
    reference, samples = normal(90, 6, 7), normal(70, 6, 8, shift=0.8)
    expected = slow_precision_recall(reference.numpy(), samples.numpy(), 3)
    assert precision_recall(reference, samples, block=32) == pytest.approx(expected)
    assert all(0 < share < 1 for share in expected)


def test_resize_is_tensorflow_1s():
    # Corners by hand: output i reads from i * 4 / 6 with no half-pixel shift, the last one clamps.
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).reshape(1, 1, 1, 4).expand(1, 1, 4, 4)
    expected = torch.tensor([0.0, 20 / 3, 40 / 3, 20.0, 80 / 3, 30.0])
    torch.testing.assert_close(resize_tensorflow1(row, 6)[0, 0, 3], expected)
    torch.testing.assert_close(resize_tensorflow1(row, 4), row)


# ---- the network --------------------------------------------------------------------------------------------------


def test_inception_has_the_shapes_and_the_state_of_the_2015_graph(tmp_path):
    torch.manual_seed(0)
    model = Inception()
    # 23,834,568 of Inception v3 without its auxiliary head, with 1,008 classes in place of 1,000.
    assert sum(p.numel() for p in model.parameters()) == 23_834_568 + 8 * 2049
    features = model(pictures(2, 0, size=64))
    assert [tuple(f.shape) for f in features] == [(2, 2048), (2, 2023), (2, 1008)]
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    again = Inception.from_file(tmp_path / "weights.pth", sha256=None)
    assert torch.equal(again(pictures(2, 0, size=64)).pool, features.pool)


def test_inception_weights_are_required_and_checked(tmp_path):
    with pytest.raises(UserError, match="no Inception weights given: download"):
        Inception.from_file(None)
    with pytest.raises(UserError, match="no such file"):
        Inception.from_file(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="expected 6726825d"):
        Inception.from_file(tmp_path / "other.pth")
    with pytest.raises(UserError, match="not Inception weights"):
        Inception.from_file(tmp_path / "other.pth", sha256=None)


# ---- images in and out --------------------------------------------------------------------------------------------


def test_npz_streams_what_was_written(tmp_path):
    images = pictures(11, 1)
    with image_writer(tmp_path / "samples.npz", 11, labels=np.arange(11)) as add:
        for part in images.split(4):
            add(part)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], images.permute(0, 2, 3, 1))
        assert archive["arr_1"].tolist() == list(range(11))
    opened = open_images(tmp_path / "samples.npz")
    assert (opened.count, opened.size) == (11, (16, 16))
    assert torch.equal(torch.cat(list(opened.batches(4))), images)
    assert torch.equal(torch.cat(list(opened.batches(4, limit=6))), images[:6])


def test_a_wrong_count_leaves_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="count must be the number of images, got 5 for 4"),
        image_writer(tmp_path / "samples.npz", 5) as add,
    ):
        add(pictures(4, 1))
    assert list(tmp_path.iterdir()) == []


def save_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:04d}.png")
    return path


def test_a_folder_is_its_npz(tmp_path):
    images = pictures(5, 2)
    opened = open_images(save_folder(tmp_path / "folder", images))
    assert torch.equal(torch.cat(list(opened.batches(2))), images)


def test_bad_image_sets_are_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    mixed = save_folder(tmp_path / "mixed", pictures(2, 3))
    Image.new("RGB", (8, 8)).save(mixed / "9.png")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "gray.npz", arr_0=np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "text.npz").write_text("not an archive")
    for name, match in [
        ("missing", "no such folder"),
        ("empty", "no images"),
        ("other.npz", "no arr_0 in it; it holds x"),
        ("gray.npz", r"arr_0 must be uint8 \(N, H, W, 3\)"),
        ("text.npz", "not a readable array file"),
    ]:
        with pytest.raises(UserError, match=match):
            open_images(tmp_path / name)
    with pytest.raises(UserError, match="8 x 8 pixels, but"):
        list(open_images(mixed).batches(8))


# ---- the whole ----------------------------------------------------------------------------------------------------


def test_metrics_of_samples_against_a_reference(tmp_path):
    extractor = SmallExtractor()
    reference, samples = pictures(120, 4), pictures(100, 5, contrast=0.6)
    folder = save_folder(tmp_path / "reference", reference)
    told = open_reference(folder, extractor, batch_size=32)
    found = compare(summarize(samples.split(32), extractor), told)
    assert set(found) == {"fid", "sfid", "is", "precision", "recall"}
    a, b = (gaussian_of(extractor(x).pool) for x in (samples, reference))
    assert found["fid"] == pytest.approx(a.frechet_distance(b), abs=1e-6)
    assert found["recall"] < found["precision"]

    told.save(tmp_path / "statistics.npz")
    stored = open_reference(tmp_path / "statistics.npz", extractor)
    assert stored.count == 120
    assert compare(summarize(samples.split(50), extractor), stored) == pytest.approx(found, abs=1e-6)
    itself = compare(summarize(reference.split(50), extractor), stored)
    assert abs(itself["fid"]) < 1e-3
    assert abs(itself["sfid"]) < 1e-3
    assert (itself["precision"], itself["recall"]) == (1, 1)


def test_statistics_and_images_in_one_file_as_adm_ships_them(tmp_path):
    extractor, images = SmallExtractor(), pictures(60, 6)
    told = summarize([images], extractor)
    np.savez(
        tmp_path / "reference.npz",
        arr_0=images.permute(0, 2, 3, 1).numpy(),
        mu=told.pool.mean,
        sigma=told.pool.covariance,
        mu_s=told.spatial.mean,
        sigma_s=told.spatial.covariance,
    )
    stored = open_reference(tmp_path / "reference.npz", extractor)
    found = compare(told, stored)
    assert abs(found["fid"]) < 1e-3
    assert found["precision"] == 1


def test_sets_that_cannot_be_compared_say_so(tmp_path):
    extractor = SmallExtractor()
    small, large = (summarize([pictures(8, 7, size=s)], extractor) for s in (16, 32))
    with pytest.raises(UserError, match="samples of 16 x 16 pixels cannot be compared with a reference of 32 x 32"):
        compare(small, large)
    with pytest.raises(UserError, match="unknown metric 'kid'"):
        compare(small, small, ["kid"])
    np.savez(tmp_path / "fid_only.npz", mu=small.pool.mean, sigma=small.pool.covariance)
    with pytest.raises(UserError, match="no mu_s and sigma_s"):
        open_reference(tmp_path / "fid_only.npz", extractor, metrics=["fid", "sfid"])
    with pytest.raises(UserError, match="images or features are needed for precision"):
        open_reference(tmp_path / "fid_only.npz", extractor, metrics=["fid", "precision"])
    assert compare(small, open_reference(tmp_path / "fid_only.npz", extractor, metrics=["fid"]), ["fid"])["fid"] < 1e-3
    few = summarize([pictures(3, 7)], extractor)
    with pytest.raises(UserError, match="precision, recall: the samples must be more than 3, got 3"):
        compare(few, small)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        summarize([pictures(1, 7)], extractor)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "fid_only.npz").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cut.npz: not a readable array file"):
        open_reference(tmp_path / "cut.npz", extractor)


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(Inception().state_dict(), path)
    return str(path)


def test_the_command_compares_a_folder_with_statistics(tmp_path, inception_weights, capsys):
    folder = str(save_folder(tmp_path / "samples", pictures(5, 10)))
    weights = ["--inception", inception_weights, "--any-inception", "--device", "cpu"]
    assert main(["statistics", folder, "--save", str(tmp_path / "s.npz"), *weights]) == 0
    report = tmp_path / "report.json"
    command = ["generation", "--samples", folder, "--reference", str(tmp_path / "s.npz"), "--metrics", "fid,precision"]
    assert main([*command, *weights, "--output", str(report)]) == 0
    found = json.loads(report.read_text())
    assert abs(found["metrics"]["fid"]) < 1e-3
    assert found["metrics"]["precision"] == 1
    settings = found["settings"]
    assert (settings["count"], settings["reference_count"], settings["size"]) == (5, 5, [16, 16])
    assert settings["inception_sha256"]
    assert "fid" in capsys.readouterr().out


def test_the_command_samples_and_compares_a_checkpoint_in_a_stream(tmp_path, inception_weights, monkeypatch, capsys):
    from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
    from d2it.sampling import D2iT

    torch.manual_seed(0)
    vae = DynamicVAE.from_preset("tiny")
    side = 4 * vae.config.region_size
    content = DynamicContentTransformer.from_preset(
        "tiny", image_size=side, downsampling=vae.downsampling, in_channels=vae.config.latent_channels, num_classes=3
    )
    grain = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), num_grains=2, num_classes=3)
    d2it = D2iT(vae.eval(), grain.eval(), content.eval())
    d2it.save_pretrained(tmp_path / "run")
    reference = save_folder(tmp_path / "reference", pictures(5, 10, size=side))
    command = ["generation", "--checkpoint", str(tmp_path / "run"), "--reference", str(reference), "--metrics", "fid"]
    settings = ["--count", "5", "--batch-size", "2", "--steps", "2", "--scheduler", "ddim", "--seed", "7"]
    settings += ["--guidance", "2", "--guidance-mode", "power-cosine", "--cfg-channels", "3", "--fine-ratio", "0.25"]
    keep = ["--save", str(tmp_path / "samples.npz"), "--output", str(tmp_path / "report.json")]
    weights = ["--inception", inception_weights, "--any-inception", "--device", "cpu"]
    assert main([*command, *settings, *keep, *weights]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["fid"] > 0
    told = report["settings"]
    assert (told["steps"], told["seed"], told["labels"], told["dtype"]) == (2, 7, "balanced", "float32")
    assert (told["guidance"]["mode"], told["guidance"]["channels"]) == ("power-cosine", 3)
    assert told["grain_maps"] == "random, fine ratio 0.25"
    assert told["weights"]["vae"] == sha256_of(tmp_path / "run" / "vae" / "model.safetensors")
    # The same options draw the same samples with sample.py.
    words = [
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "s"),
        "--npz",
        str(tmp_path / "s.npz"),
        "--device",
        "cpu",
    ]
    assert sampling.main([*words, *settings]) == 0
    with np.load(tmp_path / "samples.npz") as kept, np.load(tmp_path / "s.npz") as drawn:
        np.testing.assert_array_equal(kept["arr_0"], drawn["arr_0"])
        assert kept["arr_1"].tolist() == [0, 1, 2, 0, 1]
    assert not list(tmp_path.glob("*.rank*"))

    # What is wrong with the reference is an error before anything is drawn.
    monkeypatch.setattr(D2iT, "__call__", lambda self, number=None, **kw: None if number == 0 else 1 / 0)
    small = save_folder(tmp_path / "small", pictures(5, 10))
    assert main(["generation", "--checkpoint", str(tmp_path / "run"), "--reference", str(small), *weights]) == 2
    assert (
        f"samples of {side} x {side} pixels cannot be compared with a reference of 16 x 16" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["generation", "--samples", "nowhere", "--reference", "r.npz"], "no Inception weights given"),
        (["statistics", "nowhere", "--save", "s.npz", "--inception", "none.pth"], "none.pth: no such file"),
        (["generation", "--samples", "x", "--reference", "r", "--metrics", "kid"], "unknown metric 'kid'"),
        (["reconstruction", "--checkpoint", "nowhere", "--data", "demo"], "nowhere"),
        (["reconstruction", "--checkpoint", "nowhere", "--data", "demo", "--lpips", "l"], "nowhere"),
        (["generation", "--checkpoint", "nowhere", "--reference", "r", "--count", "1"], "--count must be at least 2"),
        (["generation", "--samples", "x", "--reference", "r", "--metrics", ","], "none named"),
        (["generation", "--samples", "x", "--reference", "r", "--save", "s.npz"], "--save goes with a --checkpoint"),
        (
            ["generation", "--samples", "x", "--reference", "r", "--guidance", "2"],
            "--guidance goes with a --checkpoint",
        ),
        (["generation", "--samples", "x", "--reference", "r", "--guide", "w"], "--guide goes with a --checkpoint"),
        (["generation", "--samples", "x", "--reference", "r", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["statistics", "x", "--save", "s.txt"], "--save: the name must end in .npz"),
        (["statistics", "x", "--save", "/proc/none/s.npz"], "--save /proc/none/s.npz: No such file or directory"),
        (
            ["reconstruction", "--checkpoint", "x", "--data", "demo", "--ratios", "2"],
            "--ratios must be in 0 ... 1, got 2",
        ),
        (
            ["reconstruction", "--checkpoint", "x", "--data", "demo", "--count", "0"],
            "--count must be at least 2, got 0",
        ),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, match, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


# ---- reconstruction -----------------------------------------------------------------------------------------------


def test_the_command_reconstructs_what_can_be_read(tmp_path, capsys):
    from d2it.models import DynamicVAE

    torch.manual_seed(0)
    DynamicVAE.from_preset("tiny", channels=8).save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(pictures(120, 3, size=32)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i:03d}.png")
    (tmp_path / "photos" / "005.png").write_bytes(b"not a photo")
    words = ["reconstruction", "--checkpoint", tmp_path / "vae", "--data", tmp_path / "photos", "--ratios", "0.5"]
    words += ["--device", "cpu", "--image-size"]
    assert main([*map(str, words), "32", "--output", str(tmp_path / "new" / "report.json")]) == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (report["settings"]["count"], report["settings"]["skipped"]) == (119, 1)
    assert report["rows"][0]["fine_ratio"] == 0.5
    assert main([*map(str, words), "40"]) == 2
    assert "--image-size must be a multiple of the VAE's regions of 16, got 40 x 40" in capsys.readouterr().err


def test_reconstruction_spends_the_codes_of_the_ratio():
    from d2it.evaluation.reconstruction import evaluate_reconstruction
    from d2it.models import DynamicVAE

    torch.manual_seed(0)
    vae = DynamicVAE.from_preset("tiny").eval()
    side = 4 * vae.config.region_size
    photos = pictures(6, 9, size=side)
    photos[:, :, : side // 2] //= 8  # calmer above: the ratios have something to tell apart
    rows = evaluate_reconstruction(vae, lambda: photos.split(4), [0, 0.5, 1], extractor=SmallExtractor())
    fine, coarse = 16 * (vae.config.code_sizes[0] // vae.config.code_sizes[-1]) ** 2, 16
    assert [row["codes"] for row in rows] == pytest.approx([coarse, (coarse + fine) / 2, fine], rel=0.02)
    assert [row["fine_share"] for row in rows] == pytest.approx([0, 0.5, 1], abs=0.02)
    for row in rows:
        assert 0 < row["psnr"] < 60
        assert -1 <= row["ssim"] <= 1
        assert row["rfid"] > 0
    with pytest.raises(UserError, match=r"a fine ratio must be in \[0, 1\], got 1.5"):
        evaluate_reconstruction(vae, lambda: photos.split(4), [1.5])


def test_reconstruction_is_what_the_vae_gives_back(tmp_path, inception_weights):
    from d2it.models import DynamicVAE

    torch.manual_seed(0)
    vae = DynamicVAE.from_preset("tiny").eval()
    vae.save_pretrained(tmp_path / "vae")
    photos = pictures(5, 9, size=64)
    folder = save_folder(tmp_path / "photos", photos)
    words = ["reconstruction", "--checkpoint", str(tmp_path), "--data", str(folder), "--image-size", "64"]
    assert (
        main([*words, "--ratios", "0", "1", "--batch-size", "2", "--output", str(tmp_path / "r" / "report.json")]) == 0
    )
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    target = photos.float() / 127.5 - 1
    for row, grain in zip(report["rows"], (0, 1)):
        with torch.no_grad():
            mean, _, grains, _ = vae.encode(target, torch.full((5, 4, 4), grain))
            output = ((vae.decode(mean, grains) + 1) * 127.5).round().clamp(0, 255)
        error = ((output - photos) / 255).square().mean((1, 2, 3))
        assert row["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-3)
        assert row["codes"] == 16 * 4**grain
    settings = report["settings"]
    assert (settings["count"], settings["size"], settings["crop"]) == (5, [64, 64], "center, scaled to cover the size")
    assert settings["vae_sha256"] == sha256_of(tmp_path / "vae" / "model.safetensors")


def test_reconstruction_by_shares_of_three_grains():
    """A share is split evenly over the grains above the coarsest; every code counts."""
    from d2it.evaluation.reconstruction import evaluate_reconstruction
    from d2it.models import DynamicVAE

    factors = {"downsampling": (4, 8, 16), "encoder_mult": (1, 1, 2, 2, 4), "decoder_mult": (1, 1, 2)}
    vae = DynamicVAE.from_preset("tiny", thresholds=(3.0, 4.0), **factors).eval()
    photos = pictures(4, 9, size=64)
    rows = evaluate_reconstruction(vae, lambda: photos.split(2), [0, 0.5, 1])
    assert [row["codes"] for row in rows] == [16, 8 + 4 * 4 + 4 * 16, 8 * 4 + 8 * 16]
    assert [row["fine_share"] for row in rows] == [0, 0.5, 1]


def test_reconstruction_of_a_vae_of_one_grain():
    from d2it.evaluation.reconstruction import evaluate_reconstruction
    from d2it.models import DynamicVAE

    vae = DynamicVAE.from_preset("tiny", downsampling=(8,), encoder_mult=(1, 1, 2, 2), decoder_mult=(1, 1, 2, 2)).eval()
    photos = pictures(4, 9, size=32)
    rows = evaluate_reconstruction(
        vae, lambda: photos.split(2), [0, 0.5], lpips=lambda a, b: (a - b).abs().mean((1, 2, 3))
    )
    assert [(row["fine_ratio"], row["fine_share"], row["codes"]) for row in rows] == [(1, 1, 16)]
    assert 0 < rows[0]["lpips"] < 2


def photo_folder(path, size, count=3):
    path.mkdir()
    for i, photo in enumerate(pictures(count, 3, size=size)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
    return path


@pytest.mark.parametrize("described", ["config.yaml", "content_transformer"])
@pytest.mark.parametrize("given", ["run", "run/vae"])
@pytest.mark.parametrize(("size", "sides"), [(64, [64, 64]), ([32, 64], [32, 64])])
def test_reconstruction_takes_the_image_size_of_the_run(tmp_path, described, given, size, sides, capsys):
    from d2it.models import DynamicVAE

    DynamicVAE.from_preset("tiny", channels=8).save_pretrained(tmp_path / "run" / "vae")
    if described == "config.yaml":
        (tmp_path / "run" / "config.yaml").write_text(f"data:\n  path: demo\n  image_size: {size}\n")
    else:
        (tmp_path / "run" / described).mkdir()
        (tmp_path / "run" / described / "config.json").write_text(json.dumps({"config": {"image_size": size}}))
        (tmp_path / "run" / "config.yaml").write_text("data: {image_size: 999}")
    photos = photo_folder(tmp_path / "photos", 64)
    words = ["reconstruction", "--checkpoint", tmp_path / given, "--data", photos, "--ratios", "1", "--device", "cpu"]
    assert main([*map(str, words), "--output", str(tmp_path / "r.json")]) == 0
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["size"], settings["upsample"]) == (sides, False)
    # Smaller photos are enlarged on purpose alone.
    small = photo_folder(tmp_path / "small", 24)
    words[words.index(photos)] = small
    assert main([*map(str, words)]) == 2
    assert "000.png is 24 x 24 pixels, smaller than the 64 x" in capsys.readouterr().err
    assert main([*map(str, words), "--upsample"]) == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "is a VAE alone, which has no image size: give --image-size"),
        ("config.yaml", "data: {}", "no image size in it"),
        ("config.yaml", "data: [", "config.yaml is damaged"),
        ("config.yaml", "data: {image_size: big}", "config.yaml is damaged"),
        ("config.yaml", "data: {image_size: [1, 2, 3]}", "config.yaml is damaged"),
        ("config.yaml", "\x00", "config.yaml is damaged"),
        ("config.yaml", "!!python/object/apply:os.mkdir [executed]", "config.yaml is damaged"),
        ("content_transformer/config.json", "{", "config.json is damaged"),
        ("content_transformer/config.json", "{}", "config.json is damaged"),
        ("content_transformer/config.json", '{"config": {"image_size": true}}', "must be a multiple"),
        ("content_transformer/config.json", '{"config": {"image_size": "64"}}', "config.json is damaged"),
    ],
)
def test_a_run_without_a_readable_image_size_is_one_line(tmp_path, monkeypatch, capsys, file, content, message):
    from d2it.models import DynamicVAE

    monkeypatch.chdir(tmp_path)
    DynamicVAE.from_preset("tiny", channels=8).save_pretrained(tmp_path / "run" / "vae")
    if file:
        (tmp_path / "run" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / file).write_text(content)
    assert main(["reconstruction", "--checkpoint", "run", "--data", "demo", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "executed").exists()


def test_a_samples_folder_is_what_it_was_drawn_for(tmp_path):
    folder = save_folder(tmp_path / "samples", pictures(3, 1))
    for i in range(3):
        (folder / f"{i:04d}.png").rename(folder / f"{i:06d}.png")
    Image.new("RGB", (640, 640)).save(folder / "grid.png")
    Image.new("RGB", (640, 640)).save(folder / "grid_grain_maps.png")
    np.save(folder / "grain_maps.npy", np.zeros((3, 2, 2), np.uint8))
    opened = open_images(folder)
    assert (opened.count, opened.size) == (3, (16, 16))
    assert torch.equal(torch.cat(list(opened.batches(2))), pictures(3, 1))


@pytest.mark.parametrize("grains", [2, 3])
@pytest.mark.parametrize("flat", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 0.7, 0.95, 1])
def test_limits_of_a_ratio_give_the_nearest_share_there_is(grains, flat, ratio):
    from d2it.evaluation.reconstruction import _limits, _shares

    draw = np.random.default_rng(0)
    entropies = np.where(np.arange(200) < 200 * flat, 1.1257, draw.uniform(2, 5, 200)).astype(np.float32)
    limits = _limits(draw.permutation(entropies), _shares(ratio, grains))
    assert limits == sorted(limits)
    reachable = {float((entropies > limit).mean()) for limit in (-np.inf, *np.unique(entropies))}
    for i, limit in enumerate(limits):
        share = ratio * (grains - 1 - i) / (grains - 1)
        got = float((entropies > limit).mean())
        assert abs(got - share) == pytest.approx(min(abs(r - share) for r in reachable))


def test_reconstruction_at_shares_of_every_grain(tmp_path, capsys):
    from d2it.evaluation.reconstruction import evaluate_reconstruction
    from d2it.models import DynamicVAE

    torch.manual_seed(0)
    factors = {"downsampling": (4, 8, 16), "encoder_mult": (1, 1, 2, 2, 4), "decoder_mult": (1, 1, 2)}
    vae = DynamicVAE.from_preset("tiny", channels=8, thresholds=(3.0, 4.5), **factors).eval()
    photos = pictures(4, 9, size=64)
    calmer = torch.arange(1, 65, dtype=torch.uint8)
    photos = photos // calmer[:, None]  # fewer levels below: the rows of regions have entropies of their own
    rows = evaluate_reconstruction(vae, lambda: photos.split(2), [[0.5, 0.25], [1.0, 0.0], 0.5])
    assert [row["fine_ratio"] for row in rows] == [[0.5, 0.25], [1.0, 0.0], 0.5]
    assert [row["codes"] for row in rows] == [8 + 4 * 4 + 4 * 16, 16 * 4, 8 + 4 * 4 + 4 * 16]
    for shares in ([0.25, 0.5], [0.5], [0.5, 0.2, 0.1], [1.5, 0.5]):
        with pytest.raises(UserError, match=r"fine ratios must be 2 descending shares in \[0, 1\] for 3 grains"):
            evaluate_reconstruction(vae, lambda: photos.split(2), [shares])
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{i}.png")
    words = ["reconstruction", "--checkpoint", tmp_path / "vae", "--data", tmp_path / "photos", "--image-size", 64]
    assert main([*map(str, words), "--ratios", "0.5,0.25", "1"]) == 0
    assert "  0.5,0.25" in capsys.readouterr().out


def test_the_image_size_of_a_run_is_read_from_what_a_model_writes(tmp_path):
    from d2it.evaluation.cli import _image_size
    from d2it.models import DynamicContentTransformer

    model = DynamicContentTransformer.from_preset("tiny", image_size=32, num_classes=3)
    model.save_pretrained(tmp_path / "content_transformer")
    assert _image_size(tmp_path / "vae") == (32, 32)


def test_frechet_distance_without_eigh(monkeypatch):
    """Where `eigh` does not converge, as it may not with fewer samples than features, the distance is the same."""
    rng = torch.Generator().manual_seed(0)
    both = []
    for _ in range(2):
        statistics = GaussianStatistics(24)
        statistics.update(torch.randn(9, 24, generator=rng, dtype=torch.float64))
        both.append(statistics.gaussian())
    wanted = both[0].frechet_distance(both[1])

    def fail(matrix):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert both[0].frechet_distance(both[1]) == pytest.approx(wanted, rel=1e-6)
