"""D2iT as one thing: labels in, images and grain maps out (section 3.2: map first, then content, then the decoder).

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

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from d2it.diffusion import (
    GaussianDiffusion,
    Guidance,
    make_scheduler,
    sample_content,
    sample_grain_maps,
)
from d2it.diffusion.sampling import check_grain_map, check_guidance
from d2it.diffusion.solvers import grain_scheduler_for
from d2it.files import atomic_write
from d2it.models.base import Model, PyTorchModelHubMixin, local_folder, saved_kind
from d2it.models.content import DynamicContentTransformer
from d2it.models.dit import DiT
from d2it.models.dvae import DynamicVAE
from d2it.models.grain import DynamicGrainTransformer
from d2it.models.klvae import KLVAE
from d2it.models.layers import Modulation
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


@dataclass(frozen=True)
class Samples:
    """Pictures with their grain maps, on the CPU.

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
        return to_uint8(self.images)


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8; values outside are clipped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


class D2iT(PyTorchModelHubMixin):
    """A DynamicVAE, a Dynamic Grain Transformer and a Dynamic Content Transformer that fit each other.

    The baseline is sampled in the same way: a plain `DiT` as `content_transformer`, over a DynamicVAE (of one grain,
    the preset "f8", as a rule) or over the `KLVAE` of DiT's released weights. It needs no Grain Transformer; the grain
    map then tells the decoder alone what it decodes, and is the finest everywhere unless given or sampled.

    Args:
        grain_transformer: None: every call must give its grain maps, or the content is a plain DiT's.
        class_names: one for each class, or None.
        sampling: arguments of `__call__` that this model is best sampled with; a call's own arguments win.

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
    ) -> None:
        self.vae, self.grain_transformer, self.content_transformer = vae, grain_transformer, content_transformer
        self.class_names = list(class_names) if class_names is not None else None
        self.sampling = dict(sampling or {})
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
        return self.content_transformer.transformer_blocks()[0].attn.qkv.weight.dtype  # type: ignore[union-attr,return-value]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> D2iT:
        """Move all parts to `device`, and the weights of the transformers' blocks to `dtype`, in place.

        What lies outside the blocks, the modulations in them and the VAE stay float32: little memory and time, and
        their rounding would reach every token.
        """
        for part in self._parts.values():
            part.to(device)
        if dtype is not None:
            for transformer in self._transformers:
                for block in transformer.transformer_blocks():
                    block.to(dtype)
                    for module in block.modules():
                        if isinstance(module, Modulation):
                            module.float()
        return self

    def compile(self, **kwargs: Any) -> D2iT:
        """torch.compile of the transformers' blocks, in place; `kwargs` are those of torch.compile.

        The blocks of a transformer share their compiled code. It is made in the first call, and again where the number
        of images in a batch changes.
        """
        for transformer in self._transformers:
            transformer.compile_blocks(**kwargs)
        return self

    @property
    def _parts(self) -> dict[str, Model]:
        parts: dict[str, Model | None] = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def _transformers(self) -> list[Model]:
        return [part for name, part in self._parts.items() if name != "vae"]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = True,
        revision: str | None = None,
    ) -> D2iT:
        """Read what `save_pretrained`, or a training run, wrote to a folder.

        Args:
            pretrained_model_name_or_path: a local folder; with `local_files_only=False` also a repository of the
                Hugging Face hub, to which the other named arguments apply.
            dtype: of the weights of the transformers' blocks, see `to`; torch.bfloat16 halves their memory.

        Raises:
            ValueError: no such folder, no D2iT in it, or a part of another model.
        """
        path = Path(pretrained_model_name_or_path)
        if not local_files_only:
            download = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, "token": token}
            path = Path(local_folder(pretrained_model_name_or_path, cls.__name__, **download))
        try:
            description = json.loads((path / DESCRIPTION).read_text())
            names, sampling = description["class_names"], description["sampling"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"path must be a folder with a trained D2iT, got {str(path)!r}: no {DESCRIPTION}"
            ) from None
        return cls.from_parts(path, class_names=names, sampling=sampling).to(device, dtype)

    @classmethod
    def from_parts(cls, path: str | Path, **settings: Any) -> D2iT:
        """Read the parts in the folder `path`; `settings` are those of a new D2iT.

        Raises:
            ValueError: a part that is missing, of another model, or does not fit the others.
        """
        path = Path(path)
        given = {name: kinds for name, kinds in PARTS.items() if name != "grain_transformer" or (path / name).is_dir()}
        read = {name: saved_kind(path / name, kinds).from_pretrained(path / name) for name, kinds in given.items()}
        parts: dict[str, Any] = {"grain_transformer": None, **read}
        return cls(**parts, **settings)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json and safetensors of every part, and the description; each file by rename.

        Keyword arguments are those of `huggingface_hub.ModelHubMixin.save_pretrained` and matter only with
        `push_to_hub=True`.
        """
        path = Path(save_directory)
        for name, part in self._parts.items():
            part.save_pretrained(path / name)
        self.save_description(path)
        if kwargs.pop("push_to_hub", False):
            return self.push_to_hub(repo_id=kwargs.pop("repo_id", None) or path.name, **kwargs)
        return None

    def save_description(self, path: str | Path) -> None:
        """Write what belongs to no part, into a folder that has the parts."""
        path = Path(path)
        description = {"class_names": self.class_names, "sampling": self.sampling}
        with atomic_write(path / DESCRIPTION) as partial:
            partial.write_text(json.dumps(description, indent=2))

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        *,
        labels: Sequence[int] | Tensor | None = None,
        grain_map: Tensor | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        grain_scheduler: str | None = None,
        grain_steps: int | None = None,
        guidance: float | Guidance | None = None,
        grain_guidance: float | Guidance | None = None,
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        cuda_graph: bool = False,
    ) -> Samples:
        """Sample.

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

        Args:
            num_images: how many; None follows from `seeds`, `labels` or `grain_map`, else 1.
            labels: (N,) classes; None draws each from its sample's seed. One label serves all.
            grain_map: (N, H/S, W/S) or one (H/S, W/S) for all; None samples maps from the grain transformer (and is
                the finest everywhere where a plain DiT has none).
            seed: of the first image; image i has seed + i.
            seeds: one for each image, in place of `seed`.
            scheduler: see `d2it.diffusion.SCHEDULERS`; "ddpm" by default.
            grain_scheduler: of the maps; `scheduler` by default, "ddpm" where that one cannot sample maps.
            steps, grain_steps: denoising steps of content and map; 250 by default, and `steps`.
            guidance, grain_guidance: classifier-free guidance of content and map; 1 is none.
            batch_size: images at once on a GPU; all by default.
            autocast: torch.bfloat16 for the transformers; None: the dtype of their blocks.
            cuda_graph: capture a step once a batch and replay it, see `d2it.diffusion.sample_content`.

        Raises:
            ValueError: arguments that do not fit each other or the model; nothing has been computed then.
        """
        own = self.sampling
        scheduler = scheduler if scheduler is not None else own.get("scheduler", "ddpm")
        steps = steps if steps is not None else own.get("steps", 250)
        grain_steps = grain_steps if grain_steps is not None else own.get("grain_steps", steps)
        grain_scheduler = grain_scheduler if grain_scheduler is not None else own.get("grain_scheduler")
        if grain_scheduler is None:
            grain_scheduler = grain_scheduler_for(scheduler)
        guide = _guidance(guidance if guidance is not None else own.get("guidance", 1.0))
        grain_guide = _guidance(grain_guidance if grain_guidance is not None else own.get("grain_guidance", 1.0))

        labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
        count = self._count(num_images, seeds, labels, grain_map)
        seeds = list(seeds) if seeds is not None else [seed + i for i in range(count)]
        labels = self._labels(labels, seeds)
        if grain_map is None and self.grain_transformer is None:
            if not isinstance(self.content_transformer, DiT):
                raise ValueError("grain_map must be given: this model has no Grain Transformer")
            grain_map = torch.full(self.region_grid, self.num_grains - 1)
        check_guidance(guide, self.content_transformer.config.in_channels, self.num_classes)
        make_scheduler(scheduler, GaussianDiffusion(), steps)
        if grain_map is None:
            check_guidance(grain_guide, self.num_grains, self.num_classes)
            make_scheduler(grain_scheduler, GaussianDiffusion(), grain_steps, prediction="sample")
        else:
            grain_map = torch.as_tensor(grain_map)
            if grain_map.ndim not in (2, 3):
                raise ValueError(f"grain_map must be (N, H/S, W/S) or (H/S, W/S), got {tuple(grain_map.shape)}")
            grain_map = grain_map.expand(count, *grain_map.shape[-2:])
            check_grain_map(grain_map, count, self)
        if autocast is None and self.dtype != torch.float32:
            autocast = self.dtype
        shared: dict[str, Any] = {"autocast": autocast, "cuda_graph": cuda_graph}

        def draw(part: slice) -> tuple[Tensor, Tensor]:
            named = None if labels is None else labels[part]
            if grain_map is None:
                assert self.grain_transformer is not None
                grains = sample_grain_maps(
                    self.grain_transformer,
                    named,
                    seeds=[derived_seed(s, "grain") for s in seeds[part]],
                    scheduler=grain_scheduler,
                    steps=grain_steps,
                    guidance=grain_guide,
                    **shared,
                )
            else:
                grains = grain_map[part].to(self.device)
            latents = sample_content(
                self.content_transformer,
                None if isinstance(self.content_transformer, DiT) else grains,
                named,
                seeds=[derived_seed(s, "content") for s in seeds[part]],
                scheduler=scheduler,
                steps=steps,
                guidance=guide,
                **shared,
            )
            return self.vae.decode(latents / self.vae.scaling_factor, grains).float().cpu(), grains.cpu()

        if self.device.type == "cpu":
            drawn = _side_by_side(draw, [slice(i, i + 1) for i in range(count)])
        else:
            size = batch_size or max(1, count)
            drawn = [draw(slice(first, first + size)) for first in range(0, count, size)]
        if not drawn:
            empty = torch.empty(0, *self.region_grid, dtype=torch.int64)
            return Samples(torch.empty(0, 3, *self.image_size), empty, labels)
        images, maps = zip(*drawn)
        return Samples(torch.cat(images), torch.cat(maps), labels)

    def _count(
        self, num_images: int | None, seeds: Sequence[int] | None, labels: Tensor | None, grain_map: Tensor | None
    ) -> int:
        """How many images the arguments ask for, or a ValueError where they disagree."""
        named = {"num_images": num_images, "seeds": None if seeds is None else len(seeds)}
        if labels is not None and len(labels) != 1:
            named["labels"] = len(labels)
        if grain_map is not None and grain_map.ndim == 3 and len(grain_map) != 1:
            named["grain_map"] = len(grain_map)
        given = {k: v for k, v in named.items() if v is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"the number of images must agree, got {', '.join(f'{k}: {v}' for k, v in given.items())}")
        count = next(iter(given.values()), 1)
        if count < 0:
            raise ValueError(f"num_images must be 0 or more, got {count}")
        return count

    def _labels(self, labels: Tensor | None, seeds: Sequence[int]) -> Tensor | None:
        if not self.num_classes:
            if labels is not None:
                raise ValueError("labels must be None: this model is unconditional")
            return None
        if labels is None:
            return torch.tensor([derived_seed(s, "label") % self.num_classes for s in seeds], dtype=torch.int64)
        if bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ValueError(f"labels must be in 0 ... {self.num_classes - 1}, got {labels.tolist()}")
        return labels.expand(len(seeds))


def has_parts(path: str | Path) -> bool:
    """Whether all parts that a D2iT needs are in the folder `path`."""
    path = Path(path)
    needed = {"vae", "content_transformer"}
    if saved_kind(path / "content_transformer", PARTS["content_transformer"]) is not DiT:
        needed.add("grain_transformer")
    return all((path / name).is_dir() for name in needed)


def _guidance(value: float | Guidance) -> Guidance:
    return value if isinstance(value, Guidance) else Guidance(scale=float(value))


def _side_by_side(draw: Callable[[T], R], parts: Iterable[T]) -> list[R]:
    """`draw` of every part in order, each on one thread of the CPU, as many at a time as torch has threads."""

    def alone(part: T) -> R:
        with torch.no_grad():  # which every thread has of its own
            return draw(part)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(threads)
