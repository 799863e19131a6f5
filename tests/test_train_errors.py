"""What a run meets: hostile checkpoints, a second writer, dead workers, signals, damaged logs, a wrong environment."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2it import distributed
from d2it.data import Loader
from d2it.devices import memory_limit
from d2it.distributed import StopSignal, World
from d2it.errors import Interrupted, UserError, run_command
from d2it.files import atomic_write, only_writer, save_tensors
from d2it.training.checkpoint import Checkpoints
from d2it.training.meters import read_log
from d2it.training.stage import extreme_share
from tests.train_server import ENVIRONMENT

WORLD = World(0, 1, 1, torch.device("cpu"))
IDENTITY = {"stage": "toy", "model": {"width": 3}}


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"toy": {"model": {"weight": torch.randn(5, 3)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}}}


def blank() -> dict[str, Any]:
    return {"toy": {"model": {"weight": torch.zeros(5, 3)}, "optimizer": {"lr": 0.0, "betas": (0.0, 0.0)}}}


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "toy", WORLD, IDENTITY)
    checkpoints.prepare(0)
    checkpoints.save(4, state())
    return checkpoints


def reseal(folder: Path) -> None:
    """Gives the manifest the hashes of the files as they are now: whoever changes a file can do that too."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_comes_back(saved: Checkpoints) -> None:
    found = blank()
    saved.load(4, found)
    assert torch.equal(found["toy"]["model"]["weight"], state()["toy"]["model"]["weight"])
    assert found["toy"]["optimizer"] == state()["toy"]["optimizer"]


# ---- nothing that is read back executes


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, bytes]:
    code = f"open({str(mark)!r}, 'w').close()"
    calls = {
        "system": Call(os.system, f"touch {mark}"),
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, str(mark), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(mark)]),
        "call": Call(subprocess.call, ["touch", str(mark)]),
        "path": Call(Path.touch, mark),
        "getattr": Call(getattr, "text", "upper"),
        "import": Call(__import__, "os"),
        "torch.load": Call(torch.load, str(mark)),
        "nested": {"a": [Call(os.system, f"touch {mark}")]},
        "thread": Call(threading.Timer, 0, os.system, [f"touch {mark}"]),
        "loads": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {mark}"))),
    }
    return {
        **{name: pickle.dumps(value) for name, value in calls.items()},
        "protocol 0": pickle.dumps(Call(os.system, f"touch {mark}"), protocol=0),
        "builtins": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "attribute": b"\x80\x04\x8c\x10torch.serialization\x8c\x0dos.system\x93(V" + b"touch x\ntR.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x0bload.__doc__\x93.",
        "instance": b"(ios\nsystem\n.",
        "object": b"(cos\nsystem\no.",
        "extension": b"\x82\x01.",
    }


@pytest.mark.parametrize("name", list(payloads(Path("x"))))
def test_an_index_executes_nothing(name: str, saved: Checkpoints, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (saved.path(4) / ".metadata").write_bytes(payloads(mark)[name])
    reseal(saved.path(4))
    with pytest.raises(UserError) as caught:
        saved.load(4, blank())
    time.sleep(0.01)
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["toy.optimizer.lr", "toy.model.weight"])
@pytest.mark.parametrize("name", ["system", "exec", "popen", "nested"])
def test_values_in_the_shards_execute_nothing(name: str, target: str, saved: Checkpoints, tmp_path: Path) -> None:
    """A number, and a tensor that the index makes a number: torch's planner unpickles those without a restriction."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    mark, folder = tmp_path / "mark", saved.path(4)
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.state_dict_metadata[target] = BytesStorageMetadata()
    place = next(value for key, value in index.storage_data.items() if key.fqn == target)
    index.storage_data = {key: value for key, value in index.storage_data.items() if key.fqn != target}
    content = (folder / place.relative_path).read_bytes()
    torch.save(pickle.loads(b"N."), tmp_path / "evil.pt")
    evil = payloads(mark)[name]
    place.offset, place.length = len(content), len(evil)
    index.storage_data[MetadataIndex(target)] = place
    (folder / place.relative_path).write_bytes(content + evil)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reseal(folder)
    with pytest.raises(UserError) as caught:
        saved.load(4, blank())
    assert not mark.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../toy/step-00000004/__0_0.distcp", "/etc/passwd", "other.distcp"])
def test_an_index_stays_within_the_files_of_the_manifest(name: str, saved: Checkpoints) -> None:
    folder = saved.path(4)
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    reseal(folder)
    with pytest.raises(UserError, match="its index names the file"):
        saved.load(4, blank())


# ---- damaged checkpoints


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: {**manifest, **values}


@pytest.mark.parametrize(
    "change",
    [
        changed(step=4.0),
        changed(step="4"),
        changed(step=True),
        changed(step=5),
        changed(step=None),
        changed(files={}),
        changed(files=None),
        changed(files=[]),
        changed(files={"../x": {"sha256": "0" * 64}}),
        changed(identity=None),
        changed(identity={"stage": "toy"}),
        lambda manifest: {**manifest, "files": {k: {"bytes": 1} for k in manifest["files"]}},
        lambda manifest: {**manifest, "files": dict.fromkeys(manifest["files"], 5)},
        lambda manifest: {**manifest, "files": {".metadata": manifest["files"][".metadata"]}},
        lambda manifest: {**manifest, "files": {**manifest["files"], "x": {"sha256": "abc"}}},
        lambda manifest: [manifest],
        lambda manifest: "text",
        lambda manifest: {k: v for k, v in manifest.items() if k != "files"},
    ],
)
def test_a_damaged_manifest_is_one_line(change: Callable[[Any], Any], saved: Checkpoints) -> None:
    path = saved.path(4) / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError) as caught:
        saved.newest()
    assert str(saved.path(4)) in str(caught.value)
    with pytest.raises(UserError):
        saved.load(4, blank())


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 10000, b'{"step": NaN}', b'{"step": 1' + b"0" * 5000 + b"}"]
)
def test_a_manifest_that_is_not_json_is_one_line(content: bytes, saved: Checkpoints) -> None:
    (saved.path(4) / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        saved.newest()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_a_fifo_in_a_checkpoint_is_not_waited_for(name: str, saved: Checkpoints) -> None:
    path = saved.path(4) / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        saved.load(4, blank())


def test_a_tensor_of_another_shape_is_one_line(saved: Checkpoints) -> None:
    other = blank()
    other["toy"]["model"]["weight"] = torch.zeros(5, 4)
    with pytest.raises(UserError, match="does not fit this model"):
        saved.load(4, other)


# ---- one writer


def test_a_second_writer_is_told_of_the_first_and_touches_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from d2it.files import only_writer\n"
        f"with only_writer(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert first.stdin is not None
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    said = rf"another run writes here: host \S+, pid {first.pid}, since 20"
    with pytest.raises(UserError, match=said), only_writer(tmp_path):
        pass
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    first.kill()  # a lock of the operating system does not outlive its process
    first.wait()
    first.stdin.close()
    first.stdout.close()
    with only_writer(tmp_path):
        assert f"pid {os.getpid()}," in (tmp_path / "run.lock").read_text()


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_one_line(folder: str) -> None:
    with pytest.raises(UserError, match="cannot write here"), only_writer(Path(folder)):
        pass


def test_a_lock_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(UserError), only_writer(tmp_path):
        pass


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_are_as_readable_as_the_umask_says(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a.safetensors") as path:
            save_tensors(path, {"a": torch.zeros(1)}, {})
        with atomic_write(tmp_path / "a.txt") as path:
            path.write_text("")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.txt"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


# ---- workers


class Images:
    """A source of two numbers an image; `act` runs in a worker at image 5."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 40

    def fetch(self, indices: list[int], draws: object = None, *, replace: bool = False) -> dict[str, Any]:
        if 5 in indices:
            self.act()
        return {"image": torch.zeros(len(indices), 2), "unreadable": []}


def ran_out() -> None:
    raise MemoryError


def no_allocator() -> None:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def no_files() -> None:
    raise OSError(24, "Too many open files", "x.png")


def no_shared_memory() -> None:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def cannot_send() -> None:
    """As where the thread that sends a batch finds no descriptor left."""
    import multiprocessing.queues

    threading.Timer(
        0.1, lambda: multiprocessing.queues.Queue._on_queue_feeder_error(OSError(24, "Too many open files"), None)
    ).start()
    time.sleep(20)


def take(loader: Loader, count: int) -> None:
    for _ in range(count):
        next(loader)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (ran_out, "a data worker ran out of memory"),
        (no_allocator, "a data worker ran out of memory"),
        (no_files, "x.png: Too many open files"),
        (no_shared_memory, "/dev/shm"),
        (cannot_send, "could not send its batch: Too many open files: raise the limit on open files"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"killed by SIGKILL.*fewer data.workers"),
        (lambda: os._exit(3), r"ended unexpectedly \(exit code 3\)"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "killed by SIGBUS"),
    ],
)
def test_a_worker_that_fails_ends_the_stream_in_one_line(act: Callable[[], object], said: str) -> None:
    start = time.monotonic()
    with Loader(Images(act), 4, workers=1) as loader, pytest.raises(UserError, match=said) as caught:
        take(loader, 11)
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value)


def test_a_dead_worker_raises_where_its_batch_is_waited_for_and_nowhere_else() -> None:
    """torch's own handler of SIGCHLD raises in whatever the main thread is doing."""
    with Loader(Images(lambda: None), 4, workers=1) as loader:
        next(loader)
        (worker,) = loader._holder[0]._workers
        worker.kill()
        deadline = time.monotonic() + 5
        while worker.is_alive() and time.monotonic() < deadline:
            sum(range(1000))
        with pytest.raises(UserError, match="killed by SIGKILL"):
            take(loader, 40)


# ---- signals


def test_a_second_sigterm_counts_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2it.errors.SECOND_SIGNAL", 0.2)

    def act() -> None:
        with StopSignal(WORLD) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a batch system and torchrun's agent: the same request
            assert stop.agreed() is signal.SIGTERM
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM again: stopped at once"):
        act()


def test_a_main_thread_that_is_stuck_is_ended_by_the_second_sigterm() -> None:
    """It waits for a lock outside Python, as in a collective whose other ranks have gone: no Python handler runs."""
    code = (
        "import ctypes, torch; from d2it import distributed as d, errors\n"
        "errors.SECOND_SIGNAL, d.LAST_RESORT = 0.3, 0.5\n"
        "with d.StopSignal(d.World(0, 1, 1, torch.device('cpu'))):\n"
        "    print('in', flush=True)\n"
        "    libc = ctypes.CDLL(None); lock = ctypes.create_string_buffer(64)\n"
        "    libc.pthread_mutex_lock(lock); libc.pthread_mutex_lock(lock)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "SIGTERM again: ended without saving this step\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_any_command_in_one_line(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    assert run_command(lambda: os.kill(os.getpid(), number)) == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}\n"
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_a_command_that_does_not_come_to_an_end() -> None:
    code = (
        "import sys, time; from d2it import errors\n"
        "errors.SECOND_SIGNAL = 0.2\n"
        "def act():\n"
        "    try:\n"
        "        print('in', flush=True); time.sleep(30)\n"
        "    finally:\n"
        "        print('leaving', flush=True); time.sleep(30)\n"
        "sys.exit(errors.run_command(act))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    for said in ("in", "leaving"):
        assert process.stdout.readline() == f"{said}\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "SIGTERM again: ended at once\n"


def test_a_command_in_a_thread_leaves_the_signals_alone() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run_command(lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]


# ---- the edge of a command


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "1"}, "RANK must be a whole number of at least 0, got 'abc'"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK must be"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 must be below WORLD_SIZE=2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1.5"}, "LOCAL_WORLD_SIZE must be"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "12355"}, "the ranks cannot meet"),  # no MASTER_ADDR
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "-1"}, "MASTER_PORT must be"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999999"}, "MASTER_PORT=99999999 must be at most 65535"),
    ],
)
def test_an_environment_that_describes_no_run_is_one_line(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"GLOO_SOCKET_IFNAME": "lo", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        distributed.start("cpu")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such file"), 2, "error: no such file"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (MemoryError(), 2, "error: out of memory: MemoryError; a smaller batch needs less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            2,
            "error: out of memory: CUDA out of memory. Tried",
        ),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory: [x] DefaultCPU"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGTERM, "saved"), 143, "saved"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM"),
    ],
)
def test_a_command_ends_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def act() -> None:
        raise error

    assert run_command(act) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_a_bug_is_not_hidden() -> None:
    def act() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(act)


def test_ranks_that_share_an_error_print_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(shared: bool) -> None:
        raise UserError("x", shared=shared)

    monkeypatch.setenv("RANK", "1")
    assert run_command(lambda: act(True)) == 2
    assert capsys.readouterr().err == ""
    assert run_command(lambda: act(False)) == 2
    assert capsys.readouterr().err == "error (rank 1): x\n"


# ---- logs, shares, memory


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (b'{"step": 3, "loss": 1.0}', 3),
        (b'{"step": 3, "loss": "abc", "x": [1], "y": null, "z": true}', 3),
        (b'{"step": 3, "loss": NaN}', 3),
        (b'{"step": "3"}', 2),
        (b'{"step": 3.5}', 2),
        (b'{"step": true}', 2),
        (b'{"loss": 1}', 2),
        (b"[]", 2),
        (b"5", 2),
        (b"\xff\xfe", 2),
        (b'{"step": 3', 2),
        (b"[" * 5000, 2),
    ],
)
def test_a_log_is_read_up_to_the_damage(line: bytes, kept: int, tmp_path: Path) -> None:
    rows = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": 2.0}', line]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(rows))
    found = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in found] == list(range(1, kept + 1))
    assert all(type(value) in (int, float) for row in found for value in row.values())


@pytest.mark.parametrize(("share", "warned"), [(0.0, True), (0.019, True), (0.02, False), (0.5, False), (0.99, True)])
def test_shares_of_fine_regions_that_make_no_difference_are_warned_about(share: float, warned: bool) -> None:
    assert (extreme_share(share) is not None) == warned


def test_the_memory_limit_is_that_of_the_process() -> None:
    code = (
        "import resource, torch; from d2it.devices import memory_limit\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); print(memory_limit(torch.device('cpu')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    ).stdout
    assert int(out) == min(6 << 30, memory_limit(torch.device("cpu")))
