"""Two ranks on gloo: agreement, uneven work, resharding, the elastic restart."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2it.seeds import seed_of
from tests.train_server import ENVIRONMENT, WORKER, Server, shared_server, wait_for
from tests.train_worker import Losses


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "logs" / "toy.jsonl").read_text().splitlines()]


def losses_of_two_ranks(steps: int) -> list[float]:
    """The two ranks' mean loss, step by step, without any of the loop. Rank 1 has no fine rows."""
    torch.manual_seed(0)
    model = Losses()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for step in range(steps):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed_of("data", step)))
        losses = []
        for rank in range(2):
            torch.manual_seed(seed_of(0, "toy", step, rank))
            batch = {"x": x[4 * rank :][:4], "fine": 0 if rank else 4, "scale": 1.0}
            losses.append(model(batch)[0])
        loss = (losses[0] + losses[1]) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_average_and_agree(server: Server, tmp_path: Path, parallel: str) -> None:
    """One rank has no fine rows, then NaN at two steps: no rank hangs, both skip, the loss is the ranks' mean."""
    settings = {"ranks": 2, "parallel": parallel, "uneven": 1, "nan": "6-7"}
    code, _, log = server.run(tmp_path, steps=12, log_every=1, save_every=6, **settings)
    assert code == 0, log
    logged = rows(tmp_path)
    assert [r["toy/skipped_steps"] for r in logged] == [0] * 6 + [1] + [2] * 5
    assert [r["toy/loss"] for r in logged[:6]] == pytest.approx(losses_of_two_ranks(6), rel=1e-5)


def test_a_dynamic_model_is_the_same_however_it_is_spread(server: Server, tmp_path: Path) -> None:
    """DDP and FSDP2, eager and compiled, blocks kept and recomputed; one rank has no fine token, and NaN in step 1.

    REPA is on, whose projector is no part of the network.
    """
    common = {"ranks": 2, "dynamic": 1, "repa": 1, "steps": 4, "log_every": 1, "save_every": 4, "clip": 0.5, "nan": 1}
    found = {}
    for name, settings in {
        "ddp": {},
        "ddp-compiled": {"compile": True},
        "fsdp-compiled": {"parallel": "fsdp", "activation_checkpointing": True, "compile": True},
        "fsdp-bf16": {"parallel": "fsdp", "precision": "bf16"},
    }.items():
        code, _, log = server.run(tmp_path / name, **common, **settings)
        assert code == 0, log
        found[name] = rows(tmp_path / name)
        assert [r["toy/skipped_steps"] for r in found[name]] == [0, 1, 1, 1]
    for key in ("content/loss", "content/repa", "toy/gradient_norm"):
        values = {name: [r[key] for r in logged if r["step"] != 2] for name, logged in found.items()}
        for name, near in (("ddp-compiled", 1e-4), ("fsdp-compiled", 1e-4), ("fsdp-bf16", 3e-2)):
            assert values[name] == pytest.approx(values["ddp"], rel=near), (name, key)


def test_ranks_that_met_before_meet_again(server: Server, tmp_path: Path) -> None:
    """In one process, through one store: no rank connects to the address that another had in an earlier run."""
    code, _, log = server.run(tmp_path, ranks=2, steps=2, earlier=1)
    assert code == 0, log


def test_accumulated_micro_batches_are_one_batch(server: Server, tmp_path: Path) -> None:
    """Gradients of two ranks and two micro-batches are reduced once, and weigh the same."""
    code, _, log = server.run(tmp_path, ranks=2, accumulate=2, steps=6, log_every=1, noise=0, width=4)
    assert code == 0, log
    code, _, log = server.run(tmp_path / "one", accumulate=1, steps=6, log_every=1, noise=0, width=4)
    assert code == 0, log
    pairs = zip(rows(tmp_path), rows(tmp_path / "one"))
    for two, one in pairs:
        assert two["toy/loss"] == pytest.approx(one["toy/loss"], rel=1e-5)


def test_gradients_are_sent_while_the_backward_runs(server: Server, tmp_path: Path) -> None:
    """On two ranks, in buckets: the first is on its way before the last gradient is there, and in the last of a step's
    micro-batches alone."""
    steps, micro = 3, 2
    # Each weight is larger than DDP's first bucket, 1 MiB.
    code, _, log = server.run(tmp_path, ranks=2, width=40_000, steps=steps, accumulate=micro, recorded=1)
    assert code == 0, log
    for rank in range(2):
        text = (tmp_path / f"events-{rank}").read_text()
        passes = [part.split() for part in text.split("forward")[1:]]
        assert len(passes) == steps * micro
        for number, events in enumerate(passes):
            assert events.count("gradient") == 4
            if number % micro < micro - 1:
                assert "reduce" not in events
            elif number < micro:  # DDP sees in the first step in which order gradients come, and then makes buckets
                assert events.count("reduce") == 1
            else:
                assert events.count("reduce") == 2
                assert events.index("reduce") < len(events) - 1 - events[::-1].index("gradient")


def test_checkpoints_move_between_numbers_of_ranks_and_forms(server: Server, tmp_path: Path) -> None:
    """One rank, two, FSDP2 on two, two, one again: every resume takes up the last one's tensors."""
    losses = {}
    chain = (("ddp", 1, 4), ("ddp", 2, 8), ("fsdp", 2, 12), ("ddp", 2, 16), ("ddp", 1, 20))
    for name, parts in (("a", chain), ("b", (("ddp", 2, 20),))):
        for parallel, ranks, last in parts:
            settings = {
                "ranks": ranks,
                "parallel": parallel,
                "steps": last,
                "save_every": 4,
                "log_every": 1,
                "noise": 0,
            }
            code, _, log = server.run(tmp_path / name, **settings)
            assert code == 0, log
        losses[name] = [r["toy/loss"] for r in rows(tmp_path / name)]
    # Without noise of its own a step depends on the images alone, which are the same for any number of ranks.
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-5)
    manifest = json.loads((tmp_path / "a" / "checkpoints" / "toy" / "step-00000016" / "manifest.json").read_text())
    assert manifest["world_size"] == 2


def test_a_bad_checkpoint_is_refused_by_all_ranks(server: Server, tmp_path: Path) -> None:
    """Each rank hashes its share of the files; all of them raise what one finds."""
    assert server.run(tmp_path, ranks=2, steps=4, save_every=4)[0] == 0
    path = tmp_path / "checkpoints" / "toy" / "step-00000004" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, log = server.run(tmp_path, ranks=2, steps=8, save_every=4)
    assert code == 2
    assert log.count(f"{path}: damaged checkpoint") == 2
    assert "Traceback" not in log


def torchrun(folder: Path, **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    arguments = [f"{k}={v}" for k, v in {"dir": folder, **settings}.items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(WORKER), *arguments], env=ENVIRONMENT, **pipes)


@pytest.mark.long
def test_a_dead_rank_is_restarted_from_the_last_checkpoint(server: Server, tmp_path: Path) -> None:
    """torchrun's agent restarts the ranks when one dies; the result is that of a run in which none died."""
    code, expected, log = server.run(tmp_path / "a", ranks=2, steps=12, save_every=4)
    assert code == 0, log
    process = torchrun(tmp_path / "b", steps=12, save_every=4, async_save=False, die=11, log_every=1)
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert (tmp_path / "b" / "died").exists()
    for rank in range(2):  # died in step 11: three steps are done again, less than an interval
        assert (tmp_path / "b" / f"starts-{rank}").read_text().split() == ["0", "8"]
    assert re.findall(r"hash (\w+)", out) == [expected]
    assert [r["step"] for r in rows(tmp_path / "b")] == list(range(1, 13))


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_saves_on_all(server: Server, tmp_path: Path, rank: int) -> None:
    pids = server.start(tmp_path, ranks=2, steps=100000, save_every=100000, log_every=1)
    wait_for(tmp_path / "logs" / "toy.jsonl")
    os.kill(pids[rank], signal.SIGTERM)
    code, _, said = server.finish()
    assert code == 128 + signal.SIGTERM
    (saved,) = (tmp_path / "checkpoints" / "toy").glob("step-*")
    assert said.count(f"saved {saved}") == 2
    assert {p.name for p in saved.glob("__*_0.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    last = int(saved.name.removeprefix("step-"))
    code, found, log = server.run(tmp_path, ranks=2, steps=last + 3)
    assert code == 0, log
    code, expected, log = server.run(tmp_path / "undisturbed", ranks=2, steps=last + 3)
    assert (code, found) == (0, expected), log


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks(tmp_path: Path) -> None:
    process = torchrun(tmp_path, steps=100000, save_every=100000, log_every=1)
    wait_for(tmp_path / "logs" / "toy.jsonl")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    (saved,) = (tmp_path / "checkpoints" / "toy").glob("step-*")
    assert f"saved {saved}" in said
    assert len(list(saved.glob("__*_0.distcp"))) == 2
    assert json.loads((saved / "manifest.json").read_text())["world_size"] == 2
