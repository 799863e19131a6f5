"""The networks whose features samples are compared by: Inception, EfficientNet-Lite, or a vision model on disk.

Frechet distances of one network mean nothing beside those of another: only Inception's are FID.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it.errors import UserError, user_error
from d2it.evaluation.inception import Features, Inception
from d2it.files import read_json, sha256_of
from d2it.models.efficientnet import LITE, efficientnet_lite

EXTRACTORS = ("inception", *LITE)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with its ImageNet head, from images (B, 3, H, W) uint8 to `Features`, float32.

    Images are resized to the network's own side, bicubic with antialiasing, and scaled as (x - 127) / 128, as the
    TensorFlow graphs were trained. The features are the 1280 channels of the last layer, averaged over the image.

    Args:
        name: a key of `LITE`.
        side: pixels that images are resized to; None is the network's own. A smaller one is faster, for small images;
            its distances are no others', so it becomes part of the name.

    Attributes:
        name: as given.
        settings: what a report must state about it.

    Raises:
        UserError: the packages are not installed.
    """

    def __init__(self, name: str, side: int | None = None) -> None:
        super().__init__()
        with user_error("--extractor"):
            self.network, path = efficientnet_lite(name)
        self.side = LITE[name][2] if side is None else side
        self.eval()
        self.name = name if side is None else f"{name} at {side}"
        self.settings = {"weights_sha256": sha256_of(path), "resize": f"bicubic {self.side}, antialiased"}

    def forward(self, images: Tensor) -> Features:
        x = (_resized(images, (self.side, self.side)) - 127) / 128
        pool = self.network.extract_features(x).mean(dim=(2, 3))
        return Features(pool, None, self.network._fc(pool).softmax(dim=1))


class LocalModel(nn.Module):
    """A vision model of transformers, DINOv2 for one, from images (B, 3, H, W) uint8 to `Features`, float32.

    The features are the model's pooled output, or the class token of the last layer where it has none. Size, mean and
    deviation of the images come from the folder's `preprocessor_config.json`. Only safetensors are loaded, and no code.

    Args:
        path: of the folder, as `save_pretrained` writes it.

    Attributes:
        name: the architecture and the first digits of the weights' hash.
        settings: what a report must state about it.

    Raises:
        UserError: no such model there, or transformers is not installed.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(path)
        kind = read_json(folder / "config.json").get("model_type")
        weights = folder / "model.safetensors"
        if not isinstance(kind, str) or not weights.is_file():
            raise UserError(f"--extractor {path}: not a folder of transformers (config.json, model.safetensors)")
        self.size, mean, deviation = _preprocessing(folder / "preprocessor_config.json")
        try:
            from transformers import AutoModel
        except ImportError:
            raise UserError(f"--extractor {path} needs transformers: pip install transformers") from None
        with user_error(f"--extractor {path}", (Exception,)):  # of many kinds, over a folder that does not fit together
            self.network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)
        digest = sha256_of(weights)
        self.name = f"{kind} {digest[:8]}"
        size = f"{self.size[0]} x {self.size[1]}"
        self.settings = {"weights_sha256": digest, "resize": f"bicubic {size}, antialiased"}

    def forward(self, images: Tensor) -> Features:
        x = (_resized(images, self.size) / 255 - self.mean) / self.deviation
        output = self.network(pixel_values=x)
        pool = getattr(output, "pooler_output", None)
        pool = output.last_hidden_state[:, 0] if pool is None else pool.flatten(1)
        return Features(pool.float(), None, None)


def open_extractor(
    name: str, *, inception: str | None = None, any_inception: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Loads an extractor.

    Args:
        name: one of `EXTRACTORS`, or the path of a folder for `LocalModel`.
        inception: the file of Inception's weights.
        any_inception: take weights of another hash.

    Returns:
        The extractor (on the CPU), and what a report must state about it.

    Raises:
        UserError: no weights, other weights, or a package that is not installed.
    """
    if name == "inception":
        model = Inception.from_file(inception, sha256=None) if any_inception else Inception.from_file(inception)
        return model, {"inception_sha256": sha256_of(str(inception)), "resize": "bilinear 299, as TensorFlow 1"}
    if inception is not None:
        raise UserError(f"--inception goes with --extractor inception, not with {name}")
    if name not in LITE and not os.path.isdir(name):
        raise UserError(f"--extractor {name}: no such folder; known are {', '.join(EXTRACTORS)}")
    other: EfficientNetLite | LocalModel = EfficientNetLite(name) if name in LITE else LocalModel(name)
    return other, {"extractor": other.name, **other.settings}


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    x = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 255)


def _preprocessing(path: Path) -> tuple[tuple[int, int], list[float], list[float]]:
    """Returns (height, width), mean and deviation of a model's images."""
    fields = read_json(path)
    try:
        size = fields["crop_size"] if fields.get("do_center_crop") else fields["size"]
        if isinstance(size, dict):
            height, width = (
                (size[key] for key in ("height", "width")) if "height" in size else [size["shortest_edge"]] * 2
            )
        else:
            height, width = size, size
        mean, deviation = fields["image_mean"], fields["image_std"]
        if not all(isinstance(side, int) and 0 < side <= 4096 for side in (height, width)):
            raise ValueError(f"images of {height} x {width}")
        if len(mean) != 3 or len(deviation) != 3 or min(deviation) <= 0:
            raise ValueError("mean and deviation of three channels are needed")
        return (height, width), [float(m) for m in mean], [float(d) for d in deviation]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: size, image_mean or image_std is missing or damaged ({error})") from None
