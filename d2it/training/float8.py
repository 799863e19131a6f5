"""The matrix products of the blocks in float8, by torchao; weights, optimiser and checkpoints stay as they are."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch
from torch import nn

from d2it.errors import UserError

#: Recipe -> the least compute capability whose tensor cores run it; None: float32 products of rounded values, anywhere.
RECIPES: dict[str, tuple[int, int] | None] = {"tensorwise": (8, 9), "rowwise": (9, 0), "emulated": None}


def to_float8(blocks: list[nn.Module], recipe: str, device: torch.device, key: str) -> None:
    """Replaces, in place, the Linears of attention and MLP by torchao's Float8Linear; before compilation and sharding.

    The modulations stay float32, and so do Linears with a side that is no multiple of 16, which the hardware needs.

    Args:
        blocks: changed in place.
        recipe: of `RECIPES`; "emulated" rounds as "tensorwise" does.
        device: where the blocks compute.
        key: of the configuration, for messages.

    Raises:
        UserError: torchao is not installed, or the device has no float8.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"{key}={recipe} needs the package torchao, which is not installed")
    least = RECIPES[recipe]
    if least is not None and (device.type != "cuda" or torch.cuda.get_device_capability(device) < least):
        raise UserError(
            f"{key}={recipe} needs a GPU of compute capability {least[0]}.{least[1]} or newer; "
            f"{key}=emulated runs anywhere"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise" if least is None else recipe)
    # Rows are padded to the hardware's 16: a weight's gradient sums over them, and their number is the batch's.
    config = dataclasses.replace(config, pad_inner_dim=True, emulate=least is None)

    def fits(part: nn.Module, name: str) -> bool:
        assert isinstance(part, nn.Linear)
        return not name.startswith("modulation.") and part.in_features % 16 == 0 and part.out_features % 16 == 0

    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=fits, config=config)
