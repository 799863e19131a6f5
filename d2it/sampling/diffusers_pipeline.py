"""A D2iT as a pipeline of diffusers.

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("runs/demo", custom_pipeline="runs/demo", trust_remote_code=True)
    image = pipe(class_labels="cat", generator=torch.manual_seed(0)).images[0]

Every saved D2iT has the two files that this needs, `model_index.json` and `pipeline.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from d2it import pictures
from d2it.diffusion import Guidance
from d2it.diffusion.sampling import as_map
from d2it.diffusion.solvers import whole_number
from d2it.sampling.pipeline import D2iT, Label

Generators = torch.Generator | list[torch.Generator] | None


class D2iTComponent(ModelMixin):
    """The networks of a D2iT as the one component of a pipeline, which moves and saves them.

    `ModelMixin` is the sign by which diffusers knows what it can load; reading and writing are `D2iT`'s.
    """

    def __init__(self, d2it: D2iT) -> None:
        super().__init__()
        self.d2it = d2it
        for name, part in d2it.parts.items():
            self.add_module(name, part)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> D2iTComponent:
        """Reads a D2iT; `torch_dtype` is that of the weights of the transformers' blocks."""
        return cls(D2iT.from_pretrained(path, local_files_only=True, dtype=torch_dtype or torch.float32))

    def save_pretrained(self, path: str, **_: Any) -> None:  # type: ignore[override]
        self.d2it.save_pretrained(path)

    def to(self, *args: Any, **kwargs: Any) -> D2iTComponent:  # type: ignore[override]
        """Moves the parts, and casts the transformers' blocks alone, as `D2iT.to` does."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self.d2it.to(device, dtype)
        return self


@dataclass
class D2iTPipelineOutput(BaseOutput):
    """What a call returns.

    Args:
        images: PIL images, or an array (N, H, W, 3) or a tensor (N, 3, H, W) in [0, 1].
        grain_maps: (N, H/S, W/S) int64, 0 = coarsest.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    grain_maps: Tensor


class D2iTPipeline(DiffusionPipeline):
    """A D2iT behind the interface of diffusers' pipelines.

    Args:
        d2it: the networks (`D2iTComponent`), or a `D2iT`.

    Example:
        >>> pipe = D2iTPipeline(D2iT.from_pretrained("runs/demo"))
        >>> pipe(class_labels=[0, 3], num_inference_steps=20, guidance_scale=1.5).images
    """

    def __init__(self, d2it: D2iTComponent | D2iT) -> None:
        super().__init__()
        self.register_modules(d2it=D2iTComponent(d2it) if isinstance(d2it, D2iT) else d2it)

    @property
    def model(self) -> D2iT:
        """The D2iT itself."""
        return self.d2it.d2it

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes the D2iT as `D2iT.save_pretrained` does; the folder is read by this class and by `D2iT`."""
        self.model.save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | None = None,
        num_images: int | None = None,
        grain_map: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Guidance | None = None,
        scheduler: str | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Tensor]], Any] | None = None,
    ) -> D2iTPipelineOutput | tuple[Any, Tensor]:
        """Samples images.

        Args:
            class_labels: classes by number or name, one for each image; None draws them.
            num_images: how many; None follows from `class_labels`, `generator` or `grain_map`, else 1.
            grain_map: (N, H/S, W/S) or (H/S, W/S) int64, 0 = coarsest; None samples maps.
            num_inference_steps, guidance_scale, scheduler: `steps`, `guidance` and `scheduler` of `D2iT.__call__`; the
                model's own where None.
            generator: one for all images, or one for each, on the CPU; each image's seed is drawn from it. None draws
                from torch's own.
            output_type: "pil", "np" or "pt".
            return_dict: False returns (images, grain_maps).
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": (B, C, Hf, Wf)}) after every step
                of a batch; on a CPU a batch is one image. What it returns is not used.

        Raises:
            ValueError: as `D2iT.__call__`, or an unknown `output_type`.
            TypeError: no generators, a callback that cannot be called, or a map of no numbers.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise TypeError(f"callback_on_step_end must be callable, got {callback_on_step_end!r}")
        model = self.model
        labels = None if class_labels is None else model.class_numbers(class_labels)
        several = [len(x) for x in (labels, generator) if isinstance(x, list) and len(x) != 1]
        grain_map = None if grain_map is None else as_map(grain_map)
        if grain_map is not None and grain_map.ndim == 3 and len(grain_map) != 1:
            several.append(len(grain_map))
        count = next(iter(several), 1) if num_images is None else whole_number("num_images", num_images, 0)
        given: dict[str, Any] = {"steps": num_inference_steps, "guidance": guidance_scale, "scheduler": scheduler}
        steps = model.sampling.get("steps", 250) if num_inference_steps is None else num_inference_steps
        steps = whole_number("num_inference_steps", steps, 1, 1000)
        batches = count if model.device.type == "cpu" else 1
        turn = threading.Lock()  # on a CPU images are sampled side by side

        with self.progress_bar(total=steps * batches) as bar:

            def step_done(step: int, timestep: float, latents: Tensor) -> None:
                with turn:
                    bar.update()
                    if callback_on_step_end is not None:
                        callback_on_step_end(self, step, timestep, {"latents": latents})

            samples = model(
                count, labels=labels, grain_map=grain_map, seeds=_seeds(generator, count), callback=step_done, **given
            )
        images: Any = samples.uint8()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        elif output_type == "np":
            images = images.astype(np.float32) / 255
        else:
            images = pictures.to_uint8(samples.images).float() / 255
        return D2iTPipelineOutput(images, samples.grain_maps) if return_dict else (images, samples.grain_maps)


def _seeds(generator: Generators, count: int) -> list[int]:
    generators: list[Any] = generator if isinstance(generator, list) else [generator]
    for each in generators:
        if each is not None and (not isinstance(each, torch.Generator) or each.device.type != "cpu"):
            where = f" on {each.device}" if isinstance(each, torch.Generator) else ""
            raise TypeError(f"generator must be one or several torch.Generator on the CPU, got {each!r}{where}")
    if len(generators) not in (1, count):
        raise ValueError(f"generator must be one, or one for each of the {count} images, got {len(generators)}")
    each = generators if len(generators) == count else generators * count
    return [int(torch.randint(2**63 - 1, (), generator=g)) for g in each]
