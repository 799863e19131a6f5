"""Killed, stopped or fed nonsense, a run loses nothing: one rank, the real loop, a very small model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.train_server import Server, shared_server, wait_for


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints" / "toy").glob("step-*"))


@pytest.mark.parametrize("background", [True, False], ids=["background", "inline"])
def test_fifty_kills_change_nothing(server: Server, tmp_path: Path, background: bool) -> None:
    """SIGKILL at random steps, resume by the same command: the final tensors are bit-equal to an undisturbed run's.

    25 kills with checkpoints written in the background and 25 without, each up to three checkpoints after the resume.
    """
    settings = {"steps": 40, "save_every": 2, "log_every": 10, "async_save": background}
    code, expected, _ = server.run(tmp_path / "undisturbed", **settings)
    assert code == 0
    draw = random.Random(1)
    kills, lost, runs = 0, [], 0
    while kills < 25:
        folder = tmp_path / f"run-{runs}"
        newest = max((int(name.removeprefix("step-")) for name in checkpoints(folder)), default=0)
        killed = kill_at(server, folder, newest + draw.randint(0, 6), draw.uniform(0, 0.004), **settings)
        code, found, log = server.finish()
        if code == 0:  # it was done before the kill came
            assert found == expected
            runs += 1
            continue
        assert code == -signal.SIGKILL, log
        kills += 1
        newest = max((int(name.removeprefix("step-")) for name in checkpoints(folder)), default=0)
        lost.append(killed - newest)
    code, found, log = server.run(folder, **settings)
    assert (code, found) == (0, expected), log
    # At most an interval; a save in the background is waited for by the next one, so at most two.
    assert max(lost) <= (4 if background else 2), lost
    assert not list((folder / "checkpoints" / "toy").glob(".writing-*"))


@pytest.mark.parametrize("how", [{}, {"precision": "bf16", "weights": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_kill_with_repa_changes_nothing(server: Server, tmp_path: Path, how: dict[str, str]) -> None:
    """The projector, its average and its moments come back bit for bit, as the network's, its masters among them."""
    settings = {"dynamic": 1, "repa": 1, "batch_size": 2, "steps": 5, "save_every": 2, "log_every": 1, **how}
    code, expected, log = server.run(tmp_path / "undisturbed", **settings)
    assert code == 0, log
    kill_at(server, tmp_path / "killed", 3, 0.0, **settings)
    code, _, log = server.finish()
    assert code == -signal.SIGKILL, log
    code, found, log = server.run(tmp_path / "killed", **settings)
    assert (code, found) == (0, expected), log
    (row, *_) = [json.loads(line) for line in (tmp_path / "killed" / "logs" / "toy.jsonl").read_text().splitlines()]
    assert "content/repa" in row


def kill_at(server: Server, folder: Path, step: int, later: float, **settings: object) -> int:
    """Starts a run and SIGKILL it `later` seconds after it came to `step`; returns the step that it was at."""
    progress = folder / "step-0"
    progress.unlink(missing_ok=True)
    (pid,) = server.start(folder, **settings)
    with contextlib.suppress(ProcessLookupError):
        while not (progress.exists() and int(progress.read_text() or 0) >= step):
            os.kill(pid, 0)
            time.sleep(0.0005)
        time.sleep(later)
        os.kill(pid, signal.SIGKILL)
    return int(progress.read_text() or 0)  # killed between making the file and writing to it


def test_stopped_runs_save_and_say_where(server: Server, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / number.name
        settings = {"steps": 100000, "save_every": 100000, "log_every": 1}
        (pid,) = server.start(folder, **settings)
        wait_for(folder / "logs" / "toy.jsonl")
        os.kill(pid, number)
        code, _, log = server.finish()
        assert code == 128 + number
        (saved,) = checkpoints(folder)
        assert f"saved {folder}/checkpoints/toy/{saved}" in log
        assert "the same command resumes" in log


def test_stop_and_resume_is_exact(server: Server, tmp_path: Path) -> None:
    settings = {"steps": 300, "save_every": 1000, "log_every": 1}
    _, expected, _ = server.run(tmp_path / "a", **settings)
    (pid,) = server.start(tmp_path / "b", **settings)
    wait_for(tmp_path / "b" / "logs" / "toy.jsonl")
    os.kill(pid, signal.SIGTERM)
    code, _, _ = server.finish()
    assert code == 128 + signal.SIGTERM
    code, found, _ = server.run(tmp_path / "b", **settings)
    assert (code, found) == (0, expected)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "logs" / "toy.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 301))  # the log goes on where it was, no line twice


@pytest.mark.parametrize("background", [True, False], ids=["background", "inline"])
def test_a_picture_that_fails_costs_no_step(server: Server, tmp_path: Path, background: bool) -> None:
    """The last step is saved before it is published, and the same command publishes it."""
    settings = {"steps": 6, "save_every": 100, "async_save": background}
    code, _, log = server.run(tmp_path, picture_fails=1, **settings)
    assert code == 2
    assert log.splitlines()[-1] == "error: no such picture"
    assert checkpoints(tmp_path) == ["step-00000006"]
    for _ in range(2):  # the second time there is nothing left to do
        code, found, _ = server.run(tmp_path, **settings)
        assert code == 0
        assert (tmp_path / "published-0").read_text() == "6\n"
    assert (tmp_path / "starts-0").read_text() == "0\n"
    assert found == server.run(tmp_path / "undisturbed", **settings)[1]


def test_non_finite_losses_are_skipped_and_counted(server: Server, tmp_path: Path) -> None:
    code, _, _ = server.run(tmp_path, steps=10, nan="3-5", log_every=10, save_every=10)
    assert code == 0
    (row,) = (json.loads(line) for line in (tmp_path / "logs" / "toy.jsonl").read_text().splitlines())
    assert row["toy/skipped_steps"] == 2


def test_non_finite_losses_in_a_row_stop_the_run(server: Server, tmp_path: Path) -> None:
    """The checkpoints are those from before the streak, and the message names the newest; it comes again."""
    for _ in range(2):
        code, _, log = server.run(tmp_path, steps=20, nan="6-7-8-9", skip_limit=3, save_every=1, log_every=1)
        assert code == 2
        assert "3 steps in a row without a finite gradient in toy" in log
        assert f"the last good checkpoint is {tmp_path}/checkpoints/toy/step-00000006" in log
        assert "lower toy.lr" in log
        assert "Traceback" not in log
        assert checkpoints(tmp_path)[-1] == "step-00000006"
    assert server.run(tmp_path, steps=12, save_every=1)[0] == 0  # without the NaN, from step 6


@pytest.mark.parametrize("nan", ["8-9", "0-1-2-3-4-5-6-7-8-9"])
def test_the_last_steps_are_held_to_it_too(server: Server, tmp_path: Path, nan: str) -> None:
    """A run that ends within a streak is not published as if nothing had happened, however high the limit is."""
    code, _, log = server.run(tmp_path, steps=10, nan=nan, skip_limit=20, save_every=4, log_every=4)
    assert code == 2
    assert "steps in a row without a finite gradient in toy, by step 10" in log
    assert "step-00000010" not in checkpoints(tmp_path)


@pytest.mark.parametrize("what", ["weights", "average", "moments"])
@pytest.mark.parametrize("background", [True, False], ids=["background", "inline"])
def test_what_is_not_finite_is_never_saved(server: Server, tmp_path: Path, what: str, background: bool) -> None:
    """However it became so: the good checkpoints stay, the message names the newest, and the run goes on from it."""
    settings = {"save_every": 2, "keep": 1, "async_save": background}
    code, _, log = server.run(tmp_path, steps=12, spoil=what, spoil_at=5, **settings)
    assert code == 2
    assert "is not finite at step 6, so it is neither saved nor published: lower toy.lr or set toy.clip" in log
    assert f"the last good checkpoint is {tmp_path}/checkpoints/toy/step-00000004" in log
    assert checkpoints(tmp_path) == ["step-00000004"]
    code, found, _ = server.run(tmp_path, steps=12, **settings)
    assert (code, found) == server.run(tmp_path / "undisturbed", steps=12, **settings)[:2]


def test_a_checkpoint_that_is_not_finite_is_not_resumed(server: Server, tmp_path: Path) -> None:
    """As a version without the check could write it."""
    code, _, _ = server.run(tmp_path, steps=4, save_every=2, spoil="weights", spoil_at=3, unchecked=1)
    assert code == 2  # the worker itself restores at its end
    code, _, log = server.run(tmp_path, steps=8, save_every=2)
    assert code == 2
    assert "is not finite: move the folder away to resume from the one before it" in log


def test_checkpoint_of_another_model_is_refused(server: Server, tmp_path: Path) -> None:
    assert server.run(tmp_path, steps=4, save_every=4)[0] == 0
    code, _, log = server.run(tmp_path, steps=8, save_every=4, width=24)
    assert code == 2
    assert "model.width is 16 there and 24 here" in log.splitlines()[-1]
    assert checkpoints(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_is_refused(server: Server, tmp_path: Path, name: str) -> None:
    assert server.run(tmp_path, steps=4, save_every=2)[0] == 0
    path = tmp_path / "checkpoints" / "toy" / "step-00000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, _, log = server.run(tmp_path, steps=8, save_every=2)
    assert code == 2
    assert f"{path}: damaged checkpoint, SHA-256 differs" in log
    path.parent.rename(tmp_path / "moved away")
    assert server.run(tmp_path, steps=8, save_every=2)[0] == 0  # from step 2, as the message advises


def test_truncated_and_missing_files_are_refused(server: Server, tmp_path: Path) -> None:
    assert server.run(tmp_path, steps=4, save_every=4)[0] == 0
    folder = tmp_path / "checkpoints" / "toy" / "step-00000004"
    for path in (folder / "__0_0.distcp", folder / "manifest.json"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        code, _, log = server.run(tmp_path, steps=8, save_every=4)
        assert code == 2
        assert "damaged checkpoint" in log
        path.unlink()
        assert server.run(tmp_path, steps=8, save_every=4)[0] == 2
        path.write_bytes(content)
    assert server.run(tmp_path, steps=8, save_every=4)[0] == 0


@pytest.mark.parametrize("background", [True, False], ids=["background", "inline"])
def test_a_full_disk_leaves_the_last_good_checkpoint(server: Server, tmp_path: Path, background: bool) -> None:
    """The file size limit stands for the disk: writes past it fail as on a full one."""
    settings = {"save_every": 2, "width": 64, "async_save": background}
    assert server.run(tmp_path, steps=4, **settings)[0] == 0
    code, _, log = server.run(tmp_path, steps=8, file_limit=8192, **settings)
    assert code == 2, log
    assert "step-00000006: could not be saved" in log
    assert "the last good checkpoint is" in log
    assert "Traceback" not in log
    assert checkpoints(tmp_path)[-1] == "step-00000004"
    assert not list((tmp_path / "checkpoints" / "toy").glob(".writing-*"))
    assert server.run(tmp_path, steps=8, **settings)[0] == 0


def test_an_unwritable_folder_is_said_before_the_first_step(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, log = server.run(tmp_path / "file" / "run", steps=4)
    assert code == 2
    assert "cannot write checkpoints here: Not a directory" in log
    assert "Traceback" not in log


def test_only_the_newest_checkpoints_are_kept(server: Server, tmp_path: Path) -> None:
    assert server.run(tmp_path, steps=10, save_every=2, keep=2)[0] == 0
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000010"]
    assert not list((tmp_path / "checkpoints" / "toy").glob(".*"))
