"""The whole model: labels in, images and grain maps out (section 3.2: map first, then content, then the decoder).

    from d2it import D2iT

    d2it = D2iT.from_pretrained("runs/demo")
    samples = d2it(4, seed=0)
    samples.images      # (4, 3, H, W) in [-1, 1]
    samples.grain_maps  # (4, H/S, W/S), 0 = coarsest

On a CPU every image is computed alone on one thread, as many side by side as torch has threads. The batch size and the
number of threads change the last bits of a matrix product, and 250 steps carry them on; so images are equal bit by bit
for any batch size, number of threads and number of ranks, for one machine, build of torch and set of seeds. On a GPU
a batch is a batch, and its size moves an image by rounding. While a call runs on a CPU, torch's number of threads is 1
for the whole process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from d2it import pictures
from d2it.data.calibration import shares_above
from d2it.diffusion import (
    Guidance,
    default_scheduler,
    grain_scheduler_for,
    level_grains,
    make_diffusion,
    make_scheduler,
    ranked_grains,
)
from d2it.diffusion.sampling import (
    Callback,
    as_map,
    check_cuda_graph,
    check_grain_map,
    check_guidance,
    check_guide,
    check_seeds,
    denoise_content,
    denoise_grain_maps,
)
from d2it.diffusion.solvers import whole_number
from d2it.errors import reason_of
from d2it.files import read_sealed, write_sealed
from d2it.models.base import CONFIG_FILE, Model, Pretrained, local_folder, saved_kind
from d2it.models.budget import grain_tokens, shares_of
from d2it.models.content import DynamicContentTransformer
from d2it.models.dit import DiT
from d2it.models.dvae import DynamicVAE
from d2it.models.grain import DynamicGrainTransformer
from d2it.models.klvae import KLVAE
from d2it.models.layers import cast_blocks
from d2it.sampling.card import write_companions
from d2it.sampling.labels import Label, class_number
from d2it.seeds import derived_seed

T = TypeVar("T")
R = TypeVar("R")

DESCRIPTION = "d2it.json"
#: The parts of a D2iT and what each may be; the first is the paper's.
PARTS: dict[str, tuple[type[Model], ...]] = {
    "vae": (DynamicVAE, KLVAE),
    "grain_transformer": (DynamicGrainTransformer,),
    "content_transformer": (DynamicContentTransformer, DiT),
}
#: Arguments of a call for which a D2iT can have its own defaults.
DEFAULTS = ("scheduler", "steps", "grain_scheduler", "grain_steps", "guidance", "grain_guidance")
#: That Dynamo may make of one function, in a thread of a CPU that samples.
MOST_GRAPHS = 256


@dataclass(frozen=True)
class Samples:
    """Images with their grain maps, on the CPU.

    Args:
        images: (N, 3, H, W) float32 in [-1, 1].
        grain_maps: (N, H/S, W/S) int64, 0 = coarsest.
        labels: (N,) int64, or None without classes.
    """

    images: Tensor
    grain_maps: Tensor
    labels: Tensor | None = None

    def uint8(self) -> np.ndarray:
        """The images as (N, H, W, 3) uint8."""
        return pictures.to_pictures(self.images)


class D2iT(Pretrained):
    """A DynamicVAE, a Dynamic Grain Transformer and a Dynamic Content Transformer that fit each other.

    The baseline is sampled in the same way: a plain `DiT` as `content_transformer`, over a DynamicVAE (of one grain,
    the preset "f8", as a rule) or over the `KLVAE` of DiT's released weights. It needs no Grain Transformer; the grain
    map is then an input of the decoder alone, and is the finest everywhere unless given or sampled.

    Args:
        vae: the autoencoder.
        grain_transformer: None: every call must give its grain maps, or the content is a plain DiT's.
        content_transformer: trained on the latents of `vae`.
        class_names: one for each class, or None.
        sampling: this model's own defaults for arguments of a call (`DEFAULTS`).
        any_vae: accept a VAE other than the one whose latents the transformers were trained on (a decoder that was
            fine-tuned alone, say).
        guide: a weaker content transformer that guides this one in place of the null label (autoguidance); it moves
            with the model and is not saved with it.
        facts: what is known of its training, for the model card: "data" and "settings", each name -> value, and
            "license" of the weights.

    Raises:
        ValueError: parts that do not fit each other, named.
    """

    def __init__(
        self,
        vae: DynamicVAE | KLVAE,
        grain_transformer: DynamicGrainTransformer | None,
        content_transformer: DynamicContentTransformer | DiT,
        *,
        class_names: Sequence[str] | None = None,
        sampling: dict[str, Any] | None = None,
        any_vae: bool = False,
        guide: DynamicContentTransformer | DiT | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.vae, self.grain_transformer, self.content_transformer = vae, grain_transformer, content_transformer
        content = content_transformer.config
        plain = isinstance(content_transformer, DiT)
        factors = vae.downsampling[0] if plain else tuple(vae.downsampling)
        pairs: list[tuple[str, Any, Any]] = [
            ("downsampling factors", factors, content.downsampling),
            ("latent channels", vae.config.latent_channels, content.in_channels),
        ]
        if grain_transformer is not None:
            grain = grain_transformer.config
            pairs += [
                ("grain map size", grain.grid, self.region_grid),
                ("number of grains", grain.num_grains, self.num_grains),
                ("number of classes", grain.num_classes, content.num_classes),
            ]
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise ValueError(f"the parts of a D2iT must share their {what}, got {ours} and {theirs}")
        self.any_vae, self.guide = any_vae, guide
        self._compiled = False
        if not any_vae:
            self._check_vae(self._transformers)
        if guide is not None:
            self._check_guide(guide)
        self.class_names, self.sampling = _description(class_names, sampling, content.num_classes)
        if not isinstance(facts, (dict, type(None))):
            raise ValueError(f"facts must be a dictionary, got {facts!r}")
        self.facts = dict(facts or {})

    def _check_guide(self, guide: Model) -> None:
        check_guide(guide, self.content_transformer)
        if not self.any_vae:
            self._check_vae({"guide": guide})

    def _check_vae(self, transformers: dict[str, Model]) -> None:
        ours = self.vae.weights_sha256
        for name, part in transformers.items():
            theirs = part.vae_sha256
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(
                    f"{name} was trained on the latents of another VAE (SHA-256 {theirs[:12]}...) than this one "
                    f"({ours[:12]}...); any_vae=True uses it all the same"
                )

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return self.content_transformer.config.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.content_transformer.config.image_size

    @property
    def region_grid(self) -> tuple[int, int]:
        """(H/S, W/S), the size of a grain map."""
        height, width = self.image_size
        return (height // self.vae.config.region_size, width // self.vae.config.region_size)

    @property
    def num_grains(self) -> int:
        """k; grains are 0 ... k-1."""
        return self.vae.config.num_grains

    @property
    def device(self) -> torch.device:
        return next(self.content_transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the transformers' blocks compute."""
        return next(self.content_transformer.transformer_blocks()[0].attn.parameters()).dtype  # type: ignore[union-attr]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> D2iT:
        """Moves all parts to `device`, and the weights of the transformers' blocks to `dtype`, in place.

        What lies outside the blocks, the modulations in them and the VAE stay float32: little memory and time, and
        their rounding would reach every token.

        Raises:
            ValueError: a device that is not there.
        """
        try:
            for part in (self.vae, *self._networks):
                part.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:  # torch's kinds for a device that it does not have
            raise ValueError(f"device {device!r} cannot be used: {reason_of(error)}") from error
        if dtype is not None:
            for transformer in self._networks:
                cast_blocks(transformer.transformer_blocks(), dtype)
        return self

    def compile(self, **kwargs: Any) -> D2iT:
        """torch.compile of the transformers' blocks, in place; `kwargs` are those of torch.compile.

        The blocks of a transformer share their compiled code. It is made in the first call, and again where the number
        of images in a batch changes.
        """
        for transformer in self._networks:
            transformer.compile_blocks(**kwargs)
        self._compiled = True
        return self

    @property
    def parts(self) -> dict[str, Model]:
        """The parts that there are, by name."""
        parts: dict[str, Model | None] = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _transformers(self) -> dict[str, Model]:
        return {name: part for name, part in self.parts.items() if name != "vae"}

    @property
    def _networks(self) -> list[Model]:
        """The transformers and the guide."""
        return [*self._transformers.values(), *([] if self.guide is None else [self.guide])]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        any_vae: bool = False,
        guide: str | Path | None = None,
        **hub: Any,
    ) -> D2iT:
        """Reads what `save_pretrained`, or a training run, wrote to a folder.

        Args:
            pretrained_model_name_or_path: a local folder, or a repository of the Hugging Face hub ("user/model"),
                which is downloaded once and kept in the hub's cache.
            device: where the parts go.
            dtype: of the weights of the transformers' blocks, see `to`; torch.bfloat16 halves their memory. float32
                by default, on every machine.
            any_vae: as for a new D2iT.
            guide: a local folder with the guide of a new D2iT: of a content transformer, or of a D2iT or a run that
                has one.
            hub: `local_files_only` (no network: a local folder, or a repository in the cache), `revision`,
                `cache_dir`, `force_download`, `token`.

        Raises:
            ValueError: no such folder, no D2iT in it, a part that is damaged or of another model, or a device that is
                not there.
        """
        path = Path(local_folder(pretrained_model_name_or_path, cls.__name__, **hub))
        if not (path / DESCRIPTION).is_file():
            raise ValueError(f"path must be a folder with a trained D2iT, got {str(path)!r}: no {DESCRIPTION}")
        description = read_sealed(path / DESCRIPTION, {"class_names", "sampling", "facts"})
        weaker = None if guide is None else _read_guide(Path(guide))
        return cls.from_parts(path, any_vae=any_vae, guide=weaker, **description).to(device, dtype)

    @classmethod
    def from_parts(cls, path: str | Path, **settings: Any) -> D2iT:
        """Reads the parts in the folder `path`; `settings` are those of a new D2iT.

        Raises:
            ValueError: a part that is missing, damaged, of another model, or does not fit the others.
        """
        path = Path(path)
        given = {name: kinds for name, kinds in PARTS.items() if name != "grain_transformer" or (path / name).is_dir()}
        parts: dict[str, Any] = {"grain_transformer": None}
        for name, kinds in given.items():
            parts[name] = saved_kind(path / name, kinds).from_pretrained(path / name)
        return cls(**parts, **settings)

    def _save_pretrained(self, save_directory: Path) -> None:
        before = self.vae.weights_sha256
        self.vae.save_pretrained(save_directory / "vae")
        for name, part in self._transformers.items():
            if part.vae_sha256 in (None, before):  # not where `any_vae` put them together
                part.vae_sha256 = self.vae.weights_sha256
            part.save_pretrained(save_directory / name)
        self.save_description(save_directory)

    def save_description(self, path: str | Path) -> None:
        """Writes what belongs to no part into a folder that has the parts: d2it.json, the card, diffusers' index."""
        content: dict[str, Any] = {"class_names": self.class_names, "sampling": self.described_sampling}
        if self.facts:
            content["facts"] = self.facts
        write_sealed(Path(path) / DESCRIPTION, content)
        write_companions(Path(path), self)

    @property
    def described_sampling(self) -> dict[str, Any]:
        """`sampling` as JSON values."""
        return {k: dataclasses.asdict(v) if isinstance(v, Guidance) else v for k, v in self.sampling.items()}

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        *,
        labels: Label | Sequence[Label] | Tensor | None = None,
        grain_map: Tensor | None = None,
        budget: float | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        grain_scheduler: str | None = None,
        grain_steps: int | None = None,
        guidance: float | Guidance | None = None,
        grain_guidance: float | Guidance | None = None,
        guide: DynamicContentTransformer | DiT | None = None,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        cuda_graph: bool = False,
        callback: Callback | None = None,
    ) -> Samples:
        """Samples images and their grain maps.

        A sample depends on its own seed, label and grain map alone: see the head of this module for how exactly.

        Example:
            >>> import torch
            >>> from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
            >>> from d2it.sampling import D2iT
            >>> small = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
            >>> d2it = D2iT(
            ...     DynamicVAE.from_preset("tiny"),
            ...     DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **small),
            ...     DynamicContentTransformer.from_preset("tiny", image_size=64, **small),
            ... )
            >>> samples = d2it(labels=[0, 2], seed=7, scheduler="ddim", steps=2, guidance=1.5)
            >>> samples.images.shape, samples.grain_maps.shape
            (torch.Size([2, 3, 64, 64]), torch.Size([2, 4, 4]))
            >>> fine = torch.ones(4, 4, dtype=torch.int64)
            >>> fine[:, :2] = 0  # detail on the right half alone
            >>> d2it(labels=[0, 2], grain_map=fine, steps=2).grain_maps.float().mean()
            tensor(0.5000)
            >>> light = torch.rand(4, 4)  # detail where it is light, as far as a budget reaches
            >>> d2it(labels=[0, 2], grain_map=light, budget=0.4, steps=2).grain_maps.float().mean()
            tensor(0.2500)

        Args:
            num_images: how many; None follows from `seeds`, `labels` or `grain_map`, else 1.
            labels: (N,) classes, by number or by name; None draws each from its sample's seed. One label serves all.
            grain_map: (N, H/S, W/S) or one (H/S, W/S) for all; None samples maps from the grain transformer (and is
                the finest everywhere where a plain DiT has none).
            budget: share of the tokens to spend, of those of the finest map: 0.25 ... 1.0 (`d2it.models.budget` has the
                shares of the grains that spend it). Sampled maps spend it on average, an image of much detail more than
                another; that takes a Grain Transformer with levels. With `grain_map`, which then may hold any real
                numbers (an entropy, gray levels), every image spends it exactly, to whole regions: the higher a
                region's number the finer it is. None: sampled maps are those of the VAE's thresholds, given ones
                are taken as they are.
            seed: of the first image; image i has seed + i.
            seeds: one for each image, in place of `seed`.
            scheduler: see `d2it.diffusion.SCHEDULERS` (`FLOW_SCHEDULERS` for a model of the linear path); "ddpm"
                ("euler") by default.
            steps: denoising steps of the content; 250 by default.
            grain_scheduler: of the maps; `scheduler` by default, "ddpm" where that one cannot sample maps.
            grain_steps: denoising steps of the maps; `steps` by default.
            guidance: classifier-free guidance of the content, or the guide's; 1 is none.
            grain_guidance: classifier-free guidance of the maps.
            guide: a weaker content transformer whose output takes the place of that without a label (autoguidance,
                Karras et al. 2024): of the same kind, classes, sizes, factors, path and prediction. None is the D2iT's
                own guide, if it has one.
            batch_size: images at once on a GPU; all by default.
            autocast: torch.bfloat16 or torch.float16 for the transformers; None: the dtype of their blocks.
            cuda_graph: capture a step once a batch and replay it, see `d2it.diffusion.sample_content`.
            callback: called with (number of the step, timestep, latents (B, C, Hf, Wf)) after every step of a batch's
                content; on a CPU a batch is one image, and the calls come from several threads.

        Raises:
            ValueError: arguments that do not fit each other or the model, before anything is computed; or images that
                are not finite.
        """
        content = self.content_transformer.config
        scheduler = self._setting("scheduler", scheduler, default_scheduler(content.diffusion))
        steps = self._setting("steps", steps, 250)
        grain_steps = self._setting("grain_steps", grain_steps, steps)
        grain_scheduler = self._setting("grain_scheduler", grain_scheduler, None)
        strength = _guidance("guidance", self._setting("guidance", guidance, 1.0))
        if guide is not None:
            self._check_guide(guide)
            if strength.scale == 1.0:
                raise ValueError("guide has no effect at a guidance of 1: give guidance=...")
        guide = guide if guide is not None else self.guide

        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, got {callback!r}")
        grain_map = None if grain_map is None else as_map(grain_map)
        seeds = None if seeds is None else check_seeds(seeds)
        chosen = None if labels is None else torch.tensor(self.class_numbers(labels), dtype=torch.int64)
        count = self._count(num_images, seeds, chosen, grain_map)
        if seeds is None:
            seeds = check_seeds(range(whole_number("seed", seed, 0), seed + count))
        numbers = self._labels(chosen, seeds)
        if grain_map is None and self.grain_transformer is None:
            if not isinstance(self.content_transformer, DiT):
                raise ValueError("grain_map must be given: this model has no Grain Transformer")
            grain_map = torch.full(self.region_grid, self.num_grains - 1)
        if budget is not None and grain_map is not None:
            grain_map = self._spend(budget, grain_map, seeds)
        check_guidance("guidance", strength, content.in_channels, content, guide is not None)
        process = make_diffusion(content.diffusion, learn_sigma=content.learn_sigma)
        solver = make_scheduler(scheduler, process, steps, learned_range=content.learn_sigma)
        if batch_size is not None:
            whole_number("batch_size", batch_size, 1)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")
        if cuda_graph:
            check_cuda_graph(self.device)
        if autocast is None and self.dtype != torch.float32:
            autocast = self.dtype
        shared: dict[str, Any] = {"autocast": autocast, "cuda_graph": cuda_graph}
        if grain_map is None:
            network: Any = self.grain_transformer
            grain_guide = _guidance("grain_guidance", self._setting("grain_guidance", grain_guidance, 1.0))
            check_guidance("grain_guidance", grain_guide, network.config.levels, network.config)
            shares = self._level_shares(budget) if network.config.has_levels or budget is not None else []
            if grain_scheduler is None:
                grain_scheduler = grain_scheduler_for(scheduler, network.config.diffusion)
            process = make_diffusion(network.config.diffusion, learn_sigma=False)
            grain_solver = make_scheduler(grain_scheduler, process, grain_steps, prediction="sample", of="grain_")

            def maps(part: slice) -> Tensor:
                named = None if numbers is None else numbers[part]
                own_seeds = [derived_seed(s, "grain") for s in seeds[part]]
                found = denoise_grain_maps(network, named, own_seeds, grain_solver, grain_guide, **shared)
                if not network.config.has_levels:
                    return found
                generators = _generators(seeds[part])
                return level_grains(found.cpu(), network.config.levels, shares, generator=generators).to(found.device)
        else:
            given = grain_map.expand(count, *grain_map.shape[-2:])
            check_grain_map(given, count, self)

            def maps(part: slice) -> Tensor:
                return given[part].to(self.device)

        def sample(part: slice) -> tuple[Tensor, Tensor]:
            grains = maps(part)
            latents = denoise_content(
                self.content_transformer,
                None if isinstance(self.content_transformer, DiT) else grains,
                None if numbers is None else numbers[part],
                [derived_seed(s, "content") for s in seeds[part]],
                solver,
                strength,
                guide=guide,
                callback=callback,
                **shared,
            )
            return self.vae.decode(latents / self.vae.scaling_factor, grains).float().cpu(), grains.cpu()

        if self.device.type == "cpu":
            sampled = _side_by_side(sample, [slice(i, i + 1) for i in range(count)], compiled=self._compiled)
        else:
            size = batch_size or max(1, count)
            sampled = [sample(slice(first, first + size)) for first in range(0, count, size)]
        if not sampled:
            empty = torch.empty(0, *self.region_grid, dtype=torch.int64)
            return Samples(torch.empty(0, 3, *self.image_size), empty, numbers)
        images, grain_maps = map(torch.cat, zip(*sampled))
        if not images.isfinite().all():
            raise ValueError("the images are not finite: a guidance too strong for this model, or damaged weights")
        return Samples(images, grain_maps, numbers)

    def _setting(self, name: str, given: Any, otherwise: Any) -> Any:
        """An argument of a call: as given, else this model's own default, else that of all models."""
        return given if given is not None else self.sampling.get(name, otherwise)

    def token_shares(self, grain_maps: Tensor) -> Tensor:
        """(N,) float64: the budget that each map spends, its tokens over those of the finest map; 1 for a plain DiT."""
        if isinstance(self.content_transformer, DiT):
            return torch.ones(len(grain_maps), dtype=torch.float64)
        tokens = torch.tensor(grain_tokens(self.content_transformer.config), dtype=torch.float64)
        return tokens[grain_maps.cpu()].flatten(1).mean(dim=1) / tokens[-1]

    def _shares(self, budget: float) -> list[float]:
        """The shares of the grains that spend a budget; ValueError where none do."""
        if isinstance(self.content_transformer, DiT):
            raise ValueError("budget: a plain DiT spends all tokens on every image")
        return shares_of(budget, grain_tokens(self.content_transformer.config))

    def _level_shares(self, budget: float | None) -> list[float]:
        """The shares of the grains in sampled maps; ValueError for a Grain Transformer of one budget alone."""
        assert self.grain_transformer is not None
        config = self.grain_transformer.config
        if budget is None and config.edges:
            return shares_above(np.array(config.edges), cast(DynamicVAE, self.vae).config.thresholds)
        if budget is None:
            raise ValueError("budget must be given: this model's Grain Transformer has no edges, hence no default")
        shares = self._shares(budget)
        if not config.has_levels:
            raise ValueError(
                "budget: this model's Grain Transformer samples the grains at one budget: train it with levels of the "
                "entropy (grain.overrides.levels=16), or give the maps (a drawing or a photo)"
            )
        return shares

    def _spend(self, budget: float, values: Tensor, seeds: Sequence[int]) -> Tensor:
        """The maps (N, h, w) in which the regions of the highest values are the finest, at this budget."""
        shares, given = self._shares(budget), values
        expected = self.region_grid
        if tuple(given.shape[-2:]) != expected:
            raise ValueError(f"grain_map must be (N, {expected[0]}, {expected[1]}), got {tuple(given.shape)}")
        if given.is_complex() or not given.double().isfinite().all():
            raise ValueError("grain_map must hold finite real numbers where a budget is given")
        given = given.cpu().expand(len(seeds), *expected)
        return ranked_grains(given, shares, generator=_generators(seeds))

    def class_numbers(self, labels: Label | Sequence[Label] | Tensor) -> list[int]:
        """The numbers of classes that are given by number or by name.

        Raises:
            ValueError: a class that the model does not have, where the message lists similar names, or a name of
                several.
        """
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.reshape(-1).tolist()
        elif isinstance(labels, str) or not isinstance(labels, Iterable):
            labels = [labels]
        return [class_number(label, self.class_names or [], self.num_classes) for label in labels]

    def _count(
        self, num_images: int | None, seeds: Sequence[int] | None, labels: Tensor | None, grain_map: Tensor | None
    ) -> int:
        """The number of images that the arguments ask for; ValueError where they disagree."""
        counts = {"num_images": num_images, "seeds": None if seeds is None else len(seeds)}
        if labels is not None and len(labels) != 1:
            counts["labels"] = len(labels)
        if grain_map is not None and grain_map.ndim == 3 and len(grain_map) != 1:
            counts["grain_map"] = len(grain_map)
        given = {k: v for k, v in counts.items() if v is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"the number of images must agree, got {', '.join(f'{k}: {v}' for k, v in given.items())}")
        return whole_number("num_images", next(iter(given.values()), 1), 0)

    def _labels(self, labels: Tensor | None, seeds: Sequence[int]) -> Tensor | None:
        if not self.num_classes:
            return None
        if labels is None:
            return torch.tensor([derived_seed(s, "label") % self.num_classes for s in seeds], dtype=torch.int64)
        return labels.expand(len(seeds))


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator for each image's map, on the CPU, for what its values leave open."""
    return [torch.Generator().manual_seed(derived_seed(seed, "budget")) for seed in seeds]


def _read_guide(path: Path) -> DynamicContentTransformer | DiT:
    """Reads a content transformer from its own folder, or from that of a D2iT or a run."""
    part = "content_transformer"
    path = path if (path / CONFIG_FILE).is_file() else path / part
    guide: Any = saved_kind(path, PARTS[part]).from_pretrained(path)
    return guide


def has_parts(path: str | Path) -> bool:
    """Whether all parts that a D2iT needs are in the folder `path`."""
    path = Path(path)
    needed = {"vae", "content_transformer"}
    if saved_kind(path / "content_transformer", PARTS["content_transformer"]) is not DiT:
        needed.add("grain_transformer")
    return all((path / name).is_dir() for name in needed)


def _description(names: Any, sampling: Any, classes: int) -> tuple[list[str] | None, dict[str, Any]]:
    """Class names and defaults, checked: they may come from a file."""
    if names is not None and (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or len(names) != classes
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"class_names must be None or {classes} names, one for each class, got {names!r}")
    if not isinstance(sampling, (dict, type(None))) or set(sampling or {}) - set(DEFAULTS):
        raise ValueError(f"sampling must be a dictionary with keys of {', '.join(DEFAULTS)}, got {sampling!r}")
    for name in {"guidance", "grain_guidance"} & set(sampling or {}):
        _guidance(name, (sampling or {})[name])
    return None if names is None else list(names), dict(sampling or {})


def _guidance(name: str, value: float | Guidance | dict[str, Any]) -> Guidance:
    """A dictionary comes from d2it.json."""
    if isinstance(value, Guidance):
        return value
    try:
        return Guidance(**value) if isinstance(value, dict) else Guidance(scale=value)
    except TypeError:
        raise ValueError(f"{name} must be a number or the fields of a Guidance, got {value!r}") from None
    except ValueError as error:
        raise ValueError(str(error).replace("guidance", name, 1)) from None


def _side_by_side(run: Callable[[T], R], parts: Sequence[T], *, compiled: bool) -> list[R]:
    """`run` of every part in order, each on one thread of the CPU, as many at a time as torch has threads.

    `compiled`: whether the blocks are. The others then wait for the first, whose graphs they share: threads that
    compile at the same time make each graph more than once. Dynamo's checks of its graphs are not made for threads,
    either: now and then it makes one more. Its limit, of which each thread has its own, is not meant for those.
    """

    def alone(part: T) -> R:
        limit = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS) if compiled else contextlib.nullcontext()
        with torch.no_grad(), limit:  # which every thread has of its own
            return run(part)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            head = 1 if compiled else 0
            return [*pool.map(alone, parts[:head]), *pool.map(alone, parts[head:])]
    finally:
        torch.set_num_threads(threads)
