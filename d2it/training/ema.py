"""Averages of the trained parameters: exponential, and of power functions, of which any can be rebuilt afterwards.

Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models", Sec. 3): an average that weighs
the parameters of step tau by tau^gamma, up to step t, is named by its width sigma_rel, the standard deviation of that
profile as a share of t. Snapshots of two of them during training span the others: the command

    python -m d2it.training.ema runs/imagenet256_xl --sigma-rel 0.10

solves for the combination of a run's snapshots whose profile is nearest to the one asked for (Algorithm 2), and writes
a model's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from d2it.errors import run_command, user_error
from d2it.models.base import Model, saved_kind
from d2it.models.content import DynamicContentTransformer
from d2it.models.dit import DiT
from d2it.models.grain import DynamicGrainTransformer

#: Folder of a run's snapshots: <run.dir>/averages/<stage>/step-00001000/0.050/.
FOLDER = "averages"
#: sigma_rel of the uniform average, the widest.
WIDEST = 12**-0.5
_STEP = re.compile(r"step-(\d{8,})")


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Ema:
    """The average of all trained parameters: shadow <- decay * shadow + (1 - decay) * parameter, in a few kernels.

    Frozen parameters and buffers do not change, so they are left out. Under FSDP2 the average is sharded as the
    parameters are. A step whose update was skipped (non-finite) averages the unchanged parameters.

    Args:
        module: its parameters that require a gradient are averaged.
        decay: in [0, 1).
    """

    title = "the average"

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shadow = {n: p.detach().clone() for n, p in self.parameters.items()}

    def share(self, step: int) -> float:
        """Returns what the parameters after optimiser step `step` (the first is 0) weigh in the average."""
        return 1.0 - self.decay

    @torch.no_grad()
    def update(self, step: int = 0) -> None:
        """Takes the parameters after optimiser step `step` into the average."""
        torch._foreach_lerp_(
            [local(s) for s in self.shadow.values()],
            [local(p.detach()) for p in self.parameters.values()],
            self.share(step),
        )

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Gives the module the averaged parameters, for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        shadow = [local(s) for s in self.shadow.values()]
        trained = [local(p.detach()) for p in self.parameters.values()]
        kept = [t.clone() for t in trained]
        torch._foreach_copy_(trained, shadow)
        torch._foreach_copy_(shadow, kept)


class PowerEma(Ema):
    """The average whose profile is a power of the step (Karras et al. 2024, Eqs. 2 and 3).

    Args:
        module: its parameters that require a gradient are averaged.
        sigma: sigma_rel, the width of the profile, in (0, 12^-0.5).
    """

    def __init__(self, module: nn.Module, sigma: float) -> None:
        super().__init__(module, 0.0)
        self.sigma, self.exponent = sigma, power_exponent(sigma)
        self.title = f"the average of width {sigma:g}"

    def share(self, step: int) -> float:
        return 1.0 - (1.0 - 1.0 / (step + 1)) ** (self.exponent + 1.0)


def power_exponent(sigma: float) -> float:
    """Returns gamma of the profile tau^gamma whose width is sigma_rel (Karras et al. 2024, Algorithm 2).

    Raises:
        ValueError: a width that no such profile has.
    """
    if not 0 < sigma < WIDEST:
        raise ValueError(f"sigma_rel must be above 0 and below {WIDEST:.4f}, got {sigma:g}")
    t = sigma**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def rebuilding_weights(
    steps: Sequence[int], sigmas: Sequence[float], step: int, sigma: float
) -> tuple[np.ndarray, float]:
    """Returns the combination of averages that is nearest to another one in least squares (Karras et al. 2024, Alg. 2).

    Args:
        steps: of the averages, after how many optimiser steps each was taken.
        sigmas: sigma_rel of each.
        step: of the average to be rebuilt.
        sigma: its sigma_rel.

    Returns:
        A weight for each average, and the distance of the two profiles over the norm of the one asked for.
    """
    t, gamma = np.array(steps, np.float64), np.array([power_exponent(each) for each in sigmas])
    wanted = np.array([step], np.float64), np.array([power_exponent(sigma)])
    gram, right = _products(t, gamma, t, gamma), _products(t, gamma, *wanted)[:, 0]
    weights = np.linalg.lstsq(gram, right, rcond=None)[0]
    norm = _products(*wanted, *wanted)[0, 0]
    distance = norm - 2 * weights @ right + weights @ gram @ weights
    return weights, math.sqrt(max(0.0, distance) / norm)


def _products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """(A, B): inner products of the normalised profiles (gamma + 1) tau^gamma / t^(gamma + 1) on 0 ... t."""
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    ratio = (t_a / t_b) ** exponent
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def snapshot_folder(run: str | Path, stage: str, step: int, sigma: float) -> Path:
    """Returns the folder of a snapshot after `step` steps."""
    return Path(run) / FOLDER / stage / f"step-{step:08d}" / f"{sigma:.3f}"


@torch.no_grad()
def rebuild(run: str | Path, stage: str, sigma: float, step: int | None = None) -> tuple[Model, int, float]:
    """Rebuilds an average of any width from a run's snapshots.

    Args:
        run: folder of the run.
        stage: grain or content.
        sigma: sigma_rel of the average.
        step: after which it is taken; None is that of the last snapshot.

    Returns:
        The model with the average's weights, its step, and the error of its profile (`rebuilding_weights`).

    Raises:
        ValueError: no snapshots, damaged ones, or a width or step out of range.
    """
    folder = Path(run) / FOLDER / stage
    found = sorted(path for path in folder.glob("step-*/[0-9]*") if _STEP.fullmatch(path.parent.name))
    if not found:
        raise ValueError(f"{folder}: no snapshots; {stage}.snapshot_every=N keeps some while a run trains")
    times = [int(path.parent.name.removeprefix("step-")) for path in found]
    step = max(times) if step is None else step
    if not min(times) <= step <= max(times):
        raise ValueError(f"step must be in {min(times)} ... {max(times)}, those of the snapshots, got {step}")
    weights, error = rebuilding_weights(times, [float(path.name) for path in found], step, sigma)
    model: Model | None = None
    sums: dict[str, Tensor] = {}
    for path, weight in zip(found, weights.tolist()):
        kinds: list[type[Model]] = [DynamicContentTransformer, DynamicGrainTransformer, DiT]
        snapshot = saved_kind(path, kinds).from_pretrained(path)
        if model is not None and snapshot.config != model.config:
            raise ValueError(f"{path} is of another model than {found[0]}")
        model = snapshot if model is None else model
        for name, p in snapshot.named_parameters():
            term = p.double() * weight
            sums[name] = sums[name].add_(term) if name in sums else term
    assert model is not None
    for name, p in model.named_parameters():
        p.copy_(sums[name])
    return model, step, error


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m d2it.training.ema",
        description="An average of any width from the snapshots of a run (<stage>.snapshot_every).",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--sigma-rel", type=float, required=True, metavar="S", help=f"width, above 0 and below {WIDEST:.4f}"
    )
    parser.add_argument("--stage", choices=("grain", "content"), default="content", help="(%(default)s)")
    parser.add_argument("--step", type=int, metavar="N", help="the average after N steps (of the last snapshot)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(<run>/averages/<stage>/sigma-S)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuilds an average of a run's weights and writes it as a model's folder."""
    options = parser().parse_args(arguments)
    output = options.output or options.run / FOLDER / options.stage / f"sigma-{options.sigma_rel:g}"
    with user_error():
        model, step, error = rebuild(options.run, options.stage, options.sigma_rel, options.step)
    model.save_pretrained(output)
    print(f"{output}: sigma_rel {options.sigma_rel:g} after {step:,} steps, profile within {error:.1%}")
    if error > 0.1:
        print("warning: the snapshots do not span this profile: keep more of them, or ask for another", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
