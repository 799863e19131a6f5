"""LPIPS (Zhang et al. 2018): distance of VGG-16 features, weighted by learned heads. Weights come from local files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it.errors import reason_of
from d2it.files import load_saved, sha256_of
from d2it.models.layers import without_autocast

#: VGG-16 up to relu5_3: convolutions by width, "pool" between the five stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
#: The convolutions' places in torchvision's `vgg16().features`, stage by stage.
FEATURE_INDEX = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

#: SHA-256, or its first digits that the file carries in its name -> the file.
KNOWN = {
    "397923af": "torchvision's vgg16-397923af.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868": "the heads vgg.pth of LPIPS v0.1",
}
WHERE = (
    "download https://download.pytorch.org/models/vgg16-397923af.pth and "
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth into a folder of their "
    "own and give its path"
)


class LPIPS(nn.Module):
    """(B, 3, H, W) twice, in [-1, 1] -> (B,) float32. Frozen, always in evaluation mode, computed in float32.

    `LPIPS.from_path` reads the weights; a new object has random ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        channels = 3
        for widths in STAGES:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.convolutions.append(stage)
        self.heads = nn.ParameterList(nn.Parameter(torch.rand(widths[-1])) for widths in STAGES)
        # ImageNet's statistics for images in [-1, 1], as the reference implementation states them.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of images in [-1, 1]."""
        h = (images.float() - self.mean) / self.std
        out = []
        for i, stage in enumerate(self.convolutions):
            if i:
                h = F.max_pool2d(h, 2)
            for convolution in stage.children():
                h = F.relu(convolution(h))
            out.append(h)
        return out

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        with without_autocast(first.device):
            distance = torch.zeros(first.shape[0], device=first.device)
            for a, b, head in zip(self.features(first), self.features(second), self.heads):
                difference = (_unit(a) - _unit(b)).square()
                distance = distance + torch.einsum("bchw,c->bhw", difference, head).mean(dim=(1, 2))
        return distance

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], *, check: bool = True) -> LPIPS:
        """Reads weights from `path`: a file, or every .pth, .pt and .safetensors file of a folder.

        Together they hold torchvision's VGG-16 (`features.0.weight` ...) and the heads of LPIPS v0.1 for VGG
        (`lin0.model.1.weight` ...), or, where `check` is False, the whole LPIPS module of the reference implementation
        (`net.slice1.0.weight` ...). Pickles are read with `weights_only=True`.

        Args:
            check: whether every file must have the hash of a released one.

        Raises:
            ValueError: nothing there, another hash, unreadable, or a weight missing or of another shape.
        """
        files = lpips_files(path)
        for file in files if check else ():
            found = sha256_of(file)
            if not any(found.startswith(digits) for digits in KNOWN):
                raise ValueError(
                    f"{file}: SHA-256 {found[:8]}... is neither that of {' nor of '.join(KNOWN.values())}; {WHERE}"
                )
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read(file)
        model = cls()
        model.load_state_dict(convert_lpips(tensors, model.state_dict(), source=str(path)))
        return model.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays frozen."""
        return super().train(False)


def lpips_files(path: str | os.PathLike[str]) -> list[Path]:
    """The weight files at `path`; ValueError where there is none, with where to get them."""
    root = Path(path)
    kinds = (".pth", ".pt", ".safetensors")
    files = sorted(f for f in root.iterdir() if f.suffix in kinds) if root.is_dir() else [root]
    if not files or not all(f.is_file() for f in files):
        raise ValueError(f"no LPIPS weights at {str(path)!r}, no {', '.join(kinds)} file; {WHERE}")
    return files


def convert_lpips(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The state of an `LPIPS` from torchvision's and LPIPS' own names; ValueError where one is missing."""
    numbers = {n: (i, j) for i, row in enumerate(FEATURE_INDEX) for j, n in enumerate(row)}
    state = {}
    for name, tensor in tensors.items():
        feature = re.fullmatch(r"(?:.*\.)?(?:features|net\.slice\d)\.(\d+)\.(weight|bias)", name)
        head = re.fullmatch(r"(?:.*\.)?lins?\.?(\d)\.model\.\d\.weight", name)
        if feature and int(feature[1]) in numbers:
            i, j = numbers[int(feature[1])]
            state[f"convolutions.{i}.{j}.{feature[2]}"] = tensor
        elif head:
            state[f"heads.{int(head[1])}"] = tensor.flatten()
    for name, own in wanted.items():
        if name not in state or state[name].shape != own.shape:
            got = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
            raise ValueError(f"{source} is not LPIPS with VGG-16: {name} {tuple(own.shape)} is {got}")
    return state


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read as weights: {reason_of(error)}") from None
    state = load_saved(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} must hold a state dict, got {type(state).__name__}")
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def _unit(x: Tensor) -> Tensor:
    """Unit length along the channels, 1e-10 added to the length as in the reference implementation."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
