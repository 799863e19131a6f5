"""Sampling grain maps, and latents under a grain map, with the solvers of `d2it.diffusion.solvers`.

The state of a grained sampling stays one value a latent code at every step. The model's output is averaged over each
code (`project_to_grains`); a solver works element by element, so its step keeps equal cells equal but for the noise
it adds to each cell; afterwards every code takes the value of its first cell, whose noise is one normal draw.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from d2it.diffusion.grains import copy_codes, expected_signal, project_to_grains, randn
from d2it.diffusion.guidance import Guidance
from d2it.diffusion.guidance import guide as guide_output
from d2it.diffusion.process import Diffusion
from d2it.diffusion.solvers import (
    Ddpm,
    Diffusers,
    Solver,
    default_scheduler,
    draw_noise,
    make_diffusion,
    make_generators,
    make_scheduler,
    whole_number,
)

Callback = Callable[[int, float, Tensor], None]
#: Settings of a model from which, with the grain map, its arguments in `_model_plans` follow.
PLANNED = ("window", "min_grain", "masked")


class Kind(NamedTuple):
    """What kind of pass through the model a step is; each has arguments and a CUDA graph of its own.

    Args:
        guided: with and without the label, as one batch.
        refined: with RefineNet, which a model may leave out of the noisy steps.
        guide_refined: the same of a weaker model that guides.
    """

    guided: bool
    refined: bool = True
    guide_refined: bool = True


def _always(fraction: float) -> bool:
    return True


_KINDS = [Kind(*kind) for kind in itertools.product((False, True), repeat=2)]


@torch.no_grad()
def sample_content(
    model: nn.Module,
    grain_map: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int],
    diffusion: Diffusion | None = None,
    scheduler: str | None = None,
    steps: int = 250,
    guidance: Guidance | None = None,
    guide: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Latents (B, C, Hf, Wf), float32, in the scale that the model was trained on.

    Args:
        model: a `DynamicContentTransformer`, or a plain `DiT` where `grain_map` is None.
        grain_map: (B, H/S, W/S) int64. The token plan is made from it once and serves every step.
        labels: (B,), or None for a model without classes.
        seeds: one for each sample: equal seeds give equal samples in any batch.
        diffusion: None is what the model's own configuration describes.
        scheduler: one of `SCHEDULERS`, or of `FLOW_SCHEDULERS` on the linear path; None is the path's default. With a
            learned variance "ddpm" uses it, the others leave it out.
        steps: denoising steps.
        guidance: None is none. A guided step runs the model on both halves as one batch, or the model and `guide`.
        guide: a weaker model of the same kind, in place of the model without its label (autoguidance, Karras et al.
            2024); classes, sizes, factors, path and prediction must be the same.
        autocast: torch.bfloat16 or torch.float16 for the model; the state stays float32. A model that was itself
            cast (`model.bfloat16()`) needs none.
        cuda_graph: capture a step once and replay it: with "ddpm" and "ddim" the whole step, with the schedulers of
            diffusers all of it but their own few operations.
        callback: called with (number of the step, timestep, state) after every step.

    Raises:
        ValueError: arguments that do not fit the model, an unknown scheduler, labels out of range, a CUDA graph on a
            CPU.
    """
    config: Any = model.config
    guidance = guidance or Guidance()
    check_guidance("guidance", guidance, config.in_channels, config, guide is not None)
    if guide is not None:
        check_guide(guide, model)
    seeds = check_seeds(seeds)
    labels = check_labels(labels, len(seeds), config.num_classes)
    if grain_map is not None:
        check_grain_map(grain_map, len(seeds), config)
    diffusion = diffusion or make_diffusion(config.diffusion, learn_sigma=config.learn_sigma)
    scheduler = scheduler or default_scheduler(diffusion.config)
    solver = make_scheduler(scheduler, diffusion, steps, learned_range=config.learn_sigma)
    options: dict[str, Any] = {"autocast": autocast, "cuda_graph": cuda_graph, "callback": callback}
    return denoise_content(model, grain_map, labels, seeds, solver, guidance, guide=guide, **options)


@torch.no_grad()
def sample_grain_maps(
    model: nn.Module,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int],
    diffusion: Diffusion | None = None,
    scheduler: str | None = None,
    steps: int = 250,
    guidance: Guidance | None = None,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Grain maps (B, h, w) int64 of a `DynamicGrainTransformer`: the most likely grain at the end of the chain.

    Of a model with levels of the entropy they are the most likely levels, which `level_grains` makes grains of.

    The arguments are those of `sample_content`; guidance acts on the logits, schedulers are `GRAIN_SCHEDULERS`.

    Raises:
        ValueError: as for `sample_content`.
    """
    config: Any = model.config
    guidance = guidance or Guidance()
    check_guidance("guidance", guidance, config.levels, config)
    seeds = check_seeds(seeds)
    labels = check_labels(labels, len(seeds), config.num_classes)
    diffusion = diffusion or make_diffusion(config.diffusion, learn_sigma=False)
    scheduler = scheduler or default_scheduler(diffusion.config)
    solver = make_scheduler(scheduler, diffusion, steps, prediction="sample")
    return denoise_grain_maps(model, labels, seeds, solver, guidance, autocast=autocast, cuda_graph=cuda_graph)


def denoise_content(
    model: nn.Module,
    grain_map: Tensor | None,
    labels: Tensor | None,
    seeds: Sequence[int],
    solver: Solver,
    guidance: Guidance,
    *,
    guide: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """`sample_content` of arguments that are known to fit each other; the solver can serve many calls."""
    config: Any = model.config
    channels = config.in_channels
    device = next(model.parameters()).device
    generators = make_generators(seeds, device)
    keep = 2 * channels if isinstance(solver, Ddpm) and solver.learned_range else channels
    twice = guidance.scale != 1.0 and guide is None
    arguments: dict[Kind, dict[str, Any]] = {kind: {} for kind in _KINDS}
    refines = guide_refines = _always
    if grain_map is None:

        def grained(x: Tensor) -> Tensor:
            return x

        project = grained
    else:
        grain_map = grain_map.to(device)
        arguments = _model_plans(model, grain_map, guided=twice)
        refines = config.refines
        sizes = config.code_sizes

        def grained(x: Tensor) -> Tensor:
            return copy_codes(x, grain_map, sizes)

        def project(x: Tensor) -> Tensor:
            return project_to_grains(x, grain_map, code_sizes=sizes)

    reference = None
    guided = guidance.channels or channels
    if guide is not None:
        of_guide, theirs = arguments, cast(Any, guide.config)
        if grain_map is not None:
            guide_refines = theirs.refines
            if any(getattr(theirs, key) != getattr(config, key) for key in PLANNED):
                of_guide = _model_plans(guide, grain_map, guided=False)
        reference = _Output(guide, labels, of_guide, guided, autocast, device)
    output = _Output(model, labels, arguments, guided, autocast, device, reference)

    def kind_of(fraction: float, guided: bool) -> Kind:
        return Kind(guided, refines(fraction), not guided or guide_refines(fraction))

    x = grained(randn((len(seeds), channels, *config.grid), generators, device=device, dtype=torch.float32))
    chain = _Chain(solver, output, lambda out: project(out[:, :keep]), grained, cuda_graph, kind_of)
    return chain(x, generators, guidance, callback)[0]


def denoise_grain_maps(
    model: nn.Module,
    labels: Tensor | None,
    seeds: Sequence[int],
    solver: Solver,
    guidance: Guidance,
    *,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """`sample_grain_maps` of arguments that are known to fit each other; the solver can serve many calls."""
    config: Any = model.config
    device = next(model.parameters()).device
    generators = make_generators(seeds, device)
    channels = guidance.channels or config.levels
    output = _Output(model, labels, {kind: {} for kind in _KINDS}, channels, autocast, device)
    x = randn((len(seeds), 1, *config.grid), generators, device=device, dtype=torch.float32)
    chain = _Chain(solver, output, expected_signal, lambda x: x, cuda_graph, lambda fraction, guided: Kind(guided))
    return chain(x, generators, guidance, None)[1].argmax(dim=1)


class _Output:
    """The model's output in float32 during one sampling: maps, plan and labels stay, state and timestep change.

    Args:
        labels: (B,) or None.
        arguments: of the model for every kind of pass.
        channels: how many of the first are guided.
        autocast: of the model, or None.
        device: where the model is.
        guide: the output of a weaker model that guides; None: this model without its label does.
    """

    def __init__(
        self,
        model: Any,
        labels: Tensor | None,
        arguments: Mapping[Kind, dict[str, Any]],
        channels: int,
        autocast: torch.dtype | None,
        device: torch.device,
        guide: _Output | None = None,
    ) -> None:
        self.model, self.arguments, self.channels, self.autocast = model, arguments, channels, autocast
        self.guide = guide
        labels = None if labels is None else labels.to(device)
        both = None if labels is None else torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
        self.labels = {False: labels, True: both}

    def __call__(self, kind: Kind, x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """`t` and `weight` are (); the weight counts in a guided pass."""
        twice = kind.guided and self.guide is None
        both = torch.cat([x, x]) if twice else x
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            both = both.to(next(self.model.parameters()).dtype)
            arguments = self.arguments[Kind(twice, kind.refined)]
            out = self.model(both, t.expand(both.shape[0]), self.labels[twice], **arguments).float()
        if not kind.guided:
            return out
        if self.guide is None:
            out, reference = out.chunk(2)
        else:
            reference = self.guide(Kind(False, kind.guide_refined), x, t, weight)
        return guide_output(out, reference, weight, self.channels)


class _Chain:
    """From noise to data: (state, the model's last output).

    Args:
        solver: of the steps.
        output: the model's output.
        predicted: the solver's input, from the model's output.
        grained: makes a state one value a code.
        cuda_graph: replay a captured step.
        kind_of: the kind of pass, from the share of T and whether the step is guided.
    """

    def __init__(
        self,
        solver: Solver,
        output: _Output,
        predicted: Callable[[Tensor], Tensor],
        grained: Callable[[Tensor], Tensor],
        cuda_graph: bool,
        kind_of: Callable[[float, bool], Kind],
    ) -> None:
        self.solver, self.output, self.predicted, self.grained = solver.fresh(), output, predicted, grained
        self.cuda_graph, self.kind_of = cuda_graph, kind_of
        self.captured: dict[Kind, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(
        self, x: Tensor, generators: list[torch.Generator], guidance: Guidance, callback: Callback | None
    ) -> tuple[Tensor, Tensor]:
        solver = self.solver
        weights = [guidance.at(t / solver.num_timesteps) for t in solver.timesteps]
        # All that changes from step to step lies on the device before the first one: the host never waits.
        on_device = torch.tensor([solver.timesteps, weights], device=x.device)
        numbers = torch.arange(len(weights), device=x.device)
        if not isinstance(solver, Diffusers):
            solver.to(x.device)
        x = x * solver.init_noise_sigma
        out = x
        memory = () if isinstance(solver, Diffusers) else (x,) * solver.memory
        for i, (t, weight) in enumerate(zip(solver.timesteps, weights)):
            kind = self.kind_of(t / solver.num_timesteps, weight != 1.0)
            if isinstance(solver, Diffusers):
                scaled = solver.scale_model_input(x, i)
                prediction, out = self._run(self._predict, kind, scaled, *on_device[:, i])
                x = self.grained(solver.step(prediction, i, x, generators))
            else:
                noise = draw_noise(solver, i, x, generators)
                out, x, *memory = self._run(self._step, kind, x, *on_device[:, i], numbers[i], noise, *memory)
            if callback is not None:
                callback(i, t, x)
        return x, out

    def _predict(self, kind: Kind, x: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = self.output(kind, x, t, weight)
        return self.predicted(out), out

    def _step(
        self, kind: Kind, x: Tensor, t: Tensor, weight: Tensor, number: Tensor, noise: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        assert not isinstance(self.solver, Diffusers)
        prediction, out = self._predict(kind, x, t, weight)
        x, *memory_after = self.solver.step(prediction, number, x, noise, *memory)
        return (out, self.grained(x), *memory_after)

    def _run(self, part: Callable[..., Any], kind: Kind, *inputs: Tensor) -> Any:
        if not self.cuda_graph or not inputs[0].shape[0]:
            return part(kind, *inputs)
        if kind not in self.captured:
            self.captured[kind] = capture(functools.partial(part, kind), *inputs)
        return self.captured[kind](*inputs)


def capture(run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """`run` as one CUDA graph: a function of inputs of the same shapes, whose results are the caller's own.

    Raises:
        ValueError: inputs that are not on a GPU.
    """
    device = inputs[0].device
    check_cuda_graph(device)
    held = [x.clone() for x in inputs]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is compiled, tuned or allocated for good happens here
        for _ in range(3):
            run(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        for place, x in zip(held, inputs):
            place.copy_(x)
        graph.replay()
        return tuple(x.clone() for x in out)  # the next replay writes there

    return replay


def _model_plans(model: Any, grain_map: Tensor, *, guided: bool) -> dict[Kind, dict[str, Any]]:
    """Arguments of the model for every kind of pass over the maps: maps and their plan, made once."""
    config = model.config
    # The maps stay for the whole sampling: one look at them, and no row is computed in vain.
    capacity = int(config.region_tokens(grain_map).sum())
    arguments = {}
    for twice in (False, True) if guided else (False,):
        maps = torch.cat([grain_map, grain_map]) if twice else grain_map
        plan = None if config.masked else model.make_plan(maps, capacity * (1 + twice))
        arguments[Kind(twice, True)] = {"grain_map": maps, "plan": plan}
        arguments[Kind(twice, False)] = {"grain_map": maps, "refine": False}
    return arguments


#: Settings that a model and its guide must share.
_GUIDING = ("num_classes", "image_size", "downsampling", "in_channels")

# ---- what does not fit, found before anything is computed -----------------------------------------------------------


def check_cuda_graph(device: torch.device) -> None:
    """Raises ValueError unless the device has CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a model on a GPU, got one on {device}")


def check_guidance(name: str, guidance: Guidance, channels: int, config: Any, by_model: bool = False) -> None:
    """Raises ValueError where the model has fewer channels than are guided, no classes, or no null label.

    A weaker model guides (`by_model`) without classes and null labels too.
    """
    if guidance.channels is not None and guidance.channels > channels:
        raise ValueError(f"{name} channels must be at most {channels}, got {guidance.channels}")
    if guidance.scale == 1.0 or by_model:
        return
    if not config.num_classes:
        raise ValueError(f"{name} needs a model with classes; scale must be 1, got {guidance.scale}")
    if not config.class_dropout_prob:
        raise ValueError(
            f"{name} needs a model that was trained with the null label (class_dropout_prob is 0); scale must be 1, "
            f"got {guidance.scale}"
        )


def check_guide(guide: nn.Module, model: nn.Module) -> None:
    """Raises ValueError, naming what differs, unless one model can guide the other."""
    if type(guide) is not type(model):
        raise ValueError(f"guide must be a {type(model).__name__} as the model is, got {type(guide).__name__}")
    ours: Any = model.config
    theirs: Any = guide.config
    pairs = {key: (getattr(theirs, key), getattr(ours, key)) for key in _GUIDING if hasattr(ours, key)}
    for key in ("path", "prediction", *(["shift"] if ours.diffusion.path == "ddpm" else [])):
        pairs[f"diffusion.{key}"] = getattr(theirs.diffusion, key), getattr(ours.diffusion, key)
    for key, (other, own) in pairs.items():
        if other != own:
            raise ValueError(f"guide must have the {key} of the model, {own!r}, got {other!r}")
    devices = [next(network.parameters()).device for network in (guide, model)]
    if devices[0] != devices[1]:
        raise ValueError(f"guide must be on {devices[1]} as the model is, got {devices[0]}")


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as whole numbers in 0 ... 2^64 - 1; ValueError otherwise, TypeError where they are no sequence."""
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be a sequence of whole numbers, got {seeds!r}")
    return [whole_number("seeds", seed, 0, 2**64 - 1) for seed in seeds]


def check_labels(labels: Tensor | None, batch: int, num_classes: int) -> Tensor | None:
    """The labels, None without classes; ValueError where they do not fit."""
    if not num_classes:
        return None
    if labels is None or labels.shape != (batch,):
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must be one for each of the {batch} seeds, got {got}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    if batch and not (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        raise ValueError(
            f"labels must be in 0 ... {num_classes - 1} ({num_classes} for none), "
            f"got {int(labels.min())} ... {int(labels.max())}"
        )
    return labels.long()


def as_map(grain_map: Any) -> Tensor:
    """A grain map, or a drawing of one, as a tensor (N, h, w) or (h, w).

    Raises:
        TypeError: nothing that torch reads as numbers.
        ValueError: of another rank.
    """
    try:
        given = torch.as_tensor(grain_map)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"grain_map must be a tensor, got {type(grain_map).__name__}") from None
    if given.ndim not in (2, 3):
        raise ValueError(f"grain_map must be (N, H/S, W/S) or (H/S, W/S), got {tuple(given.shape)}")
    return given


def check_grain_map(grain_map: Tensor, batch: int, config: Any) -> None:
    """Raises ValueError unless the maps are one an image, of the model's size and with its grains."""
    expected = (batch, *config.region_grid)
    if tuple(grain_map.shape) != expected or grain_map.dtype != torch.int64:
        raise ValueError(f"grain_map must be int64 {expected}, got {grain_map.dtype} {tuple(grain_map.shape)}")
    if batch and not (int(grain_map.min()) >= 0 and int(grain_map.max()) < config.num_grains):
        raise ValueError(
            f"grain_map must hold grains 0 ... {config.num_grains - 1}, "
            f"got {int(grain_map.min())} ... {int(grain_map.max())}"
        )
