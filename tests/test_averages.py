"""Power-function averages: their profile, what is rebuilt from snapshots, and the run that keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d2it.models import DynamicGrainTransformer
from d2it.models.base import Model
from d2it.training import ema
from d2it.training.ema import PowerEma, power_exponent, rebuild, rebuilding_weights, snapshot_folder
from d2it.training.run import main
from tests.test_finetuning import SETTINGS


@pytest.mark.parametrize("exponent", [0.5, 2.0, 6.94, 16.97, 100.0])
def test_the_width_of_a_profile_is_its_deviation(exponent: float) -> None:
    places = (np.arange(200_000) + 0.5) / 200_000
    weights = places**exponent / (places**exponent).sum()
    mean = (weights * places).sum()
    deviation = np.sqrt((weights * (places - mean) ** 2).sum())
    assert power_exponent(float(deviation)) == pytest.approx(exponent, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 12**-0.5, 1.0, float("nan")])
def test_other_widths_are_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be above 0 and below 0\.2887"):
        power_exponent(sigma)


@pytest.mark.parametrize("sigma", [0.03, 0.10, 0.25])
def test_the_average_weighs_the_steps_by_a_power(sigma: float) -> None:
    """Against the profile's closed form: step n of N has (n/N)^(g+1) - ((n-1)/N)^(g+1)."""
    module = nn.Linear(7, 1, bias=False).double()
    average, walk = PowerEma(module, sigma), torch.randn(50, 1, 7, dtype=torch.float64)
    for step, values in enumerate(walk):
        with torch.no_grad():
            module.weight.copy_(values)
        average.update(step)
    share = (torch.arange(51, dtype=torch.float64) / 50) ** (power_exponent(sigma) + 1)
    torch.testing.assert_close(average.shadow["weight"], (share.diff()[:, None, None] * walk).sum(0))


def test_averages_are_rebuilt_from_snapshots() -> None:
    """A training's path in float64: rebuilt averages against those tracked from step to step."""
    steps, every, widths = 4000, 250, (0.03, 0.05, 0.07, 0.10, 0.15, 0.20)
    module = nn.Linear(64, 1, bias=False).double()
    averages = {sigma: PowerEma(module, sigma) for sigma in widths}
    places, taken, snapshots = [], [], []
    tracked: dict[tuple[float, int], torch.Tensor] = {}
    drift = torch.randn(64, dtype=torch.float64) / steps**0.5
    with torch.no_grad():
        for step in range(steps):
            module.weight.add_(torch.randn(64, dtype=torch.float64) + drift)
            for average in averages.values():
                average.update(step)
            if (step + 1) % every == 0:
                for sigma, average in averages.items():
                    tracked[sigma, step + 1] = average.shadow["weight"].clone()
                    if sigma in (0.05, 0.10):
                        places.append(step + 1)
                        taken.append(sigma)
                        snapshots.append(average.shadow["weight"].clone())
    stacked = torch.cat(snapshots)
    for sigma, step in [(s, t) for s in widths for t in (3000, 4000)]:
        weights, error = rebuilding_weights(places, taken, step, sigma)
        wanted = tracked[sigma, step]
        distance = (torch.from_numpy(weights) @ stacked - wanted).norm()
        if sigma in (0.05, 0.10):  # a snapshot itself
            assert distance < 1e-6 * wanted.norm()
            assert error < 1e-6
        else:
            nearest = min((tracked[side, step] - wanted).norm() for side in (0.05, 0.10))
            between = 0.05 < sigma < 0.10
            assert distance < nearest * (0.02 if between else 0.12)
            assert error < (0.01 if between else 0.1)


def test_a_profile_that_snapshots_do_not_span_has_its_error() -> None:
    _, error = rebuilding_weights([1000, 1000], [0.10, 0.15], 1000, 0.02)
    assert error > 0.3


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kept snapshots of the grain stage at 2, 4 and 5 of 5 steps."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    words = ["run.stages=[dvae,cache,grain]", "grain.steps=5", "grain.snapshot_every=2", "run.save_every=3"]
    assert main([*SETTINGS, f"run.dir={folder}", *words, "grain.lr=1e-2"]) == 0
    return folder


def test_a_run_keeps_snapshots_that_a_command_rebuilds(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(str(path.relative_to(kept)) for path in kept.glob("averages/grain/*/*"))
    assert names == [f"averages/grain/step-0000000{step}/{sigma}" for step in (2, 4, 5) for sigma in ("0.050", "0.100")]
    for step, sigma in ((5, 0.10), (4, 0.05)):
        arguments = [str(kept), "--stage", "grain", "--sigma-rel", str(sigma), "--step", str(step)]
        assert ema.main([*arguments, "--output", str(tmp_path / "out")]) == 0
        found = DynamicGrainTransformer.from_pretrained(tmp_path / "out")
        expected = DynamicGrainTransformer.from_pretrained(snapshot_folder(kept, "grain", step, sigma))
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
        assert found.vae_sha256 == expected.vae_sha256 is not None
    capsys.readouterr()
    assert ema.main([str(kept), "--stage", "grain", "--sigma-rel", "0.07"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{kept}/averages/grain/sigma-0.07: sigma_rel 0.07 after 5 steps, profile within ")
    between = DynamicGrainTransformer.from_pretrained(kept / "averages" / "grain" / "sigma-0.07")
    sides = [snapshot(kept, 5, sigma) for sigma in (0.05, 0.10)]
    name = "trunk.blocks.0.mlp.fc1.weight"
    assert not any(torch.equal(between.state_dict()[name], side.state_dict()[name]) for side in sides)
    assert ema.main([str(kept), "--stage", "grain", "--sigma-rel", "0.02"]) == 0
    assert "do not span this profile" in capsys.readouterr().err


def snapshot(run: Path, step: int, sigma: float) -> Model:
    return DynamicGrainTransformer.from_pretrained(snapshot_folder(run, "grain", step, sigma))


def test_a_resumed_run_keeps_the_same_snapshots(kept: Path, tmp_path: Path) -> None:
    run = shutil.copytree(kept, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "grain" / "step-00000005")
    for step in (4, 5):
        shutil.rmtree(run / "averages" / "grain" / f"step-0000000{step}")
    words = ["run.stages=[grain]", "grain.steps=5", "grain.snapshot_every=2", "run.save_every=3", "grain.lr=1e-2"]
    assert main([*SETTINGS, f"run.dir={run}", *words]) == 0  # from step 3
    for step in (4, 5):
        for sigma in (0.05, 0.10):
            assert snapshot(run, step, sigma).weights_sha256 == snapshot(kept, step, sigma).weights_sha256


def test_what_does_not_fit_is_one_line(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(kept, tmp_path / "run")
    words = [*SETTINGS, f"run.dir={run}", "run.stages=[grain]", "grain.steps=6", "grain.snapshot_every=2"]
    for spoil, message in (
        ("grain.snapshot_sigmas=[0.05,0.15]", "snapshot_sigmas"),
        ("grain.snapshot_every=0", "snapshot_sigmas"),
        ("grain.snapshot_sigmas=[0.05]", "grain.snapshot_sigmas must be two different widths"),
        ("grain.snapshot_sigmas=[0.05,0.0512]", "of three decimals at most"),
    ):
        assert main([*words, spoil]) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith("error: ")
    shutil.rmtree(run / "checkpoints" / "grain")
    assert main(words) == 2
    assert "snapshots of an earlier training are here" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"content: no snapshots; content.snapshot_every=N keeps some"):
        rebuild(run, "content", 0.1)
    with pytest.raises(ValueError, match=r"step must be in 2 ... 5, those of the snapshots, got 7"):
        rebuild(run, "grain", 0.1, 7)
    with pytest.raises(ValueError, match="sigma_rel must be above 0"):
        rebuild(run, "grain", 0.5)
    weights = snapshot_folder(run, "grain", 4, 0.1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="SHA-256"):
        rebuild(run, "grain", 0.1)
