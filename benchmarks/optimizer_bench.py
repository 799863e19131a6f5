"""What follows the backward pass: the gradients' norm, clipping, AdamW and an average of the weights.

python benchmarks/optimizer_bench.py [--only 'D2iT-S*'] [--seconds 1]

On all weights of a model, in float32. Ours takes two passes, PyTorch's kernels one for each of the four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import command
import machine
import torch
from bench import Bench, Cost, Run
from torch import Tensor, nn

from d2it.models import DynamicContentTransformer
from d2it.training.adamw import AdamW, why_not
from d2it.training.ema import Ema

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CLIP, DECAY = 1.0, 0.9999

Shapes = list[tuple[int, ...]]


def shapes_of(preset: str) -> Shapes:
    """The shapes of all weights of a model."""
    config = DynamicContentTransformer.preset_config(preset, image_size=256, num_classes=1000)
    with torch.device("meta"):
        return [tuple(p.shape) for p in DynamicContentTransformer(config).parameters()]


def inputs(shapes: Shapes, seed: int) -> dict[str, Any]:
    """Gradients whose norm is half of what they are clipped to, so that PyTorch's clipping leaves them as they are."""
    rng = torch.Generator(machine.device()).manual_seed(seed)
    gradients = [torch.randn(shape, generator=rng, device=machine.device()) for shape in shapes]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return {"gradients": [gradient * (0.5 * CLIP / norm) for gradient in gradients]}


class Weights(nn.Module):
    """Weights with these gradients; `step` is what is timed.

    Args:
        gradients: of the weights.
        optimizer: makes the optimiser of the weights.
    """

    def __init__(self, gradients: list[Tensor], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for i, gradient in enumerate(gradients):
            weight = torch.randn(gradient.shape, generator=rng) * 0.02
            self.register_parameter(f"p{i}", nn.Parameter(weight.to(gradient)))
        for p, gradient in zip(self.parameters(), gradients):
            p.grad = gradient
        self.optimizer = optimizer(list(self.parameters()), **SETTINGS)
        self.average = Ema(self, DECAY)

    def step(self) -> list[Tensor]:
        """Returns weights and average after one more step."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.update(clip=CLIP, averages=[self.average])
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP, foreach=True)
            self.optimizer.step()
            self.average.update()
        return [*(p.detach() for p in self.parameters()), *self.average.shadow.values()]


def contender(optimizer: Callable[..., torch.optim.Optimizer]) -> Run:
    """Each of the inputs has weights of its own, which go on from call to call."""
    made: dict[int, Weights] = {}

    def run(given: dict[str, Any]) -> list[Tensor]:
        weights = made.get(id(given))
        if weights is None:
            weights = made[id(given)] = Weights(given["gradients"], optimizer)
        return weights.step()

    return run


def expected(given: dict[str, Any]) -> list[Tensor]:
    """After two steps, the first of which warms up."""
    weights = Weights(given["gradients"], partial(torch.optim.AdamW, foreach=False))
    weights.step()
    return weights.step()


def cost(shapes: Shapes) -> Cost:
    """The norm reads the gradients; the update reads weights, gradients, two moments and the average, and writes all of
    these but the gradients."""
    return Cost(bytes=4 * 10 * sum(torch.Size(shape).numel() for shape in shapes))


def contenders() -> dict[str, Callable[[], Run]]:
    here = [torch.zeros(1, device=machine.device())]
    ours = [name for name in ("triton", "cpu") if not why_not(name, here)] or ["torch"]
    found: dict[str, Callable[[], Run]] = {
        f"d2it {name}": partial(contender, partial(AdamW, backend=name)) for name in ours
    }
    for kind in ("fused", "foreach"):
        found[f"torch {kind}"] = partial(contender, partial(torch.optim.AdamW, **{kind: True}))
    return found


def benches() -> Iterator[Bench]:
    odd: Shapes = [(384, 384), (1537,), (63, 65), (1,)]
    named = ("D2iT-B", "D2iT-XL") if machine.device() == "cuda" else ("D2iT-S",)
    for name, shapes in {"odd": odd, **{preset: shapes_of(preset) for preset in named}}.items():
        yield Bench(
            case=f"{name}-float32",
            shape={"tensors": len(shapes), "elements": sum(torch.Size(shape).numel() for shape in shapes)},
            dtype=torch.float32,
            inputs=partial(inputs, shapes),
            contenders=contenders(),
            forward=cost(shapes),
            expected=expected,
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "optimizer", benches))
