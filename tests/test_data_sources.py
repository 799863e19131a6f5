"""Image sources: what each format yields, ADM's crop, and untrusted files."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import DemoPhotos, ImageFolder, NpzPack, WebDatasetShards, decode, open_source
from d2it.data.decode import Unreadable, center_crop, random_crop
from d2it.errors import UserError
from d2it.seeds import Draws


def picture(seed=0, width=40, height=32):
    """A smooth random RGB picture: JPEG keeps it within a few levels."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_pack(path, files, labels=None, save=np.savez, **arrays):
    offsets = np.cumsum([0, *(len(f) for f in files)])
    fields = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}
    if labels is not None:
        fields["labels"] = np.asarray(labels)
    save(path, **{**fields, **arrays})


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


FILES = [encoded(picture(i)) for i in range(4)]
PIXELS = [np.asarray(picture(i)) for i in range(4)]


@pytest.fixture(params=["flat", "classes", "npz", "npz-compressed", "tar", "tar-folder"])
def any_source(request, tmp_path):
    """The same four pictures in every format, and their labels."""
    kind, labels = request.param, [0, 0, 1, 1]
    if kind == "flat":
        for i, data in enumerate(FILES):
            (tmp_path / f"{i}.png").write_bytes(data)
        return open_source(tmp_path, (32, 40)), [-1] * 4
    if kind == "classes":
        for i, data in enumerate(FILES):
            folder = tmp_path / f"class{i // 2}" / "deep"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(data)
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").write_text("not an image")
        return open_source(str(tmp_path), (32, 40)), labels
    if kind.startswith("npz"):
        save = np.savez if kind == "npz" else np.savez_compressed
        write_pack(tmp_path / "pack.npz", FILES, labels, save, classes=np.array(["cat", "dog"]))
        return open_source(tmp_path / "pack.npz", (32, 40)), labels
    for shard in range(2):
        members = []
        for i in (2 * shard, 2 * shard + 1):
            label = (f"{i}.cls", str(labels[i]).encode()) if shard else (f"{i}.json", b'{"label": %d}' % labels[i])
            members += [(f"{i}.png", FILES[i]), label]
        write_tar(tmp_path / f"shard-{shard:03d}.tar", members)
    return open_source(tmp_path if kind == "tar-folder" else tmp_path / "shard-{000..001}.tar", (32, 40)), labels


def test_every_format_gives_the_same_pictures_and_labels(any_source):
    source, labels = any_source
    assert len(source) == 4
    assert source.num_classes == max(labels) + 1
    for i in range(4):
        sample = source[i]
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].is_contiguous()
        np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), PIXELS[i])
        assert (int(sample["label"]), int(sample["index"])) == (labels[i], i)
    with pytest.raises(IndexError):
        source[4]


def test_every_source_survives_the_trip_to_a_spawned_worker(any_source):
    source, _ = any_source
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.pixels(2), source.pixels(2))
    if isinstance(getattr(source, "_bytes", None), np.memmap):
        assert len(pickle.dumps(source)) < len(source._bytes)  # the map is opened again, its content stays


def test_class_names_and_checks_of_the_number_of_classes(tmp_path):
    write_pack(tmp_path / "p.npz", FILES, [0, 1, 2, 1], classes=np.array(["a", "b", "c"]))
    source = open_source(tmp_path / "p.npz", 16)
    assert source.classes == ["a", "b", "c"]
    source.require_classes(3)
    with pytest.raises(UserError, match="labels reach 2, num_classes is 2"):
        source.require_classes(2)
    write_pack(tmp_path / "q.npz", FILES)
    with pytest.raises(UserError, match="needs labels"):
        open_source(tmp_path / "q.npz", 16).require_classes(2)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "RGBA", "1")),
    ],
)
def test_formats_and_modes_decode_as_pillow_does(kind, mode):
    image = picture(1).convert(mode)
    data = encoded(image, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode.decode(data)), expected)


def adm_center_crop(image, size):
    """guided-diffusion's crop, from its description: BOX halvings, one BICUBIC to the short side, cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.size[0] * factor), round(image.size[1] * factor)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("size", [16, 24, 31])
@pytest.mark.parametrize("shape", [(40, 32), (32, 71), (129, 203), (300, 301), (97, 31), (31, 31)])
def test_square_center_crop_is_adms(shape, size):
    image = picture(3, *shape)
    np.testing.assert_array_equal(np.asarray(center_crop(image, (size, size))), adm_center_crop(image, size))


def test_upsampling_is_adms_and_must_be_asked_for(tmp_path):
    (tmp_path / "small.png").write_bytes(encoded(picture(0, 20, 12)))
    source = open_source(tmp_path, 16)
    with pytest.raises(UserError, match=r"small\.png is 20 x 12 pixels, smaller than the 16 x 16 .*upsample"):
        source[0]
    enlarged = open_source(tmp_path, 16, upsample=True)[0]["image"].permute(1, 2, 0)
    np.testing.assert_array_equal(enlarged, adm_center_crop(picture(0, 20, 12), 16))


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (24, 24)])
@pytest.mark.parametrize("shape", [(40, 40), (203, 129), (90, 400)])
def test_rectangles_cover_and_center(shape, size):
    image = picture(2, *shape)
    crop = center_crop(image, size)
    assert crop.size == (size[1], size[0])
    mirrored = center_crop(image.transpose(Image.Transpose.ROTATE_180), size).transpose(Image.Transpose.ROTATE_180)
    # Centred: rotating before or after differs by at most the odd row or column and the halving's remainder.
    difference = np.abs(np.asarray(crop, np.int16) - np.asarray(mirrored, np.int16))
    assert difference.mean() < 6
    draws = Draws(0, 5)
    assert random_crop(image, size, draws).size == (size[1], size[0])


def test_augmentation_flips_half_and_follows_the_draws(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES[0])
    plain = open_source(tmp_path, (32, 40))
    flipping = open_source(tmp_path, (32, 40), augment=True)
    flipped = 0
    for position in range(200):
        pixels = flipping.pixels(0, Draws(7, position))
        np.testing.assert_array_equal(pixels, flipping.pixels(0, Draws(7, position)))
        is_flipped = not np.array_equal(pixels, PIXELS[0])
        np.testing.assert_array_equal(pixels, PIXELS[0][:, ::-1] if is_flipped else PIXELS[0])
        flipped += is_flipped
    assert 70 <= flipped <= 130
    np.testing.assert_array_equal(plain.pixels(0, Draws(7, 0)), PIXELS[0])
    np.testing.assert_array_equal(flipping.pixels(0), PIXELS[0])
    random = open_source(tmp_path, 16, crop="random")
    assert len({random.pixels(0, Draws(7, p)).tobytes() for p in range(20)}) > 10


def test_demo_photos_need_no_data_and_never_change():
    source = open_source("demo", (32, 48))
    assert isinstance(source, DemoPhotos)
    assert (len(source), source.num_classes) == (2048, 8)
    assert "chelsea" in source.classes
    first = source.pixels(9)
    np.testing.assert_array_equal(first, DemoPhotos((32, 48)).pixels(9))
    assert first.shape == (32, 48, 3)
    assert not np.array_equal(first, source.pixels(17))  # the same photo, another crop
    assert min(source.pixels(i).std() for i in range(32)) > 4  # pictures, not blank corners
    with pytest.raises(UserError, match="smaller than the 512"):
        DemoPhotos(512).pixels(1)
    assert DemoPhotos(512, upsample=True).pixels(1).shape == (512, 512, 3)


# What a path may be


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "no such file or folder"),
        (lambda p: p, "holds no images"),
        (lambda p: p / "absent.npz", "no such file or folder"),
        (lambda p: p / "absent-*.tar", "no such file or folder"),
        (lambda p: p / "absent-{0..3}.tar", r"absent-0\.tar: no such file"),
        (lambda p: p / "{0..99999999}.tar", "more than a million shards"),
        (lambda p: (p / "x.h5").touch() or p / "x.h5", "neither a folder"),
    ],
)
def test_a_path_with_nothing_usable_is_one_clear_line(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, 16)
    assert "\n" not in str(caught.value)


def test_images_beside_class_folders_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(FILES[0])
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "b.png").write_bytes(FILES[1])
    with pytest.raises(UserError, match=r"a\.png.*beside folders"):
        open_source(tmp_path, 16)


def test_links_between_folders_end(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(FILES[0])
    os.symlink(tmp_path, tmp_path / "one" / "loop")
    os.symlink(tmp_path / "one", tmp_path / "two")
    assert len(ImageFolder(tmp_path, 16)) == 1


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(FILES[0])
    source = ImageFolder(tmp_path, 16)
    assert source.pixels(0).shape == (16, 16, 3)


@pytest.mark.parametrize("size", [0, -3, (16,), (16, 0), 1.5, (16.0, 16), "256"])
def test_image_size_is_checked(size):
    with pytest.raises((ValueError, TypeError)):
        open_source("demo", size)


# Hostile pictures


def png_header(width, height):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def jpeg_header(width, height):
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width, height):
    data = struct.pack("<4sI", b"VP8X", 10) + b"\0\0\0\0"
    data += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    data += encoded(picture(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


def bmp_header(width, height):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


@pytest.mark.parametrize("bomb", [png_header, jpeg_header, webp_header, bmp_header])
@pytest.mark.parametrize("size", [(9000, 8000), (16000, 16000)])
def test_bombs_are_refused_by_their_header(bomb, size, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(Image.Image, "convert", touched)
    with pytest.raises(Unreadable):
        decode.decode(bomb(*size))


def test_the_pixel_cap_is_the_callers():
    data = encoded(picture(0, 40, 32))
    with pytest.raises(Unreadable, match=r"40 x 32 pixels, above the cap of 1,000"):
        decode.decode(data, max_pixels=1000)
    assert decode.decode(data, max_pixels=1280).size == (40, 32)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"GIF89a" + bytes(50),
        encoded(picture(), "TIFF"),
        encoded(picture(), "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        pickle.dumps(Bomb()),
        FILES[0][:60],
        encoded(picture(), "JPEG")[:-20],
        encoded(picture(), "WEBP")[:-20],
        encoded(picture(), "BMP")[:-20],
    ],
)
def test_other_formats_and_truncated_files_are_unreadable(data):
    with pytest.raises(Unreadable) as caught:
        decode.decode(data)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_fuzzed_pictures_decode_or_are_unreadable(kind):
    data = encoded(picture(), kind)
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        fuzzed = bytearray(data[: draw.integers(1, len(data) + 1)] if draw.random() < 0.3 else data)
        for _ in range(draw.integers(0, 6)):
            fuzzed[draw.integers(len(fuzzed))] = draw.integers(256)
        try:
            image = decode.decode(bytes(fuzzed), max_pixels=2**16)
            assert image.mode == "RGB"
        except Unreadable:
            refused += 1
    assert refused > 10


# Hostile packs


def test_a_pack_with_pickled_objects_is_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("jpeg", "offsets", "labels", "classes"):
        write_pack(tmp_path / "p.npz", FILES, **{key: np.array([Bomb()] * 4, object)})
        with pytest.raises(UserError, match=f"{key} holds pickled Python objects"):
            open_source(tmp_path / "p.npz", 16)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"jpeg": np.zeros(9)}, "jpeg must be a flat uint8"),
        ({"offsets": np.zeros(5)}, "offsets must be a flat integer"),
        ({"offsets": np.array([0])}, "holds no images"),
        ({"offsets": np.array([0, 9, 4])}, "offsets must ascend"),
        ({"offsets": np.array([-1, 9])}, "offsets must ascend"),
        ({"offsets": np.array([0, 10**9])}, "offsets must ascend"),
        ({"labels": np.array([0, 1])}, "labels must be 4 integers"),
        ({"labels": np.array([0, 1, -1, 0])}, "must not be negative"),
        ({"labels": np.array([0, 1, 2, 0]), "classes": np.array(["a", "b"])}, "label 2 has no name"),
    ],
)
def test_a_pack_that_does_not_add_up_is_refused(tmp_path, arrays, message):
    write_pack(tmp_path / "p.npz", FILES, **arrays)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "p.npz", 16)


def test_a_pack_without_offsets_and_one_that_is_no_zip(tmp_path):
    np.savez(tmp_path / "p.npz", jpeg=np.zeros(4, np.uint8))
    with pytest.raises(UserError, match="no array 'offsets'"):
        open_source(tmp_path / "p.npz", 16)
    (tmp_path / "q.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a readable"):
        open_source(tmp_path / "q.npz", 16)


def test_a_truncated_or_fuzzed_pack_is_refused_or_read(tmp_path):
    write_pack(tmp_path / "p.npz", FILES, [0, 1, 2, 3])
    data = (tmp_path / "p.npz").read_bytes()
    draw = np.random.default_rng(1)
    refused = 0
    for trial in range(80):
        fuzzed = bytearray(data[: draw.integers(len(data))] if trial % 2 else data)
        for _ in range(8):
            fuzzed[draw.integers(len(fuzzed))] = draw.integers(256)
        (tmp_path / "f.npz").write_bytes(fuzzed)
        try:
            open_source(tmp_path / "f.npz", 16).fetch([0, 1])
        except UserError:
            refused += 1
    assert refused >= 40


def test_a_pack_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (50 * 2**20,)})
        archive.writestr("jpeg.npy", header.getvalue() + bytes(50 * 2**20))
        offsets = io.BytesIO()
        np.save(offsets, np.array([0, 10]))
        archive.writestr("offsets.npy", offsets.getvalue())
    with pytest.raises(UserError, match=r"claims .* refused"):
        open_source(tmp_path / "p.npz", 16)


# Hostile shards


def test_shards_never_extract_and_never_follow(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(FILES[3])
    link, hard, pipe = tarfile.TarInfo(), tarfile.TarInfo(), tarfile.TarInfo()
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
    hard.type, hard.linkname = tarfile.LNKTYPE, str(tmp_path / "secret.png")
    pipe.type = tarfile.FIFOTYPE
    write_tar(
        inside / "s.tar",
        [
            ("../../escape.png", FILES[0]),
            ("/absolute.png", FILES[1]),
            ("link.png", link),
            ("hard.png", hard),
            ("pipe.png", pipe),
            ("0.png", FILES[2]),
            ("0.pyd", pickle.dumps(Bomb())),
            ("0.pickle", pickle.dumps(Bomb())),
        ],
    )
    before = sorted(os.walk(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = open_source(inside / "s.tar", (32, 40))
    assert len(source) == 3
    for i in range(3):
        np.testing.assert_array_equal(source.pixels(i), PIXELS[i])
    assert sorted(os.walk(tmp_path)) == before


def test_a_truncated_shard_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{i}.png", FILES[i]) for i in range(4)])
    whole = (tmp_path / "s.tar").read_bytes()
    for cut in (100, 700, 1024 + len(FILES[0]) // 2, 4000):
        (tmp_path / "s.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"s\.tar"):
            open_source(tmp_path / "s.tar", 16)
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"s\.tar"):
        open_source(tmp_path / "s.tar", 16)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{i}.png", FILES[i]) for i in range(4)])
    data = bytearray((tmp_path / "s.tar").read_bytes())
    with tarfile.open(tmp_path / "s.tar") as tar:
        third = tar.getmembers()[2].offset
    data[third + 150] ^= 0xFF  # its checksum
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged tar header at byte {third:,}"):
        open_source(tmp_path / "s.tar", 16)


def test_a_negative_member_size_does_not_loop(tmp_path):
    info = tarfile.TarInfo("0.png")
    info.size = -5120
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "s.tar").write_bytes(bytes(0) + header + bytes(10240))
    with pytest.raises(UserError, match=r"s\.tar"):
        open_source(tmp_path / "s.tar", 16)


def test_compressed_and_empty_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        info = tarfile.TarInfo("0.png")
        info.size = len(FILES[0])
        tar.addfile(info, io.BytesIO(FILES[0]))
    with pytest.raises(UserError, match="compressed ones are not supported"):
        open_source(tmp_path / "z.tar", 16)
    write_tar(tmp_path / "e.tar", [("readme.txt", b"hello")])
    with pytest.raises(UserError, match="no images inside"):
        open_source(tmp_path / "e.tar", 16)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("cls", b"seven"),
        ("cls", b"1_000"),
        ("cls", b"0x10"),
        ("cls", b"1.0"),
        ("cls", b""),
        ("cls", b"9" * 5000),
        ("cls", b"\xff"),
        ("cls", b"-1"),
        ("json", b'{"label": "7"}'),
        ("json", b'{"label": true}'),
        ("json", b'{"label": 1e400}'),
        ("json", b"[" * 100000),
        ("json", json.dumps({"label": 10**30}).encode()),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path, suffix, content):
    write_tar(tmp_path / "s.tar", [("a/0.png", FILES[0]), (f"a/0.{suffix}", content)])
    with pytest.raises(UserError, match="label"):
        open_source(tmp_path / "s.tar", 16)


def test_labels_on_some_samples_only_are_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("0.png", FILES[0]), ("0.cls", b"1"), ("1.png", FILES[1])])
    with pytest.raises(UserError, match=r"::1 has no label"):
        open_source(tmp_path / "s.tar", 16)


def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path):
    write_tar(tmp_path / "s.tar", [("v1.0/a.png", FILES[0]), ("v1.0/a.cls", b"3"), ("v1.0/a.seg.png", FILES[1])])
    source = open_source(tmp_path / "s.tar", (32, 40))
    assert isinstance(source, WebDatasetShards)
    assert len(source) == 1
    assert source.label(0) == 3
    assert source.name(0).endswith("s.tar::v1.0/a")


def test_a_stored_pack_is_mapped_and_a_compressed_one_read(tmp_path):
    write_pack(tmp_path / "a.npz", FILES)
    write_pack(tmp_path / "b.npz", FILES, save=np.savez_compressed)
    assert isinstance(NpzPack(tmp_path / "a.npz", 16)._bytes, np.memmap)
    assert not isinstance(NpzPack(tmp_path / "b.npz", 16)._bytes, np.memmap)
