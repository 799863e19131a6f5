"""What the DynamicVAE keeps of an image, by fine ratio (the horizontal axis of the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from d2it import ops, pictures
from d2it.errors import UserError
from d2it.evaluation.generation import Extractor, summarize

if TYPE_CHECKING:
    from d2it.models import DynamicVAE

Images = Callable[[], Iterable[Tensor]]


@torch.inference_mode()
def evaluate_reconstruction(
    vae: DynamicVAE,
    images: Images,
    ratios: Sequence[float | Sequence[float]],
    *,
    extractor: Extractor | None = None,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Encodes and decodes a set of images at several fine ratios.

    The thresholds of a ratio are the percentiles of this set's own entropies, so that this share of its regions is
    fine; regions of one entropy go together to the side of the nearer share. With k > 2 grains one share is split
    evenly over the grains above the coarsest; k - 1 of them are those of grain i + 1 or finer. A VAE of one grain, the
    fixed-rate baseline, has one row, of ratio 1. What is decoded is the mean of the posterior, without noise.

    Args:
        vae: the model, on `device`.
        images: gives a fresh pass over uint8 (B, 3, H, W) batches each time it is called.
        ratios: shares of fine regions in [0, 1]; or k - 1 shares that descend.
        extractor: for rFID; None leaves it out.
        lpips: perceptual distance (B, 3, H, W), (B, 3, H, W) in [-1, 1] -> (B,); None leaves it out.

    Returns:
        For each ratio: `fine_ratio`, `fine_share` (of regions above the coarsest grain, as it turned out), `codes`
        (latent codes an image), `psnr` (dB, the mean over 8-bit images), `ssim`, and where asked for `lpips`, `rfid`.

    Raises:
        UserError: a ratio outside [0, 1], or shares of another number or that ascend.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    grains = vae.config.num_grains
    ratios = [1.0] if grains == 1 else ratios
    chosen = [_shares(ratio, grains) for ratio in ratios]
    entropies = torch.cat([vae.grain_map(batch.to(device))[1].flatten().cpu() for batch in images()]).numpy()
    if extractor is not None:
        true = summarize(images(), extractor, metrics=("fid",), device=device)
    rows = []
    for ratio, shares in zip(ratios, chosen):
        limits = _limits(entropies, shares)
        scores: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": [], "codes": []}

        def decoded(limits=limits, scores=scores) -> Iterable[Tensor]:
            for batch in images():
                batch = batch.to(device)
                target = pictures.from_uint8(batch)
                # The reference, which takes equal limits too: ratios 0 and 1 leave several at the same infinity.
                grains = ops.reference.grain_map(vae.grain_map(batch)[1], limits)
                mean, _, grains, _ = vae.encode(target, grains)
                output = vae.decode(mean, grains)
                bytes_out = pictures.to_uint8(output)
                a, b = batch.float() / 255, bytes_out.float() / 255
                error = (a - b).square().mean(dim=(1, 2, 3))
                scores["psnr"].append(-10 * error.clamp(min=1e-10).log10())
                similarity = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
                scores["ssim"].append(similarity.reshape(-1))  # type: ignore[union-attr]
                if lpips is not None:
                    scores["lpips"].append(lpips(pictures.from_uint8(bytes_out), target).reshape(-1))
                scores["codes"].append(_codes(grains, vae))
                yield bytes_out

        asked = float(ratio) if isinstance(ratio, (int, float)) else list(ratio)
        row: dict[str, Any] = {
            "fine_ratio": asked,
            "fine_share": float((entropies > limits[0]).mean()) if limits else 1.0,
        }
        if extractor is None:
            for _ in decoded():
                pass
        else:
            made = summarize(decoded(), extractor, metrics=("fid",), device=device)
            row |= {"rfid": true.pool.frechet_distance(made.pool)}
        row |= {name: float(torch.cat(values).mean()) for name, values in scores.items() if values}
        rows.append(row)
    return rows


def _shares(ratio: float | Sequence[float], grains: int) -> list[float]:
    """Returns the k-1 shares that a ratio means: ratio, ratio * (k-2)/(k-1), ..., or those that it names."""
    if isinstance(ratio, (int, float)):
        if not 0 <= ratio <= 1:
            raise UserError(f"a fine ratio must be in [0, 1], got {ratio}")
        return [ratio * (grains - 1 - i) / (grains - 1) for i in range(grains - 1)]
    shares = [float(share) for share in ratio]
    if len(shares) != grains - 1 or shares != sorted(shares, reverse=True) or not all(0 <= r <= 1 for r in shares):
        raise UserError(
            f"fine ratios must be {grains - 1} descending shares in [0, 1] for {grains} grains, got {shares}"
        )
    return shares


def _limits(entropies: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Returns the k-1 entropies that shares nearest to these exceed; infinite at the ends."""
    values = np.sort(entropies)
    # How many regions a limit can leave below it: limits lie between values that differ by more than rounding.
    edges = np.array([0, *(np.flatnonzero(np.diff(values) > 1e-5) + 1), len(values)])
    limits = []
    for share in shares:
        edge = edges[np.abs(edges - (1 - share) * len(values)).argmin()]
        inside = 0 < edge < len(values)
        limits.append(float(values[edge - 1 : edge + 1].mean()) if inside else (np.inf if edge else -np.inf))
    return limits


def _codes(grains: Tensor, vae: DynamicVAE) -> Tensor:
    """(B,) latent codes that an image spends."""
    side = vae.config.code_sizes[0]
    each = torch.tensor([(side // size) ** 2 for size in vae.config.code_sizes], device=grains.device)
    return each[grains].flatten(1).sum(dim=1).float()
