"""Schedule, multi-grained noise and loss, guidance, sampling."""

from d2it.diffusion.gaussian import GaussianDiffusion
from d2it.diffusion.grains import (
    copy_codes,
    expected_signal,
    grain_weights,
    grained_noise,
    grains_to_signal,
    level_grains,
    project_to_grains,
    random_grain_map,
    ranked_grains,
)
from d2it.diffusion.guidance import Guidance
from d2it.diffusion.linear import LinearDiffusion
from d2it.diffusion.losses import ContentLoss, content_loss, grain_loss
from d2it.diffusion.process import Diffusion, DiffusionConfig
from d2it.diffusion.sampling import sample_content, sample_grain_maps
from d2it.diffusion.solvers import (
    FLOW_SCHEDULERS,
    GRAIN_SCHEDULERS,
    SCHEDULERS,
    default_scheduler,
    grain_scheduler_for,
    make_diffusion,
    make_scheduler,
)

__all__ = [
    "FLOW_SCHEDULERS",
    "GRAIN_SCHEDULERS",
    "SCHEDULERS",
    "ContentLoss",
    "Diffusion",
    "DiffusionConfig",
    "GaussianDiffusion",
    "Guidance",
    "LinearDiffusion",
    "content_loss",
    "copy_codes",
    "default_scheduler",
    "expected_signal",
    "grain_loss",
    "grain_scheduler_for",
    "grain_weights",
    "grained_noise",
    "grains_to_signal",
    "level_grains",
    "make_diffusion",
    "make_scheduler",
    "project_to_grains",
    "random_grain_map",
    "ranked_grains",
    "sample_content",
    "sample_grain_maps",
]
