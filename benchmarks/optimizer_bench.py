"""What follows the backward pass: the gradients' norm, clipping, AdamW and an average of the weights.

python benchmarks/optimizer_bench.py [--only 'D2iT-S*'] [--seconds 1]

On all weights of a model, in float32, or with the blocks' weights and their gradients in bfloat16 and float32 masters,
which PyTorch's kernels update by widened gradients and round afterwards, as autocast has it. Ours takes two passes,
PyTorch's kernels one for each of the four, and of bfloat16 weights one for each of these copies.
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
from d2it.training.masters import linears

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CLIP, DECAY = 1.0, 0.9999

Shapes = list[tuple[tuple[int, ...], torch.dtype]]
"""Of weights, and the dtype of each."""


def shapes_of(preset: str, dtype: torch.dtype = torch.float32) -> Shapes:
    """All weights of a model, those that the setting `weights` is about in `dtype`."""
    config = DynamicContentTransformer.preset_config(preset, image_size=256, num_classes=1000)
    with torch.device("meta"):
        network = DynamicContentTransformer(config)
    rounded = {id(part.weight) for part in linears(network.transformer_blocks())}
    return [(tuple(p.shape), dtype if id(p) in rounded else torch.float32) for p in network.parameters()]


def inputs(shapes: Shapes, seed: int) -> dict[str, Any]:
    """Gradients whose norm is half of what they are clipped to, so that PyTorch's clipping leaves them as they are."""
    rng = torch.Generator(machine.device()).manual_seed(seed)
    gradients = [torch.randn(shape, generator=rng, device=machine.device()) for shape, _ in shapes]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    dtypes = [dtype for _, dtype in shapes]
    return {"gradients": [(gradient * (0.5 * CLIP / norm)).to(dtype) for gradient, dtype in zip(gradients, dtypes)]}


class Weights(nn.Module):
    """Weights with these gradients; `step` is what is timed. Where a gradient is bfloat16, so is the weight, and the
    parameter is its master.

    Args:
        gradients: of the weights.
        optimizer: parameters, and the bfloat16 weight of each that is a master -> their optimiser.
    """

    def __init__(self, gradients: list[Tensor], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for i, gradient in enumerate(gradients):
            weight = torch.randn(gradient.shape, generator=rng) * 0.02
            kept = torch.float32 if gradient.dtype == torch.bfloat16 else gradient.dtype
            self.register_parameter(f"p{i}", nn.Parameter(weight.to(gradient.device, kept)))
        self.halves: dict[nn.Parameter, nn.Parameter] = {}
        for p, gradient in zip(self.parameters(), gradients):
            if gradient.dtype == torch.bfloat16:
                self.halves[p] = nn.Parameter(p.detach().bfloat16())
                self.halves[p].grad = gradient
            else:
                p.grad = gradient
        self.optimizer = optimizer(list(self.parameters()), self.halves)
        self.average = Ema(self, DECAY)

    @torch.no_grad()
    def step(self) -> list[Tensor]:
        """Returns weights and average after one more step."""
        if isinstance(self.optimizer, AdamW):
            self.optimizer.update(clip=CLIP, averages=[self.average])
        else:
            for master, weight in self.halves.items():
                master.grad = weight.grad.float()
            torch.nn.utils.clip_grad_norm_(self.parameters(), CLIP, foreach=True)
            self.optimizer.step()
            self.average.update()
            if self.halves:
                torch._foreach_copy_(list(self.halves.values()), list(self.halves))
        return [*(p.detach() for p in self.parameters()), *self.average.shadow.values()]


def ours(backend: str, parameters: list[nn.Parameter], halves: dict[nn.Parameter, nn.Parameter]) -> AdamW:
    return AdamW(parameters, **SETTINGS, weights=halves, backend=backend)


def torchs(how: str, parameters: list[nn.Parameter], halves: dict[nn.Parameter, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **SETTINGS, fused=how == "fused", foreach=how == "foreach")


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
    weights = Weights(given["gradients"], partial(torchs, "for-loop"))
    weights.step()
    return weights.step()


def cost(shapes: Shapes) -> Cost:
    """The norm reads the gradients; the update reads weights, gradients, two moments and the average, and writes all of
    these but the gradients, and bfloat16 weights beside their masters."""
    elements = [(torch.Size(shape).numel(), dtype) for shape, dtype in shapes]
    return Cost(bytes=sum(count * (40 if dtype == torch.float32 else 38) for count, dtype in elements))


def contenders() -> dict[str, Callable[[], Run]]:
    here = [torch.zeros(1, device=machine.device())]
    backends = [name for name in ("triton", "cpu") if not why_not(name, here)] or ["torch"]
    found: dict[str, Callable[[], Run]] = {f"d2it {name}": partial(contender, partial(ours, name)) for name in backends}
    for how in ("fused", "foreach"):
        found[f"torch {how}"] = partial(contender, partial(torchs, how))
    return found


def benches() -> Iterator[Bench]:
    odd: Shapes = [(shape, torch.float32) for shape in ((384, 384), (1537,), (63, 65), (1,))]
    named = ("D2iT-B", "D2iT-XL") if machine.device() == "cuda" else ("D2iT-S",)
    every = {"odd-float32": odd}
    for preset in named:
        for dtype in (torch.float32, torch.bfloat16):
            every[f"{preset}-{str(dtype)[6:]}"] = shapes_of(preset, dtype)
    for name, shapes in every.items():
        yield Bench(
            case=name,
            shape={"tensors": len(shapes), "elements": sum(torch.Size(shape).numel() for shape, _ in shapes)},
            dtype=torch.float32,
            inputs=partial(inputs, shapes),
            contenders=contenders(),
            forward=cost(shapes),
            expected=expected,
        )


if __name__ == "__main__":
    raise SystemExit(command.main(__doc__, "optimizer", benches))
