"""A Swin Transformer of timm (or transformers) with d2it's window attention inside: the same numbers, and both times.

pip install timm
python examples/swap_swin.py
"""

import copy
import time

import timm
import torch

from d2it.nn import swap_swin


def step(model: torch.nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The output and the seconds of a forward and a backward pass."""
    started = time.perf_counter()
    out = model(images)
    out.backward(torch.ones_like(out))
    return out.detach(), time.perf_counter() - started


if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10).eval()
    swapped = swap_swin(copy.deepcopy(model))
    images = torch.randn(2, 3, 224, 224)
    difference = (step(model, images)[0] - step(swapped, images)[0]).abs().max()
    best = [min(step(m, images)[1] for _ in range(3)) for m in (model, swapped)]
    print(f"largest difference of the outputs {difference:.1e}")
    print(f"forward and backward: timm {best[0]:.2f} s, d2it {best[1]:.2f} s")
