"""Sampling grain maps, and latents under a grain map, with the schedulers of diffusers.

The state of a grained sampling stays one value a latent code at every step. The model's answer is averaged over each
code (`project_to_grains`); a scheduler works element by element, so its step keeps equal cells equal but for the noise
it draws for each cell; afterwards every code takes the value of its first cell, whose noise is one normal draw.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2it.diffusion.gaussian import GaussianDiffusion
from d2it.diffusion.grains import copy_codes, expected_signal, project_to_grains, randn
from d2it.diffusion.guidance import Guidance, guide

#: name -> (class in diffusers, settings). "linspace" is ADM's respacing: from T - 1 to 0. The others step by a
#: stride of their own or cannot stand two equal timesteps; their spacing from T - 1 is "trailing".
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}),
    "unipc": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "deis": ("DEISMultistepScheduler", {"timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
}
#: Those that also take a prediction of x_0, which is what the grain transformer gives.
GRAIN_SCHEDULERS = ("ddpm", "ddim", "dpm++", "sde-dpm++", "unipc", "deis", "euler")

Callback = Callable[[int, float, Tensor], None]


def make_scheduler(
    name: str,
    diffusion: GaussianDiffusion,
    steps: int,
    *,
    prediction: str = "epsilon",
    learned_range: bool = False,
) -> Any:
    """A diffusers scheduler for `diffusion`'s schedule with its timesteps set.

    Args:
        name: a key of `SCHEDULERS`.
        prediction: "epsilon" or "sample" (x_0).
        learned_range: the model predicts the variance; only "ddpm" uses it.

    Raises:
        ValueError: an unknown name, or a number of steps outside 1 ... T.
    """
    choices = GRAIN_SCHEDULERS if prediction == "sample" else tuple(SCHEDULERS)
    if name not in choices:
        raise ValueError(f"scheduler must be one of {', '.join(choices)}, got {name!r}")
    if not 1 <= steps <= diffusion.num_timesteps:
        raise ValueError(f"steps must be in 1 ... {diffusion.num_timesteps}, got {steps}")
    import diffusers

    kind, settings = SCHEDULERS[name]
    settings = {**diffusion.scheduler_arguments(), **settings, "prediction_type": prediction}
    if name == "ddpm":
        settings["variance_type"] = "learned_range" if learned_range else "fixed_small"
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def make_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator for each sample: its noise is the same in every batch and on every rank."""
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


@torch.no_grad()
def sample_content(
    model: nn.Module,
    grain_map: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int],
    diffusion: GaussianDiffusion | None = None,
    scheduler: str = "ddpm",
    steps: int = 250,
    guidance: Guidance | None = None,
    capacity: int | None = None,
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
        diffusion: None is the paper's schedule with the model's `learn_sigma`.
        scheduler, steps: see `SCHEDULERS`. With a learned variance "ddpm" uses it, the others leave it out.
        guidance: None is none. A guided step runs the model on both halves as one batch.
        capacity: packed rows for one pass over the maps; None counts them. A fixed one keeps shapes equal from call to
            call, for compiled models.
        autocast: torch.bfloat16 or torch.float16 for the model; the state stays float32. A model that was itself
            cast (`model.bfloat16()`) needs none.
        cuda_graph: capture the model's pass once and replay it at every step: nothing is launched kernel by kernel.
        callback: called with (step, timestep, state) after every step.

    Raises:
        ValueError: arguments that do not fit the model, an unknown scheduler, labels out of range, a CUDA graph on a
            CPU.
    """
    config: Any = model.config
    guidance = guidance or Guidance()
    channels = config.in_channels
    cfg_channels = channels if guidance.channels is None else guidance.channels
    if cfg_channels > channels:
        raise ValueError(f"guidance channels must be at most {channels}, got {cfg_channels}")
    device = next(model.parameters()).device
    batch = len(seeds)
    labels = check_labels(labels, batch, config.num_classes, guidance, device)
    diffusion = diffusion or GaussianDiffusion(learn_sigma=config.learn_sigma)
    solver = make_scheduler(scheduler, diffusion, steps, learned_range=config.learn_sigma)
    keep = 2 * channels if scheduler == "ddpm" and config.learn_sigma else channels
    generators = make_generators(seeds, device)

    if grain_map is None:
        arguments: dict[bool, dict[str, Any]] = {False: {}, True: {}}

        def grained(x: Tensor) -> Tensor:
            return x

        project = grained
    else:
        grain_map = grain_map.to(device)
        check_grain_map(grain_map, batch, config)
        arguments = _model_plans(model, grain_map, capacity, guided=guidance.scale != 1.0)
        sizes = config.code_sizes

        def grained(x: Tensor) -> Tensor:
            return copy_codes(x, grain_map, sizes)

        def project(x: Tensor) -> Tensor:
            return project_to_grains(x, grain_map, code_sizes=sizes)

    answer = _Answers(model, labels, arguments, cfg_channels, autocast, cuda_graph, device)
    x = grained(randn((batch, channels, *config.grid), generators, device=device, dtype=torch.float32))
    x = x * solver.init_noise_sigma
    for i, t in enumerate(solver.timesteps):
        weight = guidance.at(float(t) / diffusion.num_timesteps)
        out = answer(solver.scale_model_input(x, t), float(t), weight)
        x = grained(_step(solver, project(out[:, :keep]), t, x, generators))
        if callback is not None:
            callback(i, float(t), x)
    return x


@torch.no_grad()
def sample_grain_maps(
    model: nn.Module,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int],
    diffusion: GaussianDiffusion | None = None,
    scheduler: str = "ddpm",
    steps: int = 250,
    guidance: Guidance | None = None,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Grain maps (B, h, w) int64 of a `DynamicGrainTransformer`: the most likely grain at the end of the chain.

    Args: as for `sample_content`; guidance acts on the logits; schedulers are `GRAIN_SCHEDULERS`.

    Raises:
        ValueError: as for `sample_content`.
    """
    config: Any = model.config
    guidance = guidance or Guidance()
    device = next(model.parameters()).device
    batch = len(seeds)
    labels = check_labels(labels, batch, config.num_classes, guidance, device)
    diffusion = diffusion or GaussianDiffusion(learn_sigma=False)
    solver = make_scheduler(scheduler, diffusion, steps, prediction="sample")
    generators = make_generators(seeds, device)
    answer = _Answers(model, labels, {False: {}, True: {}}, config.num_grains, autocast, cuda_graph, device)
    x = randn((batch, 1, *config.grid), generators, device=device, dtype=torch.float32) * solver.init_noise_sigma
    logits = x.new_zeros(batch, config.num_grains, *config.grid)
    for i, t in enumerate(solver.timesteps):
        weight = guidance.at(float(t) / diffusion.num_timesteps)
        logits = answer(solver.scale_model_input(x, t), float(t), weight)
        x = _step(solver, expected_signal(logits), t, x, generators)
        if callback is not None:
            callback(i, float(t), x)
    return logits.argmax(dim=1)


class _Answers:
    """The model's answers in float32 during one sampling: maps, plan and labels stay, state and timestep change.

    Args:
        labels: (B,) or None. arguments: of the model for one pass over the batch (False) and for two (True).
        channels: how many of the first are guided.
    """

    def __init__(
        self,
        model: Any,
        labels: Tensor | None,
        arguments: Mapping[bool, dict[str, Any]],
        channels: int,
        autocast: torch.dtype | None,
        cuda_graph: bool,
        device: torch.device,
    ) -> None:
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a model on a GPU, got one on {device}")
        self.model, self.arguments, self.channels = model, arguments, channels
        self.autocast, self.cuda_graph = autocast, cuda_graph
        both = None if labels is None else torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
        self.labels = {False: labels, True: both}
        self.captured: dict[bool, Callable[..., Tensor]] = {}

    def __call__(self, x: Tensor, t: float, weight: float) -> Tensor:
        if weight == 1.0:
            return self._pass(False, x, t)
        conditional, unconditional = self._pass(True, torch.cat([x, x]), t).chunk(2)
        return guide(conditional, unconditional, weight, self.channels)

    def _pass(self, guided: bool, x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device)
        run = functools.partial(self._run, guided)
        if not self.cuda_graph or not x.shape[0]:
            return run(x, times)
        if guided not in self.captured:
            self.captured[guided] = capture(run, x, times)
        return self.captured[guided](x, times)

    def _run(self, guided: bool, x: Tensor, times: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            x = x.to(next(self.model.parameters()).dtype)
            return self.model(x, times, self.labels[guided], **self.arguments[guided]).float()


def capture(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """`run` as one CUDA graph: a function of inputs of the same shapes, whose result is the caller's own."""
    held = [x.clone() for x in inputs]
    stream = torch.cuda.Stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is compiled, tuned or allocated for good happens here
        for _ in range(3):
            run(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*held)

    def replay(*inputs: Tensor) -> Tensor:
        for place, x in zip(held, inputs):
            place.copy_(x)
        graph.replay()
        return out.clone()  # the next replay writes there

    return replay


def _model_plans(model: Any, grain_map: Tensor, capacity: int | None, *, guided: bool) -> dict[bool, dict[str, Any]]:
    """Arguments of the model for one pass over the maps, and for two (guidance): maps and their plan, made once."""
    if capacity is None:  # the maps stay for the whole sampling: one look at them, and no row is computed in vain
        config = model.config
        capacity = int((grain_map >= config.min_grain).sum()) * config.cells_per_region**2
    arguments = {}
    for twice in (False, True) if guided else (False,):
        maps = torch.cat([grain_map, grain_map]) if twice else grain_map
        plan = None if model.config.masked else model.make_plan(maps, capacity * (1 + twice))
        arguments[twice] = {"grain_map": maps, "plan": plan}
    return arguments


def _step(solver: Any, out: Tensor, t: Tensor, x: Tensor, generators: list[torch.Generator]) -> Tensor:
    options = {"generator": generators} if x.shape[0] and _takes_generator(type(solver)) else {}  # type: ignore[arg-type]
    return solver.step(out, t, x, **options).prev_sample


@functools.cache
def _takes_generator(kind: Any) -> bool:
    return "generator" in inspect.signature(kind.step).parameters


def check_labels(
    labels: Tensor | None, batch: int, num_classes: int, guidance: Guidance, device: torch.device
) -> Tensor | None:
    if not num_classes:
        if guidance.scale != 1.0:
            raise ValueError(f"guidance needs a model with classes; scale must be 1, got {guidance.scale}")
        return None
    if labels is None or labels.shape != (batch,):
        got = None if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must be one for each of the {batch} seeds, got {got}")
    if batch and not (int(labels.min()) >= 0 and int(labels.max()) <= num_classes):
        raise ValueError(
            f"labels must be in 0 ... {num_classes - 1} ({num_classes} for none), "
            f"got {int(labels.min())} ... {int(labels.max())}"
        )
    return labels.to(device)


def check_grain_map(grain_map: Tensor, batch: int, config: Any) -> None:
    expected = (batch, *config.region_grid)
    if tuple(grain_map.shape) != expected or grain_map.dtype != torch.int64:
        raise ValueError(f"grain_map must be int64 {expected}, got {grain_map.dtype} {tuple(grain_map.shape)}")
    if batch and not (int(grain_map.min()) >= 0 and int(grain_map.max()) < config.num_grains):
        raise ValueError(
            f"grain_map must hold grains 0 ... {config.num_grains - 1}, "
            f"got {int(grain_map.min())} ... {int(grain_map.max())}"
        )
