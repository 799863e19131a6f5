"""A training step of D2iT: packed, with masks over all cells, and of the DiT of the same width and depth.

python benchmarks/train_bench.py [--model XL B] [--batch-size 128 256 32] [--fill 0.5] [--only 'D2iT-XL*']
python benchmarks/train_bench.py --count [--model XL] [--batch-size 128] [--gpu H200] [--weights float32]

The step is the trainer's: noise, loss, backward, AdamW, average (d2it.training), on cached latents, in the dtype that
precision=auto takes, which the case names; on a CPU where that is bfloat16, a case in float32 stands beside it.
Its operations are 6 x the multiply-accumulates of the tokens that exist: for the masked contender, of all cells.
"plain" has adaLN of the dense blocks in plain PyTorch, for the compiler to fuse; "autotuned" (--autotune) lets
Inductor choose among its own matrix products too, into whose ends GELU and biases go; "sdpa-attention" and
"d2it-attention" have in the dense blocks the attention that "auto" does not choose there; so have "float32-weights" and
"bfloat16-weights" the blocks' weights. "part" lines time pieces of the packed step alone, uncompiled; the loader's is
what reading and preparing a batch takes on the host, which a step does not wait for unless it is longer than the step.
The MLP's lines are one MLP of the dense blocks, forward and backward, in the forms that PyTorch has for GELU and
biases. The budget lines are steps at shares of the tokens of the finest map (--budgets).

Predicted is what bytes and operations (`step_count`) take at the rates of this machine, with our kernels at their
floors. Rows name the kernels that take longest, and a second table adds up the operators of every profiled step by the
part of the network that they belong to: attention, MLP, modulation, optimiser, data (`step_parts`). --count prints
the bytes and operations of a step, part by part, and what they come to on a GPU that need not be there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import machine
import numpy as np
import step_count
import step_parts
import timing
import torch
import torch.nn.functional as F
from bench import TOLERANCE, Skip
from kernel_report.gpus import PRODUCTS
from models import (
    SIZES,
    Case,
    Job,
    at_budgets,
    case_name,
    case_shape,
    compilable,
    distance,
    each_batch,
    each_dtype,
    grain_maps,
    main,
    open_gates,
    size_arguments,
)
from PIL import Image
from torch import Tensor

from d2it.data import ImageSource, LatentCache, build_cache, finish_cache
from d2it.devices import peak_flops
from d2it.distributed import World
from d2it.models import DynamicContentTransformer, DynamicVAE
from d2it.models.attention import ON_GPU, best_attention
from d2it.models.dit import TransformerConfig
from d2it.models.flops import fine_tokens
from d2it.models.layers import Mlp
from d2it.training.config import Config
from d2it.training.content import ContentStage
from d2it.training.latents import LatentData
from d2it.training.learner import Batch
from d2it.training.stage import loader, to_device

Contenders = dict[str, tuple[str, Callable[[], Job]]]

CLASSES = 1000
MOST_POSITIONS = 256
CHECKED = 8
"""Images of the batch whose gradients are compared, in float32 with masks over all cells."""


def stage(
    options: argparse.Namespace,
    preset: str,
    *,
    masked: bool = False,
    compiled: bool = False,
    attention: str = "auto",
    weights: str = "auto",
) -> ContentStage:
    """The trainer's stage in `options.dtype` with open gates; presets of one size start from the same weights."""
    config = Config()
    config.data.num_classes = CLASSES
    settings = config.content
    settings.preset, settings.batch_size, settings.compile = preset, options.batch_size, compiled
    settings.overrides["attention"], settings.weights = attention, weights
    settings.precision = "bf16" if options.dtype == torch.bfloat16 else "fp32"
    if masked:
        settings.overrides["masked"] = True
    if options.warm:  # all blocks of a half are compiled alike, and one of each fits beside other processes
        settings.overrides["depth"] = 1
        if preset.startswith("D2iT"):
            settings.overrides["refine_depth"] = 1
    vae = DynamicVAE.preset_config("f8f16f32" if preset.endswith("-3") else "f8f16")
    data = LatentData.of_vae(vae, (options.image_size, options.image_size), images=options.batch_size)
    world = World(0, 1, 1, torch.device(machine.device()))
    with world.device:
        made = ContentStage(config, settings, world, data, None)
    open_gates(made.network)
    return made


def batch_of(options: argparse.Namespace, made: ContentStage) -> Batch:
    rng = torch.Generator().manual_seed(0)
    shape = (options.batch_size, *made.data.latent_shape)
    batch = {
        "mean": torch.randn(shape, generator=rng),
        "std": torch.rand(shape, generator=rng),
        "grain_map": grain_maps(options, made.data.grid, made.data.num_grains),
        "label": torch.randint(CLASSES, (options.batch_size,), generator=rng),
    }
    return to_device(made.prepare(batch), made.world.device)


def gradients(made: ContentStage, batch: Batch) -> list[Tensor]:
    """Of one batch, with the same noise, timesteps and dropped labels for every contender."""
    learner = made.learners[0]
    torch.manual_seed(0)
    learner.backward(batch, last=True)
    trained = [learner.masters.weights.get(p, p) for p in learner.parameters]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    learner.optimizer.zero_grad(set_to_none=True)
    return found


class Reference:
    """The gradients of the masked model over few images, in float32, computed when first asked for."""

    def __init__(self, options: argparse.Namespace, preset: str) -> None:
        few = min(options.batch_size, CHECKED)
        self.options = argparse.Namespace(**{**vars(options), "batch_size": few, "dtype": torch.float32})
        self.preset = preset
        self.found: list[Tensor] | None = None

    def distance(self, made: ContentStage) -> float:
        batch = batch_of(self.options, made)
        if self.found is None:
            exact = stage(self.options, self.preset, masked=True)
            self.found = gradients(exact, batch_of(self.options, exact))
        return distance(gradients(made, batch), self.found)


def auto_attention(config: TransformerConfig, dtype: torch.dtype) -> str:
    """What attention=auto is in the dense blocks of a step on this machine."""
    shape = 1, config.num_tokens, 3, config.heads, config.dim // config.heads
    return best_attention(torch.empty(shape, dtype=dtype, device=machine.device()))


@functools.cache
def rates_of(preset: str, batch: int, image_size: int, dtype: torch.dtype) -> step_count.Rates:
    """What this machine reaches: copies, products of the layers of a dense block, attention of its heads."""
    config, numbers = step_count.config_of(preset, image_size), {"device": machine.device(), "dtype": dtype}
    rows, dim, hidden = batch * config.num_tokens, config.dim, int(config.dim * config.mlp_ratio)
    macs, calls = 0, []
    for inner, outer in ((dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)):
        x, weight, grad = (torch.randn(*shape, **numbers) for shape in ((rows, inner), (outer, inner), (rows, outer)))
        calls += [partial(F.linear, x, weight), partial(torch.mm, grad, weight), partial(torch.mm, grad.t(), x)]
        macs += 3 * rows * inner * outer
    ms = sum(timing.time_calls([call], graph=False, seconds=0.05).ms for call in calls)
    q = torch.randn(batch, config.heads, config.num_tokens, dim // config.heads, **numbers).requires_grad_()
    grad = torch.randn_like(q)
    attention = timing.time_calls(
        [lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, q, q), q, grad)], graph=False, seconds=0.05
    )
    measured = timing.machine_rates()
    return step_count.Rates(
        copy=measured["copy_gbps"] * 1e9,
        products=2 * macs / ms * 1e3,
        attention=14 * batch * config.num_tokens**2 * dim / attention.ms * 1e3,
        float32=measured["matmul_tflops"]["float32"] * 1e12,
        peak=peak_flops(torch.device(machine.device())),
    )


def counted(
    options: argparse.Namespace, made: ContentStage, batch: Batch, where: str | None = None
) -> dict[str, float]:
    """Figures of a row: bytes, their floor, and the milliseconds that bytes and operations come to."""
    config = made.network.config
    found = step_count.parts(
        config,
        options.batch_size,
        step_count.Parameters.of(made.network),
        batch.get("fine"),
        itemsize=options.dtype.itemsize,
        weights="bfloat16" if made.learners[0].masters.weights else "float32",
        auto=auto_attention(config, options.dtype),
    )
    rates = rates_of(made.settings.preset, options.batch_size, options.image_size, options.dtype)
    some = [part for part in found if where in (None, part.where)]
    return {
        "counted_bytes": sum(part.bytes for part in some),
        "counted_floor": sum(part.floor for part in some),
        "predicted_ms": step_count.predicted_ms(some, rates),
    }


def step(
    options: argparse.Namespace,
    preset: str,
    reference: Reference | None,
    *,
    masked: bool = False,
    compiled: bool = False,
    plain: bool = False,
    autotuned: bool = False,
    attention: str = "auto",
    weights: str = "auto",
) -> Job:
    """The whole step."""
    if compiled:
        compilable(options)
    if autotuned and not options.autotune:
        raise Skip("choosing among kernels takes minutes: --autotune")
    if weights != "auto" and options.dtype != torch.bfloat16:
        raise Skip(f"a step in {str(options.dtype)[6:]} rounds no weights")
    made = stage(options, preset, masked=masked, compiled=compiled, attention=attention, weights=weights)
    if attention == "d2it" and made.network.config.num_tokens > MOST_POSITIONS:
        raise Skip(f"window attention on a GPU takes at most {MOST_POSITIONS} tokens")
    if plain:
        for block in made.network.multi_grained.blocks:
            block.backend = "reference"
    batch, learner = batch_of(options, made), made.learners[0]
    if autotuned:
        made.network.compile_blocks(mode="max-autotune-no-cudagraphs")
    error = reference.distance(made) if reference and not options.warm else None

    def call() -> None:
        learner.backward(batch, last=True)
        learner.update(0)

    flops, tolerance = 6 * made.work(batch).macs, 2 * TOLERANCE[options.dtype]
    figures = {} if masked or options.warm else counted(options, made, batch)
    part_of = None if masked else step_parts.parts_of(made.network.config)
    return Job(call, options.batch_size, flops, error, tolerance, figures, profiled=not masked, part_of=part_of)


def mlp(options: argparse.Namespace, preset: str, how: str) -> Job:
    """One MLP of the dense blocks, forward and backward."""
    if how != "eager":
        compilable(options)
    if how == "autotuned" and not options.autotune:
        raise Skip("choosing among kernels takes minutes: --autotune")
    config = step_count.config_of(preset, options.image_size)
    rows, where = options.batch_size * config.num_tokens, torch.device(machine.device())
    torch.manual_seed(0)
    with where:
        layer = Mlp(config.dim, config.mlp_ratio)
        x, grad = torch.randn(2, rows, config.dim, dtype=options.dtype)
    x.requires_grad_()
    run: Callable[[Tensor], Tensor] = layer
    if how != "eager":
        run = torch.compile(layer, mode="max-autotune-no-cudagraphs" if how == "autotuned" else None)

    def results(x: Tensor, grad: Tensor, bf16: bool, run: Callable[[Tensor], Tensor] = run) -> list[Tensor]:
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            out = run(x)
        return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]

    few = slice(64)
    exact = results(x[few].detach().float().requires_grad_(), grad[few].float(), False, layer)
    bf16 = options.dtype == torch.bfloat16
    error = distance(results(x[few].detach().requires_grad_(), grad[few], bf16), exact)
    macs = 2 * rows * config.dim * int(config.dim * config.mlp_ratio)
    call = partial(results, x, grad, bf16)
    return Job(call, options.batch_size, 6 * macs, error, 2 * TOLERANCE[options.dtype], profiled=True)


def part(options: argparse.Namespace, preset: str, name: str) -> Job:
    """A piece of the packed step: forward and backward of a half of the network, or the update."""
    made = stage(options, preset)
    batch, network, learner = batch_of(options, made), made.network, made.learners[0]
    device, config, count = made.world.device, network.config, options.batch_size
    figures = counted(options, made, batch, name)
    if name == "optimiser":
        trained = [learner.masters.weights.get(p, p) for p in learner.parameters]
        gradients = [torch.randn_like(p) * 1e-3 for p in trained]

        def update() -> None:
            for p, gradient in zip(trained, gradients):
                p.grad = gradient
            learner.update(0)

        return Job(update, count, counted=figures, profiled=True)
    t, y = torch.randint(1000, (count,), device=device), batch["label"]
    if name == "dense blocks":
        x = torch.randn(count, config.in_channels, *config.grid, device=device)
        forward: Callable[[], Tensor] = partial(network.multi_grained, x, t, y)
    else:
        plan = network.make_plan(batch["grain_map"], batch["capacity"])
        width = network.refine.in_features + config.num_grains
        features = torch.randn(plan.capacity, width, device=device)
        positions = torch.randn(plan.capacity, config.dim, device=device, dtype=options.dtype)
        forward = partial(network.refine, features, positions, t, y, sample=plan.sample, slots=plan.slots)

    def both() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.bf16):
            out = forward()
        out.backward(torch.randn_like(out))
        learner.optimizer.zero_grad(set_to_none=True)

    return Job(both, count, counted=figures, profiled=True)


class Noise(ImageSource):
    """Random pictures; the cache that is read holds random latents all the same."""

    def __init__(self, size: int, count: int) -> None:
        super().__init__(size)
        self.count, self.labels = count, np.arange(count) % CLASSES
        self.num_classes, self.description = CLASSES, "noise"

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def picture(self, index: int) -> Image.Image:
        return Image.new("RGB", (self.image_size[1], self.image_size[0]), (index % 256, 0, 0))


def reading(options: argparse.Namespace, preset: str) -> Job:
    """A batch from the latent cache, as the trainer's loader makes it."""
    made = stage(options, preset)
    data = made.data
    opened = contextlib.ExitStack()
    folder = opened.enter_context(tempfile.TemporaryDirectory())

    def encode(images: Tensor) -> dict[str, Tensor]:
        found = {"entropy": torch.rand(len(images), *data.grid)}
        for grain, factor in enumerate(reversed(data.downsampling)):
            shape = (len(images), data.latent_shape[0], *(side // factor for side in data.image_size))
            found |= {f"mean.{grain}": torch.randn(shape), f"std.{grain}": torch.rand(shape)}
        return found

    # Of three grains half of the finer regions are finest, as in `grain_maps`.
    limits = [1 - options.fill * i / (data.num_grains - 1) for i in range(data.num_grains - 1, 0, -1)]
    facts: dict[str, Any] = {"thresholds": limits, "downsampling": list(data.downsampling), "scaling_factor": 1.0}
    build_cache(folder, Noise(options.image_size, 4 * options.batch_size), encode, facts=facts)
    finish_cache(folder)
    stream = loader(made.config, made.settings, LatentCache(folder), made.world, 0, made.prepare)
    batches = iter(opened.enter_context(stream))
    return Job(lambda: next(batches), options.batch_size, host=True, close=opened.close)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for size in options.model:
        first = True
        for some in each_batch(options):
            yield from cases_of(some, *SIZES[size], budgets=first)
            first = False


def cases_of(options: argparse.Namespace, preset: str, baseline: str, *, budgets: bool) -> Iterator[Case]:
    """The cases of one model at one batch."""
    reference = Reference(options, preset)
    auto, *others = each_dtype(options, preset)
    yield step_case(auto, preset, {**whole_steps(auto, preset, baseline, reference), **pieces(auto, preset)})
    for other in others:
        yield step_case(other, preset, whole_steps(other, preset, baseline, reference))
    forms = {f"mlp {how}": (preset, partial(mlp, auto, preset, how)) for how in ("compiled", "autotuned", "eager")}
    yield Case(case_name(auto, preset, "mlp"), case_shape(auto), auto.dtype, "mlp", forms)
    if not budgets:
        return
    for budget, spending, entries in at_budgets(auto, preset):
        job = partial(step, spending, preset, Reference(spending, preset))
        name, shape = case_name(auto, preset, f"budget{budget:g}"), case_shape(auto, **entries)
        yield Case(name, shape, auto.dtype, "step", {"d2it packed eager": (preset, job)})


def step_case(options: argparse.Namespace, preset: str, contenders: Contenders) -> Case:
    name, shape = case_name(options, preset, f"fill{options.fill:g}"), case_shape(options, fill=options.fill)
    return Case(name, shape, options.dtype, "step", contenders)


def whole_steps(options: argparse.Namespace, preset: str, baseline: str, reference: Reference) -> Contenders:
    """Steps in the dtype of the options; in that of precision=auto all forms of ours."""
    found: Contenders = {}
    for how in ("compiled", "eager"):
        flag = {"compiled": how == "compiled"}
        packed = partial(step, options, preset, reference, **flag)
        found[f"d2it packed {how}"] = preset, packed
        if options.auto:
            if how == "compiled":
                for form in ("plain", "autotuned"):
                    found[f"d2it packed {form} {how}"] = preset, partial(packed, **{form: True})
                config = step_count.config_of(preset, options.image_size)
                for other in sorted({"sdpa", "d2it"} - {auto_attention(config, options.dtype)}):
                    found[f"d2it packed {other}-attention {how}"] = preset, partial(packed, attention=other)
            other = "float32" if machine.device() == "cuda" else "bfloat16"  # than "auto"
            found[f"d2it packed {other}-weights {how}"] = preset, partial(packed, weights=other)
        found[f"masked {how}"] = preset, partial(packed, masked=True)
        found[f"dit {how}"] = baseline, partial(step, options, baseline, None, **flag)
    return found


def pieces(options: argparse.Namespace, preset: str) -> Contenders:
    """The pieces of the packed step."""
    names = ("dense blocks", "RefineNet", "optimiser")
    found: Contenders = {f"part: {name}": (preset, partial(part, options, preset, name)) for name in names}
    return {**found, "part: loader": (preset, partial(reading, options, preset))}


def count(options: argparse.Namespace) -> None:
    """Prints the bytes and operations of a step of every model and batch, and what they come to on a GPU."""
    kernels = {} if options.at_floor else step_count.counted_kernels(options.gpu)
    rates = step_count.assumed_rates(options.gpu, options.tflops * 1e12)
    for name in options.model:
        preset = SIZES[name][0]
        config: TransformerConfig = step_count.config_of(preset, options.image_size)
        with torch.device("meta"):
            parameters = step_count.Parameters.of(DynamicContentTransformer(config))
        assert isinstance(config, step_count.ContentTransformerConfig)
        fits = options.attention != "d2it" or config.num_tokens <= MOST_POSITIONS
        auto = options.attention if fits else "sdpa"
        alike = dataclasses.replace(
            config, attention="d2it" if auto == "d2it" else "sdpa"
        )  # a package launches as PyTorch
        how: dict[str, Any] = {"weights": options.weights, "added": options.added}
        host = step_count.launches(alike, **how)
        for some in each_batch(options):
            fine = fine_tokens(grain_maps(some, config.region_grid, config.num_grains), config)
            found = step_count.parts(config, some.batch_size, parameters, fine, kernels or None, **how, auto=auto)
            size = f"{some.image_size} pixels, batch {some.batch_size}, fill {some.fill:g}"
            print(f"\n{preset} at {size}, weights in {options.weights}, on an {options.gpu}")
            print(step_count.table(found, rates, step_count.step_flops(config, some.batch_size, fine)))
            low, high = host.host_ms
            device = step_count.predicted_ms(found, rates)
            print(
                f"eagerly the host launches {host.pytorch} operators of PyTorch and {host.ours} of ours: {low:.1f} to "
                f"{high:.1f} ms, {low / device:.0%} to {high / device:.0%} of the device's time"
            )


def arguments() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = size_arguments(__doc__, (128, 256, 32))
    parser.add_argument("--autotune", action="store_true", help="contenders for which Inductor tries many kernels")
    parser.add_argument("--count", action="store_true", help="count the step, time nothing; no GPU needed")
    parser.add_argument("--gpu", choices=sorted(PRODUCTS), default="H200", help="of --count (%(default)s)")
    parser.add_argument(
        "--tflops", type=float, default=580.0, help="of --count: what cuBLAS reaches at these shapes (%(default)s)"
    )
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of --count: those of the blocks, in %(default)s by default as with weights=auto on a GPU",
    )
    parser.add_argument(
        "--added", action="store_true", help="of --count: gradients are added up, over ranks or micro-batches"
    )
    parser.add_argument(
        "--attention",
        choices=("sdpa", *ON_GPU),
        default="d2it",
        help="of --count: what attention=auto is there, d2it where its CUDA C++ is built (%(default)s)",
    )
    parser.add_argument(
        "--at-floor", action="store_true", help="of --count: our kernels at their floors, without compiling them"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Counts, or measures."""
    if options.count:
        count(options)
        return 0
    return main("train", options, cases)


if __name__ == "__main__":
    raise SystemExit(run(arguments().parse_args()))
