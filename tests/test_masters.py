"""Weights in bfloat16 with float32 masters: the same training, the same checkpoints, to the bit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d2it.distributed import World
from d2it.errors import UserError
from d2it.models import DynamicContentTransformer
from d2it.training.config import StageConfig, load
from d2it.training.content import ContentStage
from d2it.training.grain import GrainStage
from d2it.training.latents import LatentStage
from d2it.training.learner import has_masters
from d2it.training.masters import linears
from d2it.training.run import main
from d2it.training.stage import check_weights
from d2it.training.summary import Summary
from tests.test_finetuning import SETTINGS
from tests.test_train_distributed import rows
from tests.test_train_step import WORLD, batch, compiled_by, stage
from tests.train_server import Server, shared_server
from tests.train_worker import digest

STEPS = 5


def train(made: Any, first: int = 0, last: int = STEPS) -> list[float]:
    """The losses of these steps."""
    learner, losses = made.learners[0], []
    for step in range(first, last):
        torch.manual_seed(step)
        for micro in range(made.settings.accumulate):
            given = batch(made, (3 * step + 5 * micro) % 17)
            logs, _ = learner.backward(given, last=micro == made.settings.accumulate - 1)
            losses.append(logs[f"{made.name}/loss"].item())
        losses.append(learner.update(step).item())
    return losses


def halves(made: Any) -> list[nn.Parameter]:
    return [p for p in made.network.parameters() if p.dtype == torch.bfloat16]


def small(kind: type[LatentStage], weights: str, **settings: Any) -> Any:
    return stage(kind, weights=weights, precision="bf16", lr=1e-2, weight_decay=0.05, ema=0.7, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"clip": 0.1, "snapshot_every": 2}, {"accumulate": 3}, {"activation_checkpointing": True}],
    ids=["plain", "clipped", "accumulated", "recomputed"],
)
@pytest.mark.parametrize("kind", [GrainStage, ContentStage])
def test_a_training_is_that_of_autocast(kind: type[LatentStage], settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses, norms, and everything that a checkpoint holds, after steps with micro-batches; what is evaluated and
    shared, and the training thereafter."""
    ours, exact = (small(kind, weights, **settings) for weights in ("bfloat16", "float32"))
    names = {name for name, p in ours.network.named_parameters() if p.dtype == torch.bfloat16}
    assert len(names) == 4 * len(ours.network.transformer_blocks())
    assert not halves(exact)
    assert train(ours) == train(exact)
    ours_learner, exact_learner = (made.learners[0] for made in (ours, exact))
    given = batch(ours, 7)
    evaluated = (learner.evaluate(given, seed=3) for learner in (ours_learner, exact_learner))
    torch.testing.assert_close(*evaluated, rtol=0, atol=0)
    states = [learner.state() for learner in (ours_learner, exact_learner)]
    assert states[0]["optimizer"].pop("param_groups") == states[1]["optimizer"].pop("param_groups")
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for learner, name in ((ours_learner, "ours"), (exact_learner, "exact")):
        learner.share(tmp_path / name)
    shared = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "exact")]
    torch.testing.assert_close(*shared, rtol=0, atol=0)
    assert {t.dtype for t in shared[0].values()} == {t.dtype for t in shared[1].values()}
    assert {name for name, p in ours.network.named_parameters() if p.dtype == torch.bfloat16} == names
    assert train(ours, STEPS, STEPS + 1) == train(exact, STEPS, STEPS + 1)


def test_gradients_are_added_up_in_float32() -> None:
    """By autograd in the masters, as soon as they are there; the optimiser takes others as the backward writes them."""
    for accumulate, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        made = small(ContentStage, "bfloat16", accumulate=accumulate)
        learner = made.learners[0]
        learner.backward(batch(made), last=True)
        found = [(weight.grad, master.grad) for master, weight in learner.masters.weights.items()]
        assert len(found) == len(halves(made))
        assert {grad.dtype for grads in found for grad in grads if grad is not None} == {dtype}
        assert all((one is None) != (other is None) for one, other in found)
        learner.optimizer.zero_grad()
        assert all(p.grad is None for each in learner.masters.weights.items() for p in each)


@pytest.mark.parametrize("weights", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_a_state_goes_on_either_way(weights: tuple[str, str]) -> None:
    first, second = (small(ContentStage, each) for each in weights)
    whole = small(ContentStage, "float32")
    expected = train(whole, 0, 2 * STEPS)
    train(first)
    train(second, 0, 1)  # it has weights and moments of its own before
    second.learners[0].restore(copy.deepcopy(first.learners[0].state()))
    for name, shadow in first.learners[0].ema.shadow.items():  # a checkpoint is read into these in place
        second.learners[0].ema.shadow[name].copy_(shadow)
    assert train(second, STEPS, 2 * STEPS) == expected[-2 * STEPS :]
    assert digest(second.learners[0]) == digest(whole.learners[0])


def test_a_skipped_step_leaves_the_weights() -> None:
    made = small(ContentStage, "bfloat16")
    train(made)
    learner, before = made.learners[0], [p.detach().clone() for p in halves(made)]
    learner.backward(batch(made), last=True)
    halves(made)[-1].grad[0, 0] = float("nan")
    assert learner.update(STEPS).isnan()
    assert all(map(torch.equal, halves(made), before))
    assert all(p.grad is None for p in made.network.parameters())
    assert learner.guard.tolist() == [1, 1, 1]


def test_an_error_leaves_the_weights_in_their_places() -> None:
    made = small(ContentStage, "bfloat16")
    before = halves(made)

    def picture() -> None:
        with made.learners[0].averaged():
            assert not halves(made)
            raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        picture()
    assert [id(p) for p in halves(made)] == [id(p) for p in before]


@pytest.fixture
def aot_eager() -> Iterator[None]:
    yield from compiled_by("aot_eager")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_blocks_compile_once(aot_eager: None, accumulate: int) -> None:
    """The same graphs in training, whatever the packed length, and also after an evaluation in float32."""
    settings = {"compile": True, "accumulate": accumulate}
    made, plain = (small(ContentStage, weights, **settings) for weights in ("bfloat16", "float32"))
    counters = torch._dynamo.utils.counters
    assert train(made) == train(plain)
    graphs = counters["stats"]["unique_graphs"]
    made.learners[0].evaluate(batch(made, 3), seed=0)
    train(made, STEPS, STEPS + 2)
    assert counters["stats"]["unique_graphs"] == graphs == 4
    assert not counters["graph_break"]


# ---- ranks and checkpoints


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_the_same_whichever_way_its_parts_went(server: Server, tmp_path: Path, ranks: int) -> None:
    """Checkpoints say nothing of it: float32, bfloat16 and float32 again, against one without a stop. FSDP2 takes up
    either."""
    settings = {"dynamic": 1, "precision": "bf16", "save_every": 4, "log_every": 1, "clip": 0.5, "ranks": ranks}
    found = {}
    for name, parts in {
        "mixed": (("float32", 4), ("bfloat16", 8), ("float32", 12)),
        "halves": (("bfloat16", 12),),
        "whole": (("float32", 12),),
    }.items():
        for weights, steps in parts:
            code, out, log = server.run(tmp_path / name, weights=weights, steps=steps, accumulate=ranks, **settings)
            assert code == 0, log
        code, sharded, log = server.run(tmp_path / name, steps=14, accumulate=ranks, parallel="fsdp", **settings)
        assert code == 0, log
        found[name] = out, sharded, [row["content/loss"] for row in rows(tmp_path / name)]
    assert found["mixed"] == found["halves"] == found["whole"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 3, "clip": 0.5},
        {"ranks": 3, "accumulate": 2},
        {"compile": True, "clip": 0.5},
        {"compile": True, "accumulate": 3, "activation_checkpointing": True, "repa": 1},
    ],
    ids=["plain", "accumulated", "three", "compiled", "recomputed"],
)
def test_ranks_average_gradients_in_float32(server: Server, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The first alone has fine tokens, the last NaN in step 1: losses, norms, weights, averages and moments are
    autocast's. Ranks that begin with other weights take those of the first."""
    common = {"ranks": 2, "dynamic": 1, "precision": "bf16", "steps": 6, "log_every": 1, "nan": 1, "uneven": 1}
    common |= {"batch_size": 12, "lr": 1e-2, **settings}
    found = {}
    for weights, apart in (("float32", 0), ("bfloat16", 1)):
        code, out, log = server.run(tmp_path / weights, **common, weights=weights, apart=apart)
        assert code == 0, log
        logged = rows(tmp_path / weights)
        assert [row["toy/skipped_steps"] for row in logged] == [0, 1, 1, 1, 1, 1]
        figures = [[row[key] for row in logged if row["step"] != 2] for key in ("content/loss", "toy/gradient_norm")]
        found[weights] = out, figures
    assert found["float32"] == found["bfloat16"]


def test_gradients_of_masters_are_sent_while_the_backward_runs(server: Server, tmp_path: Path) -> None:
    """A bucket goes out when as many gradients are there as under autocast: none of them waits for the end."""
    sent = {}
    for weights in ("float32", "bfloat16"):
        settings = {"ranks": 2, "dynamic": 1, "precision": "bf16", "weights": weights, "steps": 3, "recorded": 1}
        code, _, log = server.run(tmp_path / weights, **settings)
        assert code == 0, log
        events = (tmp_path / weights / "events-0").read_text().split("forward")[-1].split()
        sent[weights] = [events[:i].count("gradient") for i, event in enumerate(events) if event == "reduce"]
        assert events.count("gradient") > sent[weights][0]
    assert len(sent["float32"]) == len(sent["bfloat16"]) > 1
    assert sent["bfloat16"] == pytest.approx(sent["float32"], abs=4)


def test_what_a_run_publishes_is_the_same(tmp_path: Path) -> None:
    """From the command line, both stages; the second run has the first one's latents."""
    words = [*SETTINGS, "grain.precision=bf16", "content.precision=bf16", "grain.steps=3", "content.steps=3"]
    words += ["grain.lr=1e-2", "content.lr=1e-2", "grain.ema=0.5", "content.ema=0.5"]
    assert main([*words, f"run.dir={tmp_path / 'float32'}"]) == 0
    for part in ("vae", "cache"):
        shutil.copytree(tmp_path / "float32" / part, tmp_path / "bfloat16" / part)
    words += ["grain.weights=bfloat16", "content.weights=bfloat16", "run.stages=[grain,content]"]
    assert main([*words, f"run.dir={tmp_path / 'bfloat16'}"]) == 0
    for part in ("grain_transformer", "content_transformer"):
        paths = [tmp_path / name / part / "model.safetensors" for name in ("float32", "bfloat16")]
        torch.testing.assert_close(*map(load_file, paths), rtol=0, atol=0)
    for name in ("samples.png", "denoising.png"):
        assert (tmp_path / "float32" / name).read_bytes() == (tmp_path / "bfloat16" / name).read_bytes()


# ---- what cannot be


def test_only_the_products_that_autocast_rounds() -> None:
    made = stage(ContentStage)
    names = {id(part.weight): name for name, part in made.network.named_modules() if isinstance(part, nn.Linear)}
    chosen = {names[id(part.weight)].split(".", 3)[-1] for part in linears(made.network.transformer_blocks())}
    assert chosen == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["content.weights=float16"], r"content\.weights must be auto or float32 or bfloat16, got 'float16'"),
        (["dvae.weights=bfloat16"], r"dvae\.weights must be float32 \(most"),
        (
            ["grain.weights=bfloat16", "grain.precision=fp32"],
            r"grain\.weights must be auto or float32 where grain\.precision is",
        ),
        (["content.weights=bfloat16", "content.parallel=fsdp"], r"where content\.parallel is fsdp, which rounds its"),
        (["content.weights=bfloat16", "content.float8=emulated"], r"where content\.float8 rounds them itself"),
    ],
)
def test_settings_that_exclude_it_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("demo", words)


def test_what_the_ranks_cannot_train_is_refused() -> None:
    cpu, config = torch.device("cpu"), DynamicContentTransformer.preset_config("tiny")
    halved = StageConfig(weights="bfloat16")
    with pytest.raises(UserError, match=r"content\.weights=bfloat16 needs bf16: set content\.precision=bf16, for auto"):
        check_weights(halved, "content", World(0, 1, 1, cpu), config)
    halved.precision = "bf16"
    check_weights(halved, "content", World(0, 1, 1, cpu), config)
    check_weights(StageConfig(), "content", World(0, 1, 1, cpu), config)


def test_by_default_they_are_bfloat16_in_bf16_on_a_gpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert StageConfig().weights == "auto"
    assert has_masters(StageConfig(), cuda, True)
    assert not has_masters(StageConfig(), cuda, False)
    assert not has_masters(StageConfig(), cpu, True)
    assert not has_masters(StageConfig(weights="float32"), cuda, True)
    assert not has_masters(StageConfig(parallel="fsdp"), cuda, True)
    assert not has_masters(StageConfig(float8="rowwise"), cuda, True)
    assert not has_masters(load("demo").dvae, cuda, True)
    assert has_masters(StageConfig(weights="bfloat16"), cpu, True)
    load("demo", ["content.parallel=fsdp", "grain.precision=fp32"])


def test_the_summary_says_it() -> None:
    made = small(ContentStage, "bfloat16")
    assert "bf16, ddp, eager, bfloat16 weights with float32 masters" in Summary(made, made.settings, WORLD).text
    plain = small(ContentStage, "auto")
    assert "bf16, ddp, eager, float32 weights\n" in Summary(plain, plain.settings, WORLD).text
    for parts, world in ((2, WORLD), (1, World(0, 2, 2, WORLD.device))):
        states = [
            Summary(each, each.settings, world).state
            for each in (small(ContentStage, weights, accumulate=parts) for weights in ("float32", "bfloat16"))
        ]
        assert states[1] - states[0] == 2 * sum(p.numel() for p in halves(made))
