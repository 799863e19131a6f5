"""What a trained variant is worth: its denoising error on held-out images, and the distances of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2it import pictures
from d2it.data import LatentCache, open_source
from d2it.diffusion import (
    GaussianDiffusion,
    grained_noise,
    make_diffusion,
    random_grain_map,
    sample_content,
    sample_grain_maps,
)
from d2it.diffusion.grains import expand_map, grain_weights
from d2it.diffusion.process import NUM_TIMESTEPS
from d2it.evaluation.extractors import EfficientNetLite
from d2it.evaluation.generation import Summary, compare, open_reference, spread, summarize
from d2it.evaluation.reconstruction import evaluate_reconstruction
from d2it.files import read_json
from d2it.models import DiT, DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.models.base import saved_kind
from d2it.npz import save_arrays
from d2it.seeds import seed_of
from quality.stages import Bench, Plan, evenly, seconds_at, write_json
from quality.tiers import Variant

METRICS = ("fd", "kd", "precision", "recall", "accuracy")
_A, _S = (each.flatten().double() for each in GaussianDiffusion().coefficients(torch.arange(NUM_TIMESTEPS)))
#: log(signal to noise, a^2 / s^2) at which the denoising error is measured. Beyond -4 no network here knows more of the
#: image than its mean, and the x_0 that epsilon gives is divided by a: what is left there is chance.
LEVELS = tuple(range(4, -5, -1))
#: The timesteps of the ddpm path that are nearest to them.
TIMES = tuple(int((2 * (_A / _S).log() - level).abs().argmin()) for level in LEVELS)
BATCH = 64
SMALL = 16  # of the extractor: its layers before the depthwise ones fill a CPU's cache; a divisor of BATCH


class Scorer:
    """Scores the variants of a tier.

    Args:
        bench: the tier in its folder.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.tier, self.device = bench, bench.tier, bench.world.device

    @cached_property
    def extractor(self) -> nn.Module:
        network = EfficientNetLite(self.tier.extractor, self.tier.side)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @cached_property
    def reference(self) -> Summary:
        """Of the held-out images, kept in a file."""
        path = self.bench.work / "data" / "reference.npz"
        if not path.exists():
            labels = torch.from_numpy(self._source.labels)
            found = self._summary(self.images(), labels)
            part = path.with_name("reference.part.npz")
            found.save(part)
            part.rename(path)
        return open_reference(path, self.extractor, metrics=METRICS, device=self.device)  # type: ignore[arg-type]

    @cached_property
    def _source(self) -> Any:
        return open_source(self.bench.data[1], self.tier.image_size)

    def images(self, count: int | None = None) -> Iterator[Tensor]:
        """The first held-out images in batches, uint8."""
        total = len(self._source) if count is None else min(count, len(self._source))
        for start in range(0, total, BATCH):
            yield self._source.fetch(range(start, min(start + BATCH, total)))["image"]

    def _summary(self, images: Iterable[Tensor], labels: Tensor) -> Summary:
        given: Any = {"metrics": METRICS, "device": self.device, "labels": labels.split(SMALL)}
        return summarize((part for batch in images for part in batch.split(SMALL)), self.extractor, **given)  # type: ignore[arg-type]

    def _distances(self, images: Iterable[Tensor], labels: Tensor) -> dict[str, float]:
        """The metrics of images against the held-out ones; precision and recall are shares."""
        return compare(self._summary(images, labels), self.reference, METRICS)

    # ---- what samples cannot beat ------------------------------------------------------------------------------------

    def _real(self, seed: int) -> tuple[Tensor, Tensor]:
        """As many training images as there are samples, uint8, and their labels, from each class in turn."""
        source = open_source(self.bench.data[0], self.tier.image_size)
        shuffled = np.random.default_rng(seed_of("quality", "floor", seed)).permutation(len(source))
        chosen = evenly(shuffled.tolist(), source.labels)[: self.tier.samples]
        return source.fetch(chosen)["image"], torch.from_numpy(source.labels[chosen])

    def floor(self) -> dict[str, dict[str, float]]:
        """The metrics of real images, as many as there are samples: where a distance of so many images begins."""

        def measured(seed: int) -> dict[str, float]:
            images, labels = self._real(seed)
            return self._distances(images.split(BATCH), labels)

        folder = self.bench.work / "data"
        return _figures([_kept(folder / f"floor-{s}.json", lambda s=s: measured(s)) for s in self.tier.seeds])

    @torch.inference_mode()
    def rebuilt(self, variant: Variant) -> dict[str, float]:
        """The metrics of the first seed's real images as the variant's VAE rebuilds them: what a transformer without
        error would have on its latents."""
        folder = self.bench.vae_folder(variant)

        def measured() -> dict[str, float]:
            vae = DynamicVAE.from_pretrained(folder / "vae").to(self.device)
            images, labels = self._real(self.tier.seeds[0])
            made = []
            for batch in images.split(BATCH):
                mean, _, grains, _ = vae.encode(pictures.from_uint8(batch.to(self.device)))
                made.append(pictures.to_uint8(vae.decode(mean, grains)).cpu())
            return self._distances(made, labels)

        return _kept(folder / "rebuilt.json", measured)

    def network(self, folder: Path) -> Any:
        found = saved_kind(folder, (DynamicContentTransformer, DiT)).from_pretrained(folder)
        return found.to(self.device).eval()

    # ---- held-out denoising error ------------------------------------------------------------------------------------

    @torch.no_grad()
    def error(self, variant: Variant, network: Any, seed: int) -> dict[str, Any]:
        """Squared error of the predicted x_0 (latents of unit variance) on held-out latents.

        The posterior's draws, the noise and the images are the same for all variants on one VAE, and every latent code
        counts once. At one ratio of signal to noise, the errors of two models have one ratio in x_0, epsilon and v, so
        their geometric mean over such ratios favours no prediction.

        Returns:
            "all": by level, over all codes; "grain.g": by level, over the codes of grain g; "mean": the geometric mean
            of "all" over the levels.
        """
        cache = LatentCache(self.bench.vae_folder(variant) / "held_out")
        config, scale = network.config, float(cache.facts["scaling_factor"])
        diffusion = make_diffusion(config.diffusion, learn_sigma=config.learn_sigma, device=self.device)
        grained = isinstance(network, DynamicContentTransformer)
        sizes = config.code_sizes if grained else (1,)
        grains = range(len(sizes))
        sums = torch.zeros(len(TIMES), len(sizes), dtype=torch.float64)
        weights = torch.zeros(len(sizes), dtype=torch.float64)
        for start in range(0, min(self.tier.errors, len(cache)), BATCH):
            batch = cache.fetch(range(start, min(start + BATCH, self.tier.errors, len(cache))))
            maps = batch["grain_map"]
            generator = torch.Generator().manual_seed(seed_of("quality", "error", seed, start))
            shape = batch["mean"].shape

            def draw(maps=maps, generator=generator, shape=shape) -> Tensor:
                if grained:
                    return grained_noise(maps, shape[1], code_sizes=sizes, generator=generator)
                return torch.randn(shape, generator=generator)

            clean = ((batch["mean"] + batch["std"] * draw()) * scale).to(self.device)
            labels = batch["label"].to(self.device) if config.num_classes else None
            weight = grain_weights(maps, code_sizes=sizes) if grained else torch.ones(shape[0], 1, *shape[2:])
            places = expand_map(maps, sizes[0])[:, None] if grained else torch.zeros(shape[0], 1, *shape[2:])
            given = {"grain_map": maps.to(self.device)} if grained else {}
            for g in grains:
                weights[g] += (weight * (places == g)).double().sum() * shape[1]
            for i, time in enumerate(_times(diffusion)):
                t = torch.full((shape[0],), time, device=self.device)
                noised = diffusion.q_sample(clean, draw().to(self.device), t)
                out = network(noised, t, labels, **given)[:, : shape[1]].float()
                guess, _ = diffusion.predict(out, noised, t)
                square = (guess - clean).square().cpu().double().sum(dim=1, keepdim=True) * weight
                for g in grains:
                    sums[i, g] += square[places == g].sum()
        every = sums.sum(dim=1) / weights.sum()
        found: dict[str, Any] = {"all": every.tolist(), "mean": float(every.log().mean().exp())}
        if grained:
            found |= {f"grain.{g}": (sums[:, g] / weights[g]).tolist() for g in grains}
        return found

    # ---- samples -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, name: str, variant: Variant, network: Any, seed: int, maps: str) -> tuple[Tensor, Tensor]:
        """Images uint8 of one seed and their labels, those of the held-out images in turn.

        Args:
            name: of the variant.
            variant: what it is.
            network: its weights.
            seed: of the noise.
            maps: "true" (of the held-out images), "predicted" (by the Grain Transformer) or "random" (the same share).
        """
        tier, folder = self.tier, self.bench.vae_folder(variant)
        vae = DynamicVAE.from_pretrained(folder / "vae").to(self.device)
        held_out = LatentCache(folder / "held_out")
        grained = isinstance(network, DynamicContentTransformer)
        predicted = self.predicted_maps(variant, seed) if grained and maps == "predicted" else None
        shares = held_out.shares()
        found, all_labels = [], []
        for start in range(0, tier.samples, BATCH):
            numbers = range(start, min(start + BATCH, tier.samples))
            seeds = [seed_of("quality", "sample", seed, i) for i in numbers]
            batch = held_out.fetch([i % len(held_out) for i in numbers])
            labels = batch["label"].to(self.device)
            chosen = torch.zeros(len(seeds), *held_out.grid, dtype=torch.int64)
            if grained and maps == "true":
                chosen = batch["grain_map"]
            elif grained and maps == "random":
                generators = [torch.Generator().manual_seed(each) for each in seeds]
                chosen = random_grain_map(held_out.grid, shares, held_out.num_grains, generator=generators)
            elif predicted is not None:
                chosen = predicted[start : start + BATCH]
            chosen = chosen.to(self.device)
            latents = sample_content(
                network,
                chosen if grained else None,
                labels,
                seeds=seeds,
                scheduler=tier.scheduler,
                steps=tier.steps,
                autocast=self._autocast,
            )
            found.append(pictures.to_uint8(vae.decode(latents / vae.scaling_factor, chosen)).cpu())
            all_labels.append(labels.cpu())
        return torch.cat(found), torch.cat(all_labels)

    @torch.no_grad()
    def predicted_maps(self, variant: Variant, seed: int) -> Tensor:
        """The maps (samples, h, w) int64 of one seed's samples by the VAE's Grain Transformer, for the labels of the
        held-out images in turn: all variants on one VAE have the same ones, kept in a file."""
        tier, folder = self.tier, self.bench.vae_folder(variant)
        path = folder / f"maps-{seed}.npz"
        if not path.exists():
            held_out = LatentCache(folder / "held_out")
            grain = DynamicGrainTransformer.from_pretrained(folder / "grain_transformer").to(self.device).eval()
            found = []
            for start in range(0, tier.samples, BATCH):
                numbers = range(start, min(start + BATCH, tier.samples))
                labels = held_out.fetch([i % len(held_out) for i in numbers])["label"].to(self.device)
                seeds = [seed_of("quality", "map", seed, i) for i in numbers]
                given: Any = {"scheduler": tier.scheduler, "steps": tier.steps, "autocast": self._autocast}
                found.append(sample_grain_maps(grain, labels, seeds=seeds, **given).cpu())
            save_arrays(path, {"maps": torch.cat(found).numpy()})
        with np.load(path, allow_pickle=False) as kept:
            return torch.from_numpy(kept["maps"])

    @property
    def _autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.device.type == "cuda" else None

    def distances(self, name: str, variant: Variant, network: Any, seed: int, maps: str) -> dict[str, float]:
        """The metrics of one seed's samples against the held-out images; precision and recall are shares."""
        images, labels = self.sample(name, variant, network, seed, maps)
        return self._distances(images.split(BATCH), labels)

    # ---- a variant, a VAE --------------------------------------------------------------------------------------------

    def variant(self, name: str, variant: Variant, plan: Plan) -> dict[str, Any]:
        """All scores of a trained variant; what is in its folder already is not computed again."""
        tier, folder = self.tier, self.bench.folder(name) / "scores"
        every = plan.steps // tier.checkpoints
        curve = []
        for step in range(every if variant.core else plan.steps, plan.steps + 1, every):
            weights = self.bench.average(name, step)
            last = step == plan.steps
            errors = [
                _kept(folder / f"error-{step}-{s}.json", lambda s=s, w=weights: self.error(variant, self.network(w), s))
                for s in (tier.seeds if last else tier.seeds[:1])
            ]
            found = {
                source: [
                    _kept(
                        folder / f"samples-{step}-{source}-{s}.json",
                        lambda s=s, w=weights, m=source: self.distances(name, variant, self.network(w), s, m),
                    )
                    for s in (tier.seeds if last else tier.seeds[:1])
                ]
                for source in (variant.maps if last else variant.maps[:1])
            }
            scores = found[variant.maps[0]][0]
            curve.append(
                {
                    "step": step,
                    "images": step * plan.batch_size,
                    "macs": 3 * plan.macs * step * plan.batch_size,
                    "error": errors[0]["mean"],
                    "fd": scores["fd"],
                    "kd": scores["kd"],
                }
            )
        values = [error["mean"] for error in errors]
        by_level = {key: _over_seeds([error[key] for error in errors]) for key in errors[0] if key != "mean"}
        return {
            "error": _figure(values) | {"values": values},
            "error_by_level": {"levels": list(LEVELS), **by_level},
            "samples": {source: _figures(reports) for source, reports in found.items()},
            "rebuilt": self.rebuilt(variant),
            "curve": curve,
        }

    def reconstruction(self, vae: str) -> list[dict[str, float]]:
        """PSNR, SSIM and rFD of a trained VAE by share of fine regions, on held-out images."""
        folder = self.bench.work / "vaes" / vae
        network = DynamicVAE.from_pretrained(folder / "vae").to(self.device)
        ratios = (0.0, 0.3, 0.5, 0.7, 1.0)

        def rows() -> dict[str, Any]:
            found = evaluate_reconstruction(
                network,
                lambda: self.images(self.tier.rebuilt),
                ratios,
                extractor=self.extractor,  # type: ignore[arg-type]
                device=self.device,
            )
            return {"rows": [{("rfd" if key == "rfid" else key): v for key, v in row.items()} for row in found]}

        return _kept(folder / "reconstruction.json", rows)["rows"]


def _times(diffusion: Any) -> list[int | float]:
    """The timesteps of a path that have the ratios of signal to noise of TIMES on the ddpm path."""
    if isinstance(diffusion, GaussianDiffusion):
        return list(TIMES)
    a, s = _A[list(TIMES)], _S[list(TIMES)]
    return (diffusion.num_timesteps * s / (a + s)).tolist()


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned when it was first called, from a file."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)


def _figure(values: Sequence[float]) -> dict[str, float]:
    """Mean, and standard deviation over the seeds."""
    mean = math.fsum(values) / len(values)
    return {"mean": mean, "spread": math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))}


def _figures(reports: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    means, spreads = spread(reports)
    return {name: {"mean": means[name], "spread": spreads[name]} for name in means}


def _over_seeds(lists: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(values) / len(values) for values in zip(*lists)]


def timing(bench: Bench, name: str, curve: list[dict[str, Any]]) -> list[float] | None:
    """Seconds of training at every point of a curve; None where the log has none."""
    found = [seconds_at(bench, name, point["step"]) for point in curve]
    return None if None in found else found  # type: ignore[return-value]
