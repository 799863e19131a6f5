"""Weights of the original DiT (Peebles and Xie) in our DiT."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from d2it.files import load_saved
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

#: Dimensions of the tensors that the configuration is read off.
_RANKS = {
    "x_embedder.proj.weight": 4,  # (dim, C, p, p)
    "pos_embed": 3,  # (1, L, dim)
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}


def convert_dit(state: Mapping[str, Tensor], *, heads: int | None = None, num_classes: int | None = None) -> DiT:
    """Our DiT with the weights of the original's state dict (the same memory if float32), in evaluation mode.

    Args:
        state: the original's names and shapes, the frozen `pos_embed` included: it gives the grid, and is compared with
            ours. Names may carry the prefixes of DDP and `torch.compile`.
        heads: None takes DiT's own for the width.
        num_classes: None takes the label table's last row for the null label, as in the released weights. A table with
            `num_classes` rows has no null row (it was trained with `class_dropout_prob=0`): one of zeros is added, and
            the configuration's `class_dropout_prob` is 0.

    Raises:
        ValueError: names, shapes or positions that are not the original's.
    """
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"not a state dict of DiT: {name} must be a tensor, got {type(tensor).__name__}")
    for name, rank in _RANKS.items():
        if name not in state:
            raise ValueError(f"not a state dict of DiT: it has no {name}")
        if state[name].ndim != rank or not state[name].numel():
            got = tuple(state[name].shape)
            raise ValueError(f"not a state dict of DiT: {name} must have {rank} dimensions, none of them 0, got {got}")
    positions = state.pop("pos_embed")[0]  # (L, dim)
    final = state["final_layer.linear.weight"]
    labels = state["y_embedder.embedding_table.weight"]
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    dim, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    if heads is None:
        if dim not in HEADS:
            raise ValueError(f"heads must be given for a width of {dim}")
        heads = HEADS[dim]
    side = round(positions.shape[0] ** 0.5) * patch
    rows = labels.shape[0]
    if num_classes not in (None, rows, rows - 1):
        raise ValueError(
            f"num_classes must be {rows - 1} or {rows} for a label table of {rows} rows, got {num_classes}"
        )
    no_null = num_classes == rows
    if no_null:
        state["y_embedder.embedding_table.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
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
        image_size=(8 * side, 8 * side),
        in_channels=channels,
        patch_size=patch,
        dim=dim,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=heads,
        mlp_ratio=hidden / dim,
        num_classes=rows if no_null else rows - 1,
        class_dropout_prob=0.0 if no_null else 0.1,
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


def load_dit(path: str | os.PathLike[str], *, heads: int | None = None, num_classes: int | None = None) -> DiT:
    """`convert_dit` of a file: a bare state dict, or a checkpoint of train.py, whose "ema" is taken, else its "model".

    The file is a pickle, read by `d2it.files.load_saved`: nothing in it is executed.

    Args:
        path: the file.
        heads: as for `convert_dit`.
        num_classes: as for `convert_dit`; None takes it from "args" where the file has them.

    Raises:
        ValueError: unreadable, or not the original's.
    """
    content = load_saved(path)
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in ("ema", "model") if content.get(key)), content)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    if num_classes is None and state is not content:
        named = getattr(content.get("args"), "num_classes", None)
        num_classes = named if isinstance(named, int) else None
    model = convert_dit(state, heads=heads, num_classes=num_classes)
    if num_classes is None and model.config.num_classes != 1000:
        rows = model.config.num_classes + 1
        warnings.warn(
            f"{path}: its label table has {rows} rows, read as {rows - 1} classes and the null label; "
            f"num_classes={rows} reads a table without a null label",
            stacklevel=2,
        )
    return model


if __name__ == "__main__":
    print("error: this command has moved: python -m d2it.sampling.convert", file=sys.stderr)
    sys.exit(2)
