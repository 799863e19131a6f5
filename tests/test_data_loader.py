"""The training stream: an order that depends on (seed, images seen) alone, and what happens when things go wrong."""

import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

from d2it.data import ImageSource, Loader, SinglePass, open_source
from d2it.data.decode import Unreadable
from d2it.distributed import World
from d2it.errors import UserError
from d2it.seeds import Draws, permutation
from d2it.training.config import Config
from d2it.training.stage import loader as loader_of_training


class Gray(ImageSource):
    """Image i is gray level i, at its left edge black; some cannot be read."""

    def __init__(self, count=200, bad=(), small=(), **options):
        super().__init__((4, 8), **options)
        self.count, self.bad, self.small = count, set(bad), set(small)
        self.labels = np.arange(count) % 7
        self.num_classes = 7
        self.description = f"{count} gray images"

    def __len__(self):
        return self.count

    def name(self, index):
        return f"gray{index}"

    def picture(self, index):
        if index in self.bad:
            raise Unreadable("broken on purpose")
        pixels = np.full((4, 6 if index in self.small else 8, 3), index % 251, np.uint8)
        pixels[:, 0] = 255
        return Image.fromarray(pixels)


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_epoch_holds_every_image_once_and_epochs_differ():
    loader = Loader(Gray(30), 10, seed=3)
    first = torch.cat([b["index"] for b in take(loader, 3)])
    second = torch.cat([b["index"] for b in take(loader, 3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(30))
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first.tolist())
    assert loader.images_seen == 60


def test_batches_cross_epochs_and_may_exceed_the_source():
    indices = torch.cat([b["index"] for b in take(Loader(Gray(7), 10, seed=0), 7)])
    for epoch in indices.reshape(10, 7):
        assert sorted(epoch.tolist()) == list(range(7))


def test_the_order_is_pinned():
    """A release that changes this breaks the resume of every run in flight."""
    assert permutation(10, 0, 0).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert [round(Draws(1, 2).uniform(), 6), round(Draws(1, 3).uniform(), 6)] == [0.461982, 0.092589]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_batch_gives_what_the_uninterrupted_stream_gives(workers):
    source = Gray(50, augment=True)
    whole = take(Loader(source, 6, seed=5), 20)
    first = Loader(source, 6, seed=5, workers=workers)
    take(first, 7)
    first.close()
    with Loader(source, 6, seed=5, start=first.images_seen, workers=workers) as second:
        assert all(same(a, b) for a, b in zip(take(second, 13), whole[7:]))
    assert second.images_seen == 120
    third = Loader(source, 6, seed=5, start=42)
    assert same(next(third), whole[7])


def test_resume_takes_up_at_a_single_image():
    source = Gray(50, augment=True)
    stream = torch.cat([b["image"] for b in take(Loader(source, 5, seed=1), 10)])
    assert torch.equal(next(Loader(source, 9, seed=1, start=13))["image"], stream[13:22])


def test_closing_loses_the_prefetched_batches_but_not_the_place():
    source = Gray(50, augment=True)
    whole = take(Loader(source, 4, seed=2), 6)
    with Loader(source, 4, seed=2, workers=2) as loader:
        batches = take(loader, 3)
        loader.close()
        batches += take(loader, 3)
    assert all(same(a, b) for a, b in zip(batches, whole))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch_without_overlap(world_size):
    source = Gray(100, augment=True)
    whole = take(Loader(source, 12, seed=9), 10)
    ranks = [
        take(Loader(source, 12 // world_size, seed=9, rank=rank, world_size=world_size), 10)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        joined = {key: torch.cat([rank[step][key] for rank in ranks]) for key in batch}
        assert same(joined, batch)


def test_seeds_differ_and_augmentation_changes_from_epoch_to_epoch():
    source = Gray(40, augment=True)
    assert not same(next(Loader(source, 40, seed=0)), next(Loader(source, 40, seed=1)))
    first, second = take(Loader(source, 40, seed=0), 2)
    flips = [b["image"][b["index"].argsort(), 0, 0, 0] == 255 for b in (first, second)]
    assert 5 < int((flips[0] ^ flips[1]).sum()) < 35


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_moves(workers):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with Loader(Gray(20, augment=True, crop="random"), 4, workers=workers) as loader:
        take(loader, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize(("workers", "ahead"), [(None, True), (0, False)])
def test_the_next_batch_is_asked_for_before_a_step_begins(workers, ahead, monkeypatch):
    """By the trainer's loader with the workers of its default; without workers nobody could read it meanwhile."""
    asked = []
    requests = Loader._requests

    def recorded(loader, position):
        for request in requests(loader, position):
            asked.append(request)
            yield request

    monkeypatch.setattr(Loader, "_requests", recorded)
    config = Config()
    config.content.batch_size, config.data.workers = 2, workers
    world = World(0, 1, 1, torch.device("cpu"))
    with loader_of_training(config, config.content, Gray(), world, 0) as stream:
        for given in range(1, 7):
            next(stream)  # and its step begins
            assert (len(asked) > given) == ahead


def test_a_single_pass_is_in_order_and_whole():
    batches = list(SinglePass(Gray(23, augment=True), 10, workers=2))
    assert [len(b["index"]) for b in batches] == [10, 10, 3]
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(23))
    assert all((b["image"][:, 0, 0, 0] == 255).all() for b in batches)  # never flipped
    given = SinglePass(Gray(23), [[5], [7, 3]])
    for _ in range(2):
        assert [b["index"].tolist() for b in given] == [[5], [7, 3]]


def _double(batch):
    return {"index": batch["index"] * 2}


@pytest.mark.parametrize("workers", [0, 1])
def test_process_runs_on_each_batch(workers):
    with Loader(Gray(20), 4, seed=1, workers=workers, process=_double) as loader:
        assert torch.equal(next(loader)["index"], 2 * next(Loader(Gray(20), 4, seed=1))["index"])


# Images that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_up_to_one_percent_unreadable_is_counted_and_replaced(workers, caplog):
    source = Gray(200, bad=(17, 18), augment=True)
    with caplog.at_level(logging.WARNING, "d2it.data"), Loader(source, 50, workers=workers) as loader:
        batches = take(loader, 8)
    indices = torch.cat([b["index"] for b in batches])
    assert len(indices) == 400
    assert int((indices == 19).sum()) == 6  # itself, and in place of 17 and 18, in each of two epochs
    assert not {17, 18} & set(indices.tolist())
    assert sorted(loader.unreadable) == ["gray17: broken on purpose", "gray18: broken on purpose"]
    assert len(caplog.records) == 2  # once each, however often they come up
    for batch in batches:
        assert torch.equal(batch["label"], batch["index"] % 7)
        assert torch.equal(batch["image"][:, 0, 0, 3].long(), batch["index"] % 251)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_unreadable_is_an_error(workers):
    with (
        Loader(Gray(200, bad=(1, 60, 199)), 50, workers=workers) as loader,
        pytest.raises(UserError, match=r"3 of 200 images cannot be read, more than 1%; the last: gray\d+: broken"),
    ):
        take(loader, 5)


def test_a_source_of_unreadable_images_ends():
    with pytest.raises(UserError, match="cannot be read"):
        next(Loader(Gray(200, bad=range(200)), 50))
    with pytest.raises(UserError, match="cannot be read"):
        list(SinglePass(Gray(20, bad=range(20)), 50))
    with pytest.raises(UserError, match="gray3 cannot be read: broken"):
        Gray(20, bad=[3])[3]


def test_a_single_pass_leaves_unreadable_images_out():
    batches = list(SinglePass(Gray(300, bad=(3, 120, 121)), 2))
    assert [len(batches[i]["index"]) for i in (0, 1, 60)] == [2, 1, 0]
    assert torch.cat([b["index"] for b in batches]).tolist() == [i for i in range(300) if i not in (3, 120, 121)]
    assert next(b["unreadable"] for b in batches if b["unreadable"]) == [(3, "gray3", "broken on purpose")]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_too_small_is_one_line_from_any_process(workers):
    with Loader(Gray(20, small=[4]), 10, workers=workers) as loader, pytest.raises(UserError) as caught:
        take(loader, 3)
    assert str(caught.value).startswith("gray4 is 6 x 4 pixels, smaller than the 8 x 4")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_in_a_folder_is_skipped(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(100):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        data = file.getvalue()
        (tmp_path / f"{i:03d}.png").write_bytes(data[: len(data) // 2] if i == 50 else data)
    loader = Loader(open_source(tmp_path, 16), 20)
    take(loader, 5)
    assert len(loader.unreadable) == 1
    assert "050.png: " in loader.unreadable[0]


class Suicidal(Gray):
    def picture(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().picture(index)


def test_a_killed_worker_is_one_line():
    with (
        Loader(Suicidal(20), 10, workers=1) as loader,
        pytest.raises(UserError, match=r"data worker.*killed by SIGKILL.*memory") as caught,
    ):
        take(loader, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"start": -1}, "start"),
        ({"workers": -1}, "workers"),
    ],
)
def test_arguments_are_checked(arguments, name):
    with pytest.raises(ValueError, match=name):
        Loader(Gray(20), **{"batch_size": 4, **arguments})


SIGNALLED = """
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[1])
    from tests.test_data_loader import Gray, take
    from d2it.data import Loader

    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append("term"))
    signal.signal(signal.SIGINT, lambda *_: asked.append("int"))
    loader = Loader(Gray(100), 10, workers=2)
    take(loader, 2)
    print("started", flush=True)
    while len(set(asked)) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
    take(loader, 40)  # far beyond what was prefetched: the workers live
    print("saved", flush=True)
    if sys.argv[2] == "raise":
        raise SystemExit(3)  # the loader is still open
"""


@pytest.mark.parametrize("ending", ["return", "raise"])
def test_signals_to_the_whole_group_leave_the_workers_to_the_main_process(ending):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SIGNALLED), root, ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert output == "saved\n", errors
        assert process.returncode == (3 if ending == "raise" else 0), errors
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return  # the group has no process left
            time.sleep(0.05)
        pytest.fail("worker processes outlived the main process")
    finally:
        process.kill()
        process.wait()
