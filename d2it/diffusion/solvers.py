"""The steps of sampling, by name: DDPM and DDIM as tensors of coefficients, and the schedulers of diffusers.

DDPM and DDIM take the step's number as a tensor and read their coefficients from tables on the device, so a whole step
(model, guidance, update) can be captured in a CUDA graph and replayed. The schedulers of diffusers keep their
coefficients on the host and change them from step to step: there the graph ends with the model's output.
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

_FROM_THE_END = {"timestep_spacing": "trailing"}  # from T - 1; the singlestep solver has no other
#: name -> (class in diffusers, settings).
_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_FROM_THE_END}),
    "sde-dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **_FROM_THE_END}),
    "dpm++s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", _FROM_THE_END),
    "deis": ("DEISMultistepScheduler", _FROM_THE_END),
    "sa": ("SASolverScheduler", _FROM_THE_END),
    "euler": ("EulerDiscreteScheduler", _FROM_THE_END),
    "euler-a": ("EulerAncestralDiscreteScheduler", _FROM_THE_END),
    "heun": ("HeunDiscreteScheduler", _FROM_THE_END),
    "dpm2": ("KDPM2DiscreteScheduler", _FROM_THE_END),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", _FROM_THE_END),
    "lms": ("LMSDiscreteScheduler", _FROM_THE_END),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, **_FROM_THE_END}),
}

SCHEDULERS = ("ddpm", "ddim", *_DIFFUSERS)
#: Those that also take a prediction of x_0, which is what the grain transformer gives.
GRAIN_SCHEDULERS = ("ddpm", "ddim", "dpm++", "sde-dpm++", "dpm++s", "unipc", "deis", "sa", "euler", "lms")


def grain_scheduler_for(scheduler: str) -> str:
    """The scheduler of the grain maps where only the content's is named: the same one if it can, else "ddpm"."""
    return scheduler if scheduler in GRAIN_SCHEDULERS else "ddpm"


class Spaced:
    """What DDPM and DDIM share: the diffusion over the chosen timesteps alone, its tables read at the step's place.

    Args:
        timesteps: ascending.
        prediction: "epsilon" or "sample" (x_0).

    Attributes:
        timesteps: at which the model runs, in order.
        num_timesteps: T of the diffusion that the timesteps count.
        init_noise_sigma: the standard deviation of the first state.
        noise_steps: how many of the first steps take a normal draw as `noise`.
    """

    init_noise_sigma = 1.0
    noise_steps = 0

    def __init__(self, diffusion: GaussianDiffusion, timesteps: Sequence[int], prediction: str) -> None:
        self.timesteps = [float(t) for t in reversed(timesteps)]
        self.num_timesteps = diffusion.num_timesteps
        self.spaced = diffusion.respaced(timesteps)
        self.prediction = prediction

    def to(self, device: torch.device | str) -> Spaced:
        """Move the tables to `device`, in place."""
        self.spaced.to(device)
        return self

    def fresh(self) -> Any:
        """A solver for another chain: itself, as it keeps nothing from step to step."""
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

    def step(self, out: Tensor, i: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """The next state; `out` (B, C or 2C, ...), `i` () int64, `noise` zeros at the last step."""
        place = self._place(i, x)
        prediction, v = (out.chunk(2, dim=1)) if self.learned_range else (out, None)
        x0 = prediction if self.prediction == "sample" else self.spaced.predict_x0(x, prediction, place)
        mean, log_variance = self.spaced.posterior(x0, x, place)
        if v is not None:
            log_variance = self.spaced.model_log_variance(v, place)
        return mean + (0.5 * log_variance).exp() * noise


class Ddim(Spaced):
    """The deterministic chain of Song et al. (2021), Eq. 12 with eta 0; every T/steps-th timestep from T - 1."""

    def __init__(self, diffusion: GaussianDiffusion, steps: int, prediction: str) -> None:
        total = diffusion.num_timesteps
        super().__init__(diffusion, [round((i + 1) * total / steps) - 1 for i in range(steps)], prediction)

    def step(self, out: Tensor, i: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """As `Ddpm.step`; `noise` is not used."""
        place = self._place(i, x)
        if self.prediction == "sample":
            return self.spaced.q_sample_before(out, self.spaced.predict_noise(out, x, place), place)
        return self.spaced.q_sample_before(self.spaced.predict_x0(x, out, place), out, place)


class Diffusers:
    """A scheduler of diffusers.

    Attributes:
        timesteps: at which the model runs, in order; schedulers in sigmas run it between whole ones.
        num_timesteps: T of the diffusion that the timesteps count.
        init_noise_sigma: the standard deviation of the first state.
    """

    def __init__(self, kind: str, settings: dict[str, Any], steps: int) -> None:
        import diffusers

        self.scheduler = getattr(diffusers, kind)(**settings)
        self.num_timesteps: int = settings["num_train_timesteps"]
        self.scheduler.set_timesteps(steps)
        self.timesteps = [float(t) for t in self.scheduler.timesteps]
        self.init_noise_sigma = float(self.scheduler.init_noise_sigma)

    def fresh(self) -> Diffusers:
        """A solver for another chain: a copy, as a scheduler keeps earlier outputs; this one must not have stepped."""
        return copy.deepcopy(self)

    def scale_model_input(self, x: Tensor, i: int) -> Tensor:
        """The state as the model takes it."""
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[i])

    def step(self, out: Tensor, i: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next state; noise is drawn from each sample's generator."""
        draws = x.shape[0] and _takes_generator(type(self.scheduler))  # type: ignore[arg-type]
        options = {"generator": generators} if draws else {}
        return self.scheduler.step(out, self.scheduler.timesteps[i], x, **options).prev_sample


Solver = Ddpm | Ddim | Diffusers


@functools.cache
def _takes_generator(kind: Any) -> bool:
    return "generator" in inspect.signature(kind.step).parameters


def make_scheduler(
    name: str,
    diffusion: GaussianDiffusion,
    steps: int,
    *,
    prediction: str = "epsilon",
    learned_range: bool = False,
    of: str = "",
) -> Solver:
    """The steps of a sampling of `diffusion`, by name.

    Args:
        name: one of `SCHEDULERS`.
        diffusion: the schedule.
        steps: of the chain; "heun", "dpm2", "dpm2-a" and "pndm" run the model more often than that.
        prediction: "epsilon" or "sample" (x_0).
        learned_range: the model predicts the variance; only "ddpm" uses it.
        of: prefix of the arguments' names in messages, such as "grain_".

    Raises:
        ValueError: an unknown name, or a number of steps outside 1 ... T.
    """
    choices = GRAIN_SCHEDULERS if prediction == "sample" else SCHEDULERS
    if name not in choices:
        raise ValueError(f"{of}scheduler must be one of {', '.join(choices)}, got {name!r}")
    steps = whole_number(f"{of}steps", steps, 1, diffusion.num_timesteps)
    if name == "ddpm":
        return Ddpm(diffusion, steps, prediction, learned_range)
    if name == "ddim":
        return Ddim(diffusion, steps, prediction)
    if name == "lms" and importlib.util.find_spec("scipy") is None:
        raise ValueError("scheduler 'lms' needs the package scipy, which is not installed")
    kind, settings = _DIFFUSERS[name]
    shared = {**diffusion.scheduler_arguments(), "prediction_type": prediction}
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


def draw_noise(solver: Ddpm | Ddim, i: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
    """What step `i` adds: a normal draw, or zeros where it adds nothing."""
    if i < solver.noise_steps:
        return randn(x.shape, generators, device=x.device, dtype=x.dtype)
    return torch.zeros_like(x)
