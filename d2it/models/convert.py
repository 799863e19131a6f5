"""Weights of the original DiT (Peebles and Xie) in our DiT."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from d2it.models.base import load_weights
from d2it.models.dit import DiT, DiTConfig

#: Heads cannot be read off the weights: DiT's sizes by width.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

_NAMES = (
    (r"x_embedder\.proj\.(weight|bias)", r"trunk.embed.proj.\1"),
    (r"t_embedder\.mlp\.0\.(weight|bias)", r"trunk.condition.timestep.fc1.\1"),
    (r"t_embedder\.mlp\.2\.(weight|bias)", r"trunk.condition.timestep.fc2.\1"),
    (r"y_embedder\.embedding_table\.weight", r"trunk.condition.label.weight"),
    (r"blocks\.(\d+)\.(attn\.(?:qkv|proj)|mlp\.fc[12])\.(weight|bias)", r"trunk.blocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(weight|bias)", r"trunk.blocks.\1.modulation.linear.\2"),
    (r"final_layer\.linear\.(weight|bias)", r"trunk.final.linear.\1"),
    (r"final_layer\.adaLN_modulation\.1\.(weight|bias)", r"trunk.final.modulation.linear.\1"),
)


def convert_dit(state: Mapping[str, Tensor], *, heads: int | None = None) -> DiT:
    """Our DiT with the weights of the original's state dict (the same memory if float32), in evaluation mode.

    Args:
        state: the original's names and shapes, the frozen `pos_embed` included: it gives the grid, and is compared with
            ours.
        heads: None takes DiT's own for the width.

    Raises:
        ValueError: names, shapes or positions that are not the original's.
    """
    state = dict(state)
    try:
        embed = state["x_embedder.proj.weight"]  # (dim, C, p, p)
        positions = state.pop("pos_embed")[0]  # (L, dim)
        final = state["final_layer.linear.weight"]
        labels = state["y_embedder.embedding_table.weight"]
    except KeyError as error:
        raise ValueError(f"not a state dict of DiT: it has no {error.args[0]}") from error
    dim, channels, patch = embed.shape[:3]
    if heads is None:
        if dim not in HEADS:
            raise ValueError(f"heads must be given for a width of {dim}")
        heads = HEADS[dim]
    side = round(positions.shape[0] ** 0.5) * patch
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in _NAMES:
            if re.fullmatch(pattern, name):
                converted[re.sub(pattern, ours, name)] = (tensor.flatten(1) if tensor.ndim == 4 else tensor).float()
                break
        else:
            raise ValueError(f"not a state dict of DiT: it has {name}")
    out_channels = final.shape[0] // patch**2
    config = DiTConfig(
        image_size=8 * side,
        in_channels=channels,
        patch_size=patch,
        dim=dim,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        num_classes=labels.shape[0] - 1,
        learn_sigma=out_channels == 2 * channels,
    )
    with torch.device("meta"):  # nothing is allocated or initialised that the state dict is about to replace
        model = DiT(config)
    load_weights(model, converted, source="the state dict", assign=True)
    model.reset_buffers(torch.device("cpu"))
    if positions.shape != model.trunk.positions.shape or not torch.allclose(
        positions.float(), model.trunk.positions, atol=1e-4
    ):
        raise ValueError("pos_embed is not the sin-cos embedding of a square grid")
    return model.eval()


def load_dit(path: str | os.PathLike[str], *, heads: int | None = None) -> DiT:
    """`convert_dit` of a file: a bare state dict, or a training checkpoint, whose "ema" is taken. Read without code.

    Raises:
        ValueError: unreadable, or not the original's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    if isinstance(state, dict):
        state = state.get("ema", state)
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    return convert_dit(state, heads=heads)
