"""The Inception network that FID is defined by, from a file, with the resize that FID is defined by.

The network is the 2015 TensorFlow graph of the Inception Score and FID papers as ported to PyTorch by pytorch-fid and
torch-fidelity; their weight file (`pt_inception-2015-12-05-6726825d.pth`) loads as it is. It differs from torchvision's
Inception v3 in three pooling layers. Spatial features and logits are those of ADM's evaluator: the first 7 channels of
`mixed_6/conv` (sFID) and the softmax without its bias (Inception Score).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2it.errors import UserError, reason_of
from d2it.files import load_saved, sha256_of

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"  # the first digits, which the file carries in its name
WHERE = (
    f"download {WEIGHTS_NAME} from the releases of https://github.com/mseitzer/pytorch-fid "
    "(or weights-inception-2015-12-05-6726825d.pth from https://github.com/toshas/torch-fidelity) and give its path"
)


class Features(NamedTuple):
    """What a network makes of one batch of images.

    Args:
        pool: (B, D), averaged over the image; 2048 of Inception.
        spatial: (B, 2023) of Inception, for sFID; None of other networks.
        probabilities: (B, classes); 1008 of Inception, 1000 of ImageNet's classes in their usual order of others; None
            of a network without a head.
    """

    pool: Tensor
    spatial: Tensor | None
    probabilities: Tensor | None


class _Conv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], **options: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **options)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # The TensorFlow graph averages over the pixels that exist; torchvision's network counts the padding.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(in_channels, 64, 1)
        self.branch5x5_1 = _Conv(in_channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), five, three, self.branch_pool(_average(x))), 1)


class _BlockB(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)), 1)


class _BlockC(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, tall = {"kernel_size": (1, 7), "padding": (0, 3)}, {"kernel_size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, channels, 1)
        self.branch7x7_2 = _Conv(channels, channels, **wide)  # type: ignore[arg-type]
        self.branch7x7_3 = _Conv(channels, 192, **tall)  # type: ignore[arg-type]
        self.branch7x7dbl_1 = _Conv(768, channels, 1)
        self.branch7x7dbl_2 = _Conv(channels, channels, **tall)  # type: ignore[arg-type]
        self.branch7x7dbl_3 = _Conv(channels, channels, **wide)  # type: ignore[arg-type]
        self.branch7x7dbl_4 = _Conv(channels, channels, **tall)  # type: ignore[arg-type]
        self.branch7x7dbl_5 = _Conv(channels, 192, **wide)  # type: ignore[arg-type]
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), seven, double, self.branch_pool(_average(x))), 1)


class _BlockD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))  # type: ignore[arg-type]
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))  # type: ignore[arg-type]
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((three, seven, F.max_pool2d(x, 3, stride=2)), 1)


class _BlockE(nn.Module):
    def __init__(self, in_channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Conv(in_channels, 320, 1)
        self.branch3x3_1 = _Conv(in_channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))  # type: ignore[arg-type]
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))  # type: ignore[arg-type]
        self.branch3x3dbl_1 = _Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))  # type: ignore[arg-type]
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))  # type: ignore[arg-type]
        self.branch_pool = _Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        # The last block of the graph takes the maximum where every other one averages.
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "max" else _average(x)
        return torch.cat(
            (
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ),
            1,
        )


class Inception(nn.Module):
    """The network, from images (B, 3, H, W) uint8 to `Features`, float32.

    Args:
        name: of the extractor.
    """

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD()
        self.Mixed_7b = _BlockE(1280, "average")
        self.Mixed_7c = _BlockE(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str] | None, *, sha256: str | None = WEIGHTS_SHA256) -> Inception:
        """Loads the weights.

        Args:
            path: the weight file; None is an error that names where to get it.
            sha256: the first digits of the hash that the file must have; None takes any file.

        Raises:
            UserError: no file, another hash, or not these weights.
        """
        if path is None:
            raise UserError(f"no Inception weights given: {WHERE}")
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file; {WHERE}")
        if sha256 is not None:
            found = sha256_of(path)
            if not found.startswith(sha256):
                raise UserError(f"{path}: SHA-256 {found[:8]}..., expected {sha256}...; {WHERE}")
        try:
            state = load_saved(path)
            model = cls()
            # The 2015 graph has no auxiliary head; some ports keep the counters of batch norm, some do not.
            missing, unexpected = model.load_state_dict(state, strict=False)
        except Exception as error:
            raise UserError(f"{path}: not Inception weights ({reason_of(error)}); {WHERE}") from None
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            name = (missing or list(unexpected))[0]
            raise UserError(
                f"{path}: not Inception weights ({'without' if missing else 'with an unknown'} {name}); {WHERE}"
            )
        return model

    def forward(self, images: Tensor) -> Features:
        x = (resize_tensorflow1(images.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # Channels last, as the graph has them: reference statistics are stored in that order.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3))
        return Features(pool, spatial, (pool @ self.fc.weight.T).softmax(dim=1))


def resize_tensorflow1(x: Tensor, size: int) -> Tensor:
    """Bilinear resize as TensorFlow 1 does it: pixel i reads from i * (input / output), no half-pixel shift.

    Args:
        x: (B, C, H, W) floating point.
        size: of both sides of the result.

    PyTorch's `interpolate(align_corners=False)` shifts by half a pixel and changes FID by several hundredths.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (at - low).to(x.dtype)
        weight = weight[:, None] if dim == 2 else weight
        below, above = x.index_select(dim, low), x.index_select(dim, high)
        x = below + (above - below) * weight
    return x
