"""Arrays that are read back: checked by their headers, never unpickled, and one line over damage."""

import io
import os
import resource
import zipfile

import numpy as np
import pytest
import torch

from d2it.data import open_source
from d2it.errors import UserError
from d2it.evaluation import cli
from d2it.evaluation.generation import open_reference
from d2it.evaluation.images import open_images
from d2it.evaluation.inception import Features
from d2it.npz import NpzReader, load_array, save_arrays
from d2it.sampling.grain_maps import read_grain_maps


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def header(shape, descr="|u1", fortran=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def arrays(**given):
    return {"mu": np.zeros(8), "sigma": np.eye(8), **given}


# The reader


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "bé"]),
        np.array(3),
        np.zeros((0, 3)),
        np.random.default_rng(0).random((300, 500)),
    ],
)
def test_arrays_come_back_as_numpy_reads_them(tmp_path, save, array):
    save(tmp_path / "a.npz", x=array, y=np.ones(3))
    np.save(tmp_path / "a.npy", array)
    with NpzReader(tmp_path / "a.npz") as file:
        assert file.names == ["x", "y"]
        assert (file.header("x").shape, file.header("x").dtype) == (array.shape, array.dtype)
        for found in (file.array("x"), file.map("x"), load_array(tmp_path / "a.npy", "x")):
            np.testing.assert_array_equal(found, array)
        if array.ndim and not np.isfortran(array):
            rows = list(file.rows("x", 2))
            np.testing.assert_array_equal(np.concatenate(rows) if rows else array, array)
            assert sum(map(len, file.rows("x", 2, limit=1))) == min(1, len(array))
        assert file.array("x").dtype.isnative
        assert isinstance(file.map("x"), np.memmap) == (save is np.savez and array.size > 0)


def test_load_array_takes_the_named_array_or_the_first(tmp_path):
    save_arrays(tmp_path / "a.npz", {"first": np.zeros(2), "grain_maps": np.ones(2)})
    assert load_array(tmp_path / "a.npz", "grain_maps").sum() == 2
    assert load_array(tmp_path / "a.npz", "other").sum() == 0


def objects(path):
    np.savez(path, **{key: np.array([Bomb()], object) for key in NAMES})


def structured_objects(path):
    np.savez(path, **{key: np.array([(1, Bomb())], [("a", int), ("b", object)]) for key in NAMES})


def pickle_itself(path):
    import pickle

    path.write_bytes(pickle.dumps(Bomb()))


def too_long(path):
    archive(path, dict.fromkeys(NAMES, header((2**40,)) + bytes(100)))


def overflowing(path):
    archive(path, dict.fromkeys(NAMES, header((2**62, 2**62, 3, 3)) + bytes(100)))


def negative(path):
    archive(path, dict.fromkeys(NAMES, header((-2, -50)) + bytes(100)))


def many_dimensions(path):
    archive(path, dict.fromkeys(NAMES, header((1,) * 200) + bytes(1)))


def no_elements(path):
    archive(path, dict.fromkeys(NAMES, header((2**60,), "|V0")))


def header_of_gigabytes(path):
    claim = b"\x93NUMPY\x02\x00" + (2**32 - 1).to_bytes(4, "little")
    archive(path, dict.fromkeys(NAMES, claim + b"{" * 2**25), zipfile.ZIP_DEFLATED)


def nested_header(path):
    claim = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little")
    archive(path, dict.fromkeys(NAMES, claim + b"[" * 9000))


def code_in_a_header(path):
    text = b"__import__('os').mkdir('executed')".ljust(117) + b"\n"
    archive(path, dict.fromkeys(NAMES, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text))


def bomb(path):
    archive(path, dict.fromkeys(NAMES, header((2**27,)) + bytes(2**27)), zipfile.ZIP_DEFLATED)


def lying_size(path):
    np.savez(path, **{key: np.zeros(1000) for key in NAMES})
    data = path.read_bytes()
    size = (8 * 1000 + 128).to_bytes(4, "little")
    assert size in data
    path.write_bytes(data.replace(size, (2**31 - 1).to_bytes(4, "little")))


def truncated(path):
    np.savez(path, **{key: np.zeros(1000) for key in NAMES})
    path.write_bytes(path.read_bytes()[:-300])


def wrong_crc(path):
    np.savez_compressed(path, **{key: np.random.default_rng(0).integers(0, 255, 5000, np.uint8) for key in NAMES})
    data = bytearray(path.read_bytes())
    for at in range(300, len(data) - 1200, 97):
        data[at] ^= 16
    path.write_bytes(data)


def encrypted(path):
    np.savez(path, **{key: np.zeros(9) for key in NAMES})
    data = bytearray(path.read_bytes())
    for signature, flag in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + flag] |= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice(path):
    with zipfile.ZipFile(path, "w") as file:
        for key in (*NAMES, *NAMES):
            file.writestr(f"{key}.npy", header((4,)) + bytes(4))


def nothing(path):
    archive(path, {})


def empty_file(path):
    path.write_bytes(b"")


def no_header(path):
    archive(path, dict.fromkeys(NAMES, b""))


NAMES = ("arr_0", "jpeg", "offsets", "mu", "sigma", "grain_maps")
HOSTILE = (
    objects, structured_objects, pickle_itself, too_long, overflowing, negative, many_dimensions, no_elements,
    header_of_gigabytes, nested_header, code_in_a_header, bomb, lying_size, truncated, wrong_crc, encrypted, twice,
    nothing, empty_file, no_header,
)  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("reader", ["a pack", "samples", "a reference", "a grain map"])
def test_a_hostile_archive_is_one_line_from_every_reader(tmp_path, monkeypatch, spoil, reader):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.npz"
    spoil(path)
    read = {
        "a pack": lambda: open_source(path, 16),
        "samples": lambda: list(open_images(path).batches(4)),
        "a reference": lambda: open_reference(path, lambda images: None, metrics=["fid"]),
        "a grain map": lambda: read_grain_maps(path, (2, 2), 2),
    }[reader]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"x\.npz") as caught:
        read()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", header((2**40,)), header((4,), "|O"), b"text", header((4,)) + b"12"]
)
def test_a_damaged_npy_is_one_line(tmp_path, content):
    (tmp_path / "m.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.npy: not a grain map") as caught:
        read_grain_maps(tmp_path / "m.npy", (2, 2), 2)
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_one_line_or_harmless(tmp_path, seed):
    draw = np.random.default_rng(seed)
    np.savez_compressed(tmp_path / "s.npz", arr_0=draw.integers(0, 255, (6, 8, 8, 3), np.uint8), **arrays())
    whole = (tmp_path / "s.npz").read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
        (tmp_path / "f.npz").write_bytes(data)
        try:
            assert sum(map(len, open_images(tmp_path / "f.npz").batches(4))) == 6
            open_reference(tmp_path / "f.npz", Stub(), metrics=["fid"])
        except UserError:
            refused += 1
    assert refused >= 20


# What evaluate.py makes of statistics


class Stub(torch.nn.Module):
    def forward(self, images):
        pool = images.float().flatten(1)[:, :8]
        return Features(pool, pool, pool.softmax(1))


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Runs evaluate.py generation on six samples against a reference of these arrays: (exit code, stderr)."""
    monkeypatch.setattr(cli, "_inception", lambda options, world: (Stub(), {}))
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "s.npz", arr_0=draw.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))

    def run(metrics="fid", **reference):
        np.savez(tmp_path / "r.npz", **arrays(**reference))
        words = ["generation", "--samples", tmp_path / "s.npz", "--reference", tmp_path / "r.npz", "--device", "cpu"]
        code = cli.main([*map(str, words), "--metrics", metrics])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("metrics", "reference", "message"),
    [
        ("fid", {"mu": np.full(8, np.nan)}, "mu must be finite"),
        ("fid", {"mu": np.full(8, -np.inf)}, "mu must be finite"),
        ("fid", {"mu": np.array(["a"] * 8)}, "mu must be numbers"),
        ("fid", {"mu": np.zeros(8, complex)}, "mu must be numbers"),
        ("fid", {"mu": np.zeros(8, "M8[s]")}, "mu must be numbers"),
        ("fid", {"mu": np.zeros(0)}, "mu must be finite"),
        ("fid", {"mu": np.zeros((8, 1))}, "do not fit"),
        ("fid", {"mu": np.zeros(9)}, "do not fit"),
        ("fid", {"sigma": -np.eye(8)}, "sigma is no covariance"),
        ("fid", {"sigma": np.triu(np.ones((8, 8)))}, "sigma is no covariance"),
        ("fid", {"sigma": np.full((8, 8), np.inf)}, "sigma must be finite"),
        ("fid", {"sigma": np.eye(7)}, "do not fit"),
        ("fid", {"sigma": np.array(1.0)}, "do not fit"),
        ("sfid", {"mu_s": np.full(8, np.nan), "sigma_s": np.eye(8)}, "mu_s must be finite"),
        ("fid", {"size": np.array([1])}, "size must be positive whole numbers"),
        ("fid", {"size": np.array([0, -3])}, "size must be positive whole numbers"),
        ("fid", {"size": np.array([32.0, 32.0])}, "size must be positive whole numbers"),
        ("fid", {"size": np.array([16, 16])}, "cannot be compared with"),
        ("fid", {"count": np.array("x")}, "count must be positive whole numbers"),
        ("fid", {"count": np.array([3, 4])}, "count must be positive whole numbers"),
        ("fid", {"count": np.array(-1)}, "count must be positive whole numbers"),
        ("precision", {"features": np.full((9, 8), np.nan)}, "features must be finite"),
        ("precision", {"features": np.zeros((9, 3))}, "do not fit mu"),
        ("recall", {"features": np.zeros(9)}, "do not fit mu"),
        ("precision", {"features": np.zeros((9, 8), "S3")}, "features must be numbers"),
    ],
)
def test_absurd_statistics_are_one_line(evaluate, metrics, reference, message):
    code, error = evaluate(metrics, **reference)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert "r.npz" in error or "cannot be compared with" in error


@pytest.mark.parametrize("dtype", [">f8", "<f4", "f2", "i8"])
def test_statistics_of_any_real_type_are_read(evaluate, dtype):
    assert evaluate(mu=np.zeros(8, dtype), sigma=np.eye(8).astype(dtype))[0] == 0


@pytest.mark.parametrize("reader", [open_images, lambda path: open_reference(path, Stub(), metrics=["fid"])])
def test_a_folder_called_npz_is_a_folder(tmp_path, reader):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(UserError, match="no images"):
        reader(tmp_path / "x.npz")
