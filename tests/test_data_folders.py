"""One way to find the pictures of a folder: the same set for training, calibration, evaluation and `--photo`."""

import io
import logging
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import ImageSource, calibrate, open_source
from d2it.data.decode import Unreadable, center_crop, decode, decode_gray
from d2it.data.sources import find_images
from d2it.errors import UserError
from d2it.evaluation.images import open_images
from d2it.sampling.grain_maps import choose_maps, read_grain_maps
from d2it.training.config import load
from d2it.training.run import _source


def picture(seed=0, width=40, height=32):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def put(path, seed=0, image=None, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(seed)).save(path, kind)
    return path


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def dead_link(path):
    path.symlink_to("nowhere.png")


def link_to_itself(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


def socket_file(path):
    os.mknod(path, 0o140600)


UNUSABLE = {
    "a FIFO": os.mkfifo,
    "a socket": socket_file,
    "a device": device,
    "a dead link": dead_link,
    "a link to itself": link_to_itself,
}


def readers(folder):
    """How many pictures each part of the project finds in a folder."""
    return {
        "training": len(open_source(folder, 16)),
        "evaluation": open_images(folder).count,
        "the listing": len(find_images(folder).files),
    }


HIDDEN = {
    "a hidden copy": lambda p: put(p / ".copy.png"),
    "a resource fork": lambda p: (p / "._0.png").write_bytes(b"\0\5\26\7"),
    "a hidden folder": lambda p: put(p / ".ipynb_checkpoints" / "0.png"),
    "a hidden folder below a hidden one": lambda p: put(p / ".trash" / ".more" / "0.png"),
    "the grid of samples": lambda p: put(p / "grid.png", image=picture(0, 300, 200)),
    "the grid of grain maps": lambda p: put(p / "grid_grain_maps.png", image=picture(0, 300, 200)),
}


@pytest.mark.parametrize("what", HIDDEN)
@pytest.mark.parametrize("linked", [False, True])
def test_hidden_files_and_grids_are_set_aside_by_every_reader(tmp_path, caplog, what, linked):
    folder = tmp_path / "samples"
    for i in range(3):
        put(folder / f"{i:06d}.png", i)
    HIDDEN[what](folder)
    if linked:
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    with caplog.at_level(logging.WARNING, "d2it.data"):
        assert readers(folder) == dict.fromkeys(("training", "evaluation", "the listing"), 3)
    assert "are not read" in caplog.text
    assert torch.cat(list(open_images(folder).batches(2))).shape == (3, 3, 32, 40)


def test_a_picture_called_grid_without_samples_beside_it_is_a_picture(tmp_path):
    put(tmp_path / "grid.png")
    assert set(readers(tmp_path).values()) == {1}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", UNUSABLE)
@pytest.mark.parametrize("count", [20, 150])
def test_what_is_no_regular_file_is_never_opened_and_counted(tmp_path, caplog, what, count):
    image = encoded(picture())
    for i in range(count):
        (tmp_path / f"{i:03d}.png").write_bytes(image)
    UNUSABLE[what](tmp_path / "odd.png")
    if count < 99:  # more than 1 %
        for read in (lambda: open_source(tmp_path, 16), lambda: open_images(tmp_path)):
            with pytest.raises(UserError, match=r"1 of 21 pictures are left out: odd\.png: .*more than 1%"):
                read()
        return
    with caplog.at_level(logging.WARNING, "d2it.data"):
        assert set(readers(tmp_path).values()) == {count}
    assert f"1 of {count + 1} pictures are left out: odd.png: " in caplog.text
    assert "1 left out" in open_source(tmp_path, 16).description


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".TIFF", ".avif", ".heic", ".jfif"])
def test_pictures_of_other_formats_do_not_vanish(tmp_path, suffix):
    put(tmp_path / "cat" / "0.png")
    put(tmp_path / "eel" / "0.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / f"0{suffix}").write_bytes(b"something")
    with pytest.raises(UserError, match=f"1 of 3 pictures are left out: dog/0{suffix}: not .jpg"):
        open_source(tmp_path, 16)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo.png", "fifo.npz", "fifo.tar", "fifo", "zero.png", "zero.npz", "zero.tar"])
def test_a_path_that_is_no_regular_file_is_one_line(tmp_path, kind):
    if kind.startswith("fifo"):
        os.mkfifo(tmp_path / kind)
    else:
        (tmp_path / kind).symlink_to("/dev/zero")
    for read in (
        lambda path: open_source(path, 16),
        open_images,
        lambda path: calibrate.main([str(path), "--workers", "0"]),
        lambda path: read_grain_maps(path, (4, 4), 2),
    ):
        with pytest.raises(UserError, match=kind) as caught:
            read(tmp_path / kind)
        assert "\n" not in str(caught.value)


def test_a_file_that_becomes_a_fifo_is_counted_and_not_waited_for(tmp_path):
    for i in range(120):
        (tmp_path / f"{i:03d}.png").write_bytes(b"" if i == 7 else encoded(picture()))
    source = open_source(tmp_path, 16)
    (tmp_path / "007.png").unlink()
    os.mkfifo(tmp_path / "007.png")
    assert source.fetch([6, 7, 8])["unreadable"] == [(7, str(tmp_path / "007.png"), "not a regular file")]


# Links


def test_linked_folders_are_followed_once_and_what_lies_there_keeps_its_name(tmp_path, caplog):
    for name in ("cat", "eel"):
        put(tmp_path / "data" / name / "0.png")
    put(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "data" / "aal").symlink_to("eel")
    (tmp_path / "data" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to("..")
    (tmp_path / "data" / "far2").symlink_to("far")
    with caplog.at_level(logging.WARNING, "d2it.data"):
        source = open_source(tmp_path / "data", 16)
    assert (source.classes, len(source)) == (["cat", "eel", "far"], 3)
    assert open_images(tmp_path / "data").count == 3
    assert "linked folders that are there already are not read again: aal, far2, cat/up" in caplog.text


def test_a_link_deep_inside_does_not_take_a_later_folder_away(tmp_path):
    put(tmp_path / "a" / "0.png")
    put(tmp_path / "b" / "c" / "0.png")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b" / "c")
    assert find_images(tmp_path).files == ["a/0.png", "b/c/0.png"]


def test_files_come_in_the_order_of_a_walk(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/1.png", "a/z/0.png", "a/b.png", "a-b/0.png"):
        put(tmp_path / name)
    assert find_images(tmp_path).files == ["a/1.png", "a/2.png", "a/b.png", "a/z/0.png", "a-b/0.png", "b/1.png"]


def test_photos_are_found_as_training_finds_them(tmp_path):
    for i in range(2):
        put(tmp_path / f"{i:06d}.png", i, picture(i, 64, 64))
    put(tmp_path / "grid.png", image=picture(9, 300, 300))
    put(tmp_path / ".hidden.png")
    seen = []

    def grain_map(pixels):
        seen.append(pixels)
        return torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4)

    model = SimpleNamespace(image_size=(64, 64), device="cpu", vae=SimpleNamespace(grain_map=grain_map))
    maps, named = choose_maps(SimpleNamespace(budget=None, grain_map=None, photo=tmp_path), model)
    assert "2 photos" in named
    assert maps(range(4)).shape == (4, 4, 4)
    assert torch.equal(seen[1], seen[3])


# Depths of pixels


@pytest.mark.parametrize("level", [0, 1, 128, 257, 300, 32768, 65279, 65535])
def test_sixteen_bits_are_scaled_and_not_clipped(level):
    data = encoded(Image.fromarray(np.full((8, 8), level, np.uint16)))
    assert (np.asarray(decode(data)) == round(level / 257)).all()
    levels, white = decode_gray(data)
    assert white == 65535
    assert (levels == level).all()


def test_a_photo_of_sixteen_bits_is_the_one_of_eight():
    gray = np.asarray(picture().convert("L"))
    wide = decode(encoded(Image.fromarray(gray.astype(np.uint16) * 257)))
    np.testing.assert_array_equal(np.asarray(wide)[..., 1], gray)


@pytest.mark.parametrize("mode", ["F", "I;16B"])
def test_modes_that_no_format_here_should_have_are_refused_or_scaled(mode, monkeypatch):
    image = Image.new(mode, (4, 4))
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: image)
    if mode == "F":
        with pytest.raises(Unreadable, match="pixels of mode F"):
            decode(b"")
    else:
        assert decode(b"").getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("scale", [1, 257])
def test_grain_maps_of_sixteen_bits(tmp_path, scale):
    levels = np.array([[0, 128, 255], [255, 0, 127]], np.uint16) * scale
    put(tmp_path / "m.png", image=Image.fromarray(levels if scale > 1 else levels.astype(np.uint8)))
    assert read_grain_maps(tmp_path / "m.png", (2, 3), 3).tolist() == [[[0, 1, 2], [2, 0, 1]]]
    put(tmp_path / "raw.png", image=Image.fromarray(np.array([[0, 1, 2]], np.uint16)))
    assert read_grain_maps(tmp_path / "raw.png", (1, 3), 3).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("shape", [(1500, 1), (1, 1500), (4000, 3)])
def test_a_line_of_pixels_is_cut_before_it_is_enlarged(shape, monkeypatch):
    drawn = []
    resize = Image.Image.resize

    def counted(self, size, *args, **kwargs):
        drawn.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    image = picture(1, *shape)
    monkeypatch.setattr(Image.Image, "resize", counted)
    crop = np.asarray(center_crop(image, (32, 32), upsample=True), np.int16)
    assert max(drawn) <= 32 * 32
    monkeypatch.undo()
    scale = 32 / min(shape)
    whole = image.resize((round(shape[0] * scale), round(shape[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    assert np.abs(np.asarray(whole.crop((left, top, left + 32, top + 32)), np.int16) - crop).max() <= 1


# Classes


def test_empty_class_folders_are_named(tmp_path, caplog):
    for name in ("cat", "eel"):
        put(tmp_path / name / "0.png")
    (tmp_path / "dog" / "deep").mkdir(parents=True)
    (tmp_path / "emu").mkdir()
    (tmp_path / "emu" / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING, "d2it.data"):
        assert open_source(tmp_path, 16).classes == ["cat", "eel"]
    assert "folders without an image: dog, emu" in caplog.text


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    put(tmp_path / "cat" / "0.png")
    put(tmp_path / os.fsdecode(b"caf\xe9") / "0.png")  # Latin-1
    with pytest.raises(UserError, match="its name is not UTF-8: rename it"):
        open_source(tmp_path, 16)


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["0", "1", "2", "10"], "10 is class 2, 2 is class 3"),
        (["1", "2", "3"], "1 is class 0, 2 is class 1, 3 is class 2"),
        (["00", "01", "02"], None),
        (["0", "1", "2"], None),
        (["n01440764", "n01443537"], None),
        (["1", "x"], None),
    ],
)
def test_folders_named_by_numbers(tmp_path, caplog, names, warned):
    for name in names:
        put(tmp_path / name / "a.png")
    with caplog.at_level(logging.WARNING, "d2it.data"):
        assert open_source(tmp_path, 16).classes == sorted(names)
    assert (warned in caplog.text) if warned else not caplog.text


def make_classes(kind, tmp_path, labels):
    data = encoded(picture())
    if kind == "folder":
        for i, label in enumerate(labels):
            put(tmp_path / f"{label:02d}" / f"{i}.png")
        return tmp_path
    if kind == "pack":
        np.savez(
            tmp_path / "p.npz",
            jpeg=np.frombuffer(data * len(labels), np.uint8),
            offsets=np.arange(len(labels) + 1) * len(data),
            labels=np.array(labels),
        )
        return tmp_path / "p.npz"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i, label in enumerate(labels):
            for name, content in ((f"{i}.png", data), (f"{i}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return tmp_path / "s.tar"


@pytest.mark.parametrize("kind", ["folder", "pack", "shard"])
@pytest.mark.parametrize("asked", [2, 3, 4, 1000])
def test_the_number_of_classes_is_what_is_there_unless_said_on_purpose(tmp_path, kind, asked):
    source = open_source(make_classes(kind, tmp_path, [0, 1, 2, 1]), 16)
    if asked == 3:
        source.require_classes(3)
        return
    message = "labels reach 2, num_classes is 2" if asked == 2 else f"num_classes is {asked}, but there are 3 classes"
    with pytest.raises(UserError, match=message):
        source.require_classes(asked)
    if asked > 3:
        source.require_classes(asked, allow_missing=True)
    else:
        with pytest.raises(UserError, match=message):
            source.require_classes(asked, allow_missing=True)


def test_a_configuration_allows_missing_classes_on_purpose(tmp_path):
    path = make_classes("folder", tmp_path, [0, 1, 2])
    typed = [f"data.path={path}", "data.image_size=32", "data.num_classes=8", "data.upsample=true"]
    with pytest.raises(UserError, match=r"num_classes is 8, but there are 3 classes: .*allow_missing_classes=true"):
        _source(load("configs/demo.yaml", typed))
    assert _source(load("configs/demo.yaml", [*typed, "data.allow_missing_classes=true"])).num_classes == 3


@pytest.mark.parametrize("kind", ["pack", "shard"])
def test_labels_that_no_image_has_are_named(tmp_path, caplog, kind):
    source = open_source(make_classes(kind, tmp_path, [0, 4, 4, 1]), 16)
    with caplog.at_level(logging.WARNING, "d2it.data"):
        source.require_classes(5)
    assert "no image has label 2, 3" in caplog.text


def test_a_stray_shard_beside_class_folders_is_refused(tmp_path):
    for name in ("cat", "dog"):
        put(tmp_path / name / "0.png")
    make_classes("shard", tmp_path, [0])
    with pytest.raises(UserError, match=r"holds shards \(s\.tar, \.\.\.\) beside images \(cat/0\.png"):
        open_source(tmp_path, 16)


def test_a_stray_image_beside_shards_is_refused_and_a_folder_called_tar_is_a_folder(tmp_path):
    make_classes("shard", tmp_path, [0])
    (tmp_path / "logs").mkdir()
    assert len(open_source(tmp_path, 16)) == 1
    put(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds shards"):
        open_source(tmp_path, 16)
    put(tmp_path / "other" / "x.tar" / "0.png")
    assert open_source(tmp_path / "other", 16).classes == ["x.tar"]


# Identity by content


def content_of(kind, tmp_path, labels=(0, 1, 2, 1)):
    return open_source(make_classes(kind, tmp_path, list(labels)), 16)


@pytest.mark.parametrize("kind", ["folder", "pack", "shard"])
def test_a_fingerprint_is_of_the_content_and_not_of_the_place_or_the_crop(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (content_of(kind, tmp_path / name) for name in "ab")
    assert one.fingerprint() == two.fingerprint() == content_of(kind, tmp_path / "a").fingerprint()
    assert len(one.fingerprint()) == 64
    path = make_classes(kind, tmp_path / "b", [0, 1, 2, 1])
    assert open_source(path, (32, 24), augment=True, upsample=True).fingerprint() == one.fingerprint()


@pytest.mark.parametrize("kind", ["folder", "pack", "shard"])
def test_a_fingerprint_tells_other_labels_apart(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert (
        content_of(kind, tmp_path / "a").fingerprint() != content_of(kind, tmp_path / "b", (0, 1, 2, 2)).fingerprint()
    )


@pytest.mark.parametrize("change", ["bytes", "name", "size", "count"])
def test_a_fingerprint_tells_other_files_apart(tmp_path, change):
    for i in range(70):
        put(tmp_path / "a" / f"{i:02d}.png", i)
    before = open_source(tmp_path / "a", 16).fingerprint()
    first = tmp_path / "a" / "00.png"
    if change == "bytes":  # of an image that is read; the size is the same
        data = bytearray(first.read_bytes())
        data[-20] ^= 1
        first.write_bytes(data)
    elif change == "name":
        (tmp_path / "a" / "33.png").rename(tmp_path / "a" / "33b.png")
    elif change == "size":  # of one that may not be read
        path = tmp_path / "a" / "31.png"
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        put(tmp_path / "a" / "99.png", 3)
    assert open_source(tmp_path / "a", 16).fingerprint() != before


def test_a_fingerprint_reads_few_images(tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i:03d}.png").write_bytes(b"x" * i)
    source = open_source(tmp_path, 16)
    read = []
    encoded = type(source).encoded
    monkeypatch.setattr(type(source), "encoded", lambda self, index: read.append(index) or encoded(self, index))
    source.fingerprint()
    assert len(read) == 64
    assert {0, 299} <= set(read)
    assert max(np.diff(sorted(read))) <= 5


def test_a_source_of_pictures_alone_has_a_fingerprint():
    class Gray(ImageSource):
        def __init__(self, level):
            super().__init__(4)
            self.level = level

        def __len__(self):
            return 3

        def name(self, index):
            return str(index)

        def picture(self, index):
            if index == 1:
                raise Unreadable("broken")
            return Image.new("RGB", (4, 4), (self.level,) * 3)

    assert Gray(1).fingerprint() == Gray(1).fingerprint() != Gray(2).fingerprint()


def test_the_demo_photos_have_a_fingerprint():
    first = open_source("demo", 16).fingerprint()
    assert first == open_source("demo", 32).fingerprint()


def test_nothing_else_of_a_folder_is_read(tmp_path):
    put(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "samples.npz").write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    assert set(readers(Path(tmp_path)).values()) == {1}
