"""The training losses: multi-grained noise (Eq. 11) with its variational term, and the grain map (Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from d2it.diffusion.gaussian import GaussianDiffusion
from d2it.diffusion.grains import grain_weights
from d2it.diffusion.process import Diffusion


class ContentLoss(NamedTuple):
    """The content's loss per sample, each (B,) float32.

    Args:
        loss: `mse` + `vlb`.
        mse: Eq. 11.
        vlb: the variational term of a learned variance.
    """

    loss: Tensor
    mse: Tensor
    vlb: Tensor


def content_loss(
    diffusion: Diffusion,
    model_out: Tensor,
    *,
    x0: Tensor,
    xt: Tensor,
    noise: Tensor,
    t: Tensor,
    grain_map: Tensor | None = None,
    code_sizes: Sequence[int] = (2, 1),
) -> ContentLoss:
    """Eq. 11: the mean over all cells and channels of alpha (eps - eps_theta)^2, and the same weights on the VLB.

    The denominator is the number of cells, not of codes: it is the same for every image, so that the gradient of a
    batch is the mean of its images' gradients however they are split over ranks or accumulation steps.

    Args:
        diffusion: the schedule.
        model_out: (B, C or 2C, Hf, Wf); 2C with `diffusion.learn_sigma`.
        x0: the clean latents (B, C, Hf, Wf).
        xt: the noised latents.
        noise: what they were noised with.
        t: (B,) int64.
        grain_map: (B, H/S, W/S), or None: every cell counts 1 (the plain DiT, or Eq. 11 left out).
        code_sizes: cells along a code's side by grain, coarsest first.
    """
    channels = x0.shape[1]
    model_out = model_out.float()
    predicted = model_out[:, :channels]
    weight = None
    if grain_map is not None:
        weight = grain_weights(grain_map, code_sizes=code_sizes)

    def mean(error: Tensor) -> Tensor:
        return (error if weight is None else error * weight).mean(dim=(1, 2, 3))

    error = (diffusion.target(x0.float(), noise.float(), t) - predicted).square()
    over_time = diffusion.loss_weight(t)
    mse = mean(error if over_time is None else error * over_time)
    if not isinstance(diffusion, GaussianDiffusion) or not diffusion.learn_sigma:
        return ContentLoss(mse, mse, mse.new_zeros(mse.shape))
    _, predicted_noise = diffusion.predict(predicted, xt.float(), t)
    vlb = mean(diffusion.vlb_terms(x0.float(), xt.float(), t, predicted_noise, model_out[:, channels:]))
    return ContentLoss(mse + vlb, mse, vlb)


def grain_loss(logits: Tensor, grain_map: Tensor) -> Tensor:
    """Eq. 5: cross-entropy (nats) of the grain logits (B, k, h, w) against the map (B, h, w), mean a sample: (B,)."""
    return F.cross_entropy(logits.float(), grain_map, reduction="none").mean(dim=(1, 2))
