"""The steps of sampling, by name: our own as tensors of coefficients, and the schedulers of diffusers.

DDPM and DDIM on the ddpm path, Euler and Heun on the linear one, take the step's number as a tensor and read their
coefficients from tables on the device, so a whole step (model, guidance, update) can be captured in a CUDA graph and
replayed. The schedulers of diffusers keep their coefficients on the host and change them from step to step: there the
graph ends with the model's output.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2it.diffusion.gaussian import GaussianDiffusion
from d2it.diffusion.grains import randn
from d2it.diffusion.linear import EDGE, LinearDiffusion
from d2it.diffusion.process import Diffusion, DiffusionConfig, shifted

#: name -> (class in diffusers, settings).
_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}
#: On the linear path, which these integrate as a flow.
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    **{name: _DIFFUSERS[name] for name in ("dpm++", "sde-dpm++", "unipc", "deis")},
}

SCHEDULERS = ("ddpm", "ddim", *_DIFFUSERS)
#: Of the linear path; the first two are our own.
FLOW_SCHEDULERS = ("euler", "heun", *_FLOW)
#: Those that also take a prediction of x_0, which is what the grain transformer gives.
GRAIN_SCHEDULERS = ("ddpm", "ddim", "dpm++", "sde-dpm++", "dpm++s", "unipc", "deis", "sa", "euler", "lms")


def make_diffusion(config: DiffusionConfig, *, learn_sigma: bool, device: torch.device | str = "cpu") -> Diffusion:
    """The process that a model's settings describe, with its tables on `device`.

    Raises:
        ValueError: a learned variance on the linear path, whose samplers have none.
    """
    if config.path == "ddpm":
        return GaussianDiffusion(config=config, learn_sigma=learn_sigma, device=device)
    if learn_sigma:
        raise ValueError("learn_sigma must be False with diffusion.path=linear, which has no variance to learn")
    return LinearDiffusion(config)


def default_scheduler(config: DiffusionConfig) -> str:
    """The scheduler where none is named: "ddpm", and "euler" on the linear path."""
    return "ddpm" if config.path == "ddpm" else "euler"


def grain_scheduler_for(scheduler: str, config: DiffusionConfig | None = None) -> str:
    """The scheduler of the grain maps where only the content's is named: the same if it can, else the path's default.

    Args:
        config: of the Grain Transformer; None is the paper's.
    """
    config = config or DiffusionConfig()
    known = GRAIN_SCHEDULERS if config.path == "ddpm" else FLOW_SCHEDULERS
    return scheduler if scheduler in known else default_scheduler(config)


class Stepper:
    """What the solvers share; our own keep nothing from step to step.

    Attributes:
        timesteps: at which the model runs, in order; schedulers of diffusers in sigmas run it between whole ones.
        num_timesteps: T of the diffusion that the timesteps count.
        init_noise_sigma: the standard deviation of the first state.
        noise_steps: how many of the first steps take a normal draw as `noise`.
        memory: how many more tensors of the state's shape a step hands to the next one.
    """

    timesteps: list[float]
    num_timesteps: int
    init_noise_sigma = 1.0
    noise_steps = 0
    memory = 0

    def fresh(self) -> Any:
        """A solver for another chain: itself."""
        return self


class Spaced(Stepper):
    """What DDPM and DDIM share: the diffusion over the chosen timesteps alone, its tables read at the step's place.

    Args:
        diffusion: the schedule.
        timesteps: ascending.
        prediction: "epsilon", "v" or "sample" (x_0).
    """

    def __init__(self, diffusion: GaussianDiffusion, timesteps: Sequence[int], prediction: str) -> None:
        self.timesteps = [float(t) for t in reversed(timesteps)]
        self.num_timesteps = diffusion.num_timesteps
        self.spaced = diffusion.respaced(timesteps)
        self.prediction = prediction

    def to(self, device: torch.device | str) -> Spaced:
        """Moves the tables to `device`, in place."""
        self.spaced.to(device)
        return self

    def _place(self, i: Tensor, x: Tensor) -> Tensor:
        """(B,): the place among the ascending timesteps, from the number () of the step."""
        return (len(self.timesteps) - 1 - i).expand(x.shape[0])


class Ddpm(Spaced):
    """Ancestral sampling (Ho et al. 2020) over ADM's spacing: evenly from T - 1 to 0.

    The variance is the posterior's, or with `learned_range` that of the model's second half.
    """

    def __init__(self, diffusion: GaussianDiffusion, steps: int, prediction: str, learned_range: bool) -> None:
        last = diffusion.num_timesteps - 1
        timesteps = [round(i * last / (steps - 1)) for i in range(steps)] if steps > 1 else [last]
        super().__init__(diffusion, timesteps, prediction)
        self.learned_range = learned_range
        self.noise_steps = steps - 1  # the last step gives its mean

    def step(self, out: Tensor, i: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """The next state; `out` (B, C or 2C, ...), `i` () int64, `noise` zeros at the last step."""
        place = self._place(i, x)
        prediction, v = (out.chunk(2, dim=1)) if self.learned_range else (out, None)
        x0, _ = self.spaced.predict(prediction, x, place, self.prediction)
        mean, log_variance = self.spaced.posterior(x0, x, place)
        if v is not None:
            log_variance = self.spaced.model_log_variance(v, place)
        return (mean + (0.5 * log_variance).exp() * noise,)


class Ddim(Spaced):
    """The deterministic chain of Song et al. (2021), Eq. 12 with eta 0; every T/steps-th timestep from T - 1."""

    def __init__(self, diffusion: GaussianDiffusion, steps: int, prediction: str) -> None:
        total = diffusion.num_timesteps
        super().__init__(diffusion, [round((i + 1) * total / steps) - 1 for i in range(steps)], prediction)

    def step(self, out: Tensor, i: Tensor, x: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """As `Ddpm.step`; `noise` is not used."""
        place = self._place(i, x)
        return (self.spaced.q_sample_before(*self.spaced.predict(out, x, place, self.prediction), place),)


class Flow(Stepper):
    """Euler's and Heun's method on the linear path, from noise at t = T to data at t = 0.

    Times are evenly spaced, then shifted as training's are. Heun's method runs the model twice a step, at its start
    and at the end that Euler's step reaches, and goes on with the mean of the two velocities; its last step is
    Euler's. So the model runs 2 * steps - 1 times (Karras et al. 2022, Alg. 1). Heun's memory is the state and the
    velocity at the start of its step.
    """

    def __init__(self, diffusion: LinearDiffusion, steps: int, prediction: str, heun: bool) -> None:
        # The network's noise gives no velocity where nothing but noise is left.
        start = 1 - EDGE if prediction == "epsilon" else 1.0
        ends = shifted(torch.linspace(start, 0, steps + 1, dtype=torch.float64), diffusion.config.shift)
        asked = [(i, corrects) for i in range(steps) for corrects in ((False, True) if heun else (False,))]
        asked = asked[: 2 * steps - 1] if heun else asked
        self.diffusion, self.prediction, self.memory = diffusion, prediction, 2 if heun else 0
        self.num_timesteps = diffusion.num_timesteps
        self.timesteps = [float(ends[i + corrects]) * diffusion.num_timesteps for i, corrects in asked]
        self.tables = torch.tensor(
            [[t, float(ends[i + 1] - ends[i]), corrects] for t, (i, corrects) in zip(self.timesteps, asked)]
        )

    def to(self, device: torch.device | str) -> Flow:
        """Moves the tables to `device`, in place."""
        self.tables = self.tables.to(device)
        return self

    def step(self, out: Tensor, i: Tensor, x: Tensor, noise: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        """As `Ddpm.step`; `noise` is not used."""
        t, delta, corrects = self.tables[i]
        x0, eps = self.diffusion.predict(out, x, t.expand(x.shape[0]), self.prediction)
        velocity = eps - x0
        if not memory:
            return (x + delta * velocity,)
        start, first = memory
        second = start + 0.5 * delta * (first + velocity)
        return torch.where(corrects > 0, second, x + delta * velocity), x, velocity


class Diffusers(Stepper):
    """A scheduler of diffusers.

    Args:
        kind, settings: its class and arguments.
        steps: of the chain.
        flow: the process and the kind of prediction, where the scheduler takes the velocity of the linear path.
    """

    def __init__(
        self, kind: str, settings: dict[str, Any], steps: int, flow: tuple[LinearDiffusion, str] | None = None
    ) -> None:
        import diffusers

        self.scheduler, self.flow = getattr(diffusers, kind)(**settings), flow
        self.num_timesteps = settings["num_train_timesteps"]
        self.scheduler.set_timesteps(steps)
        self.timesteps = [float(t) for t in self.scheduler.timesteps]
        if flow is not None:  # some round their timesteps, but step by their sigmas
            self.timesteps = [float(s) * flow[0].num_timesteps for s in self.scheduler.sigmas[: len(self.timesteps)]]
        self.init_noise_sigma = 1.0 if flow is not None else float(self.scheduler.init_noise_sigma)

    def fresh(self) -> Diffusers:
        """A solver for another chain: a copy, as a scheduler keeps earlier outputs; this one must not have stepped."""
        return copy.deepcopy(self)

    def scale_model_input(self, x: Tensor, i: int) -> Tensor:
        """The state as the model takes it."""
        return x if self.flow is not None else self.scheduler.scale_model_input(x, self.scheduler.timesteps[i])

    def step(self, out: Tensor, i: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next state; noise is drawn from each sample's generator."""
        if self.flow is not None:
            diffusion, prediction = self.flow
            x0, eps = diffusion.predict(
                out, x, torch.full((x.shape[0],), self.timesteps[i], device=x.device), prediction
            )
            out = eps - x0
        draws = x.shape[0] and _takes_generator(type(self.scheduler))  # type: ignore[arg-type]
        options = {"generator": generators} if draws else {}
        return self.scheduler.step(out, self.scheduler.timesteps[i], x, **options).prev_sample


@functools.cache
def _takes_generator(kind: Any) -> bool:
    return "generator" in inspect.signature(kind.step).parameters


Solver = Ddpm | Ddim | Flow | Diffusers


def make_scheduler(
    name: str,
    diffusion: Diffusion,
    steps: int,
    *,
    prediction: str | None = None,
    learned_range: bool = False,
    of: str = "",
) -> Solver:
    """The steps of a sampling of `diffusion`, by name.

    Args:
        name: one of `SCHEDULERS`, or on the linear path one of `FLOW_SCHEDULERS`.
        diffusion: the schedule.
        steps: of the chain; "heun", "flow-heun", "dpm2", "dpm2-a" and "pndm" run the model more often than that.
        prediction: what the model predicts, a name as in `DiffusionConfig`; None is what the diffusion's settings
            name.
        learned_range: the model predicts the variance; only "ddpm" uses it.
        of: prefix of the arguments' names in messages, such as "grain_".

    Raises:
        ValueError: a name that is unknown or of another path, or a number of steps outside 1 ... T.
    """
    prediction = prediction or diffusion.config.prediction
    linear = isinstance(diffusion, LinearDiffusion)
    choices = FLOW_SCHEDULERS if linear else GRAIN_SCHEDULERS if prediction == "sample" else SCHEDULERS
    if name not in choices:
        raise ValueError(f"{of}scheduler must be one of {', '.join(choices)}, got {name!r}")
    steps = whole_number(f"{of}steps", steps, 1, diffusion.num_timesteps)
    if isinstance(diffusion, LinearDiffusion):
        if name in ("euler", "heun"):
            return Flow(diffusion, steps, prediction, heun=name == "heun")
        kind, settings = _FLOW[name]
        flow: dict[str, Any] = {"shift": diffusion.config.shift}
        if not name.startswith("flow-"):
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": diffusion.config.shift}
        settings = {"num_train_timesteps": diffusion.num_timesteps, **settings, **flow}
        return Diffusers(kind, settings, steps, (diffusion, prediction))
    assert isinstance(diffusion, GaussianDiffusion)
    if name == "ddpm":
        return Ddpm(diffusion, steps, prediction, learned_range)
    if name == "ddim":
        return Ddim(diffusion, steps, prediction)
    if name == "lms" and importlib.util.find_spec("scipy") is None:
        raise ValueError("scheduler 'lms' needs the package scipy, which is not installed")
    kind, settings = _DIFFUSERS[name]
    shared = {**diffusion.scheduler_arguments(), "prediction_type": "v_prediction" if prediction == "v" else prediction}
    if name != "dpm++s":  # the singlestep solver has no other spacing than from T - 1
        shared["timestep_spacing"] = "trailing"
    return Diffusers(kind, {**shared, **settings}, steps)


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int; ValueError, naming the argument, unless it is a whole number in least ... most."""
    bounds = f"at least {least}" if most is None else f"in {least} ... {most}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}") from None
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        raise ValueError(f"{name} must be {bounds}, got {value!r}")
    return number


def make_generators(seeds: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator for each sample: its noise is the same in every batch and on every rank."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def draw_noise(solver: Ddpm | Ddim | Flow, i: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
    """What step `i` adds: a normal draw, or zeros where it adds nothing."""
    if i < solver.noise_steps:
        return randn(x.shape, generators, device=x.device, dtype=x.dtype)
    return torch.zeros_like(x)
