"""Starting a new model from trained weights: other classes, another image size, a D2iT from a plain DiT.

What is carried over unchanged, interpolated and left new:

- Weights of equal shape are copied.
- The label table is copied where the number of classes is the same. With another number its rows are new and the null
  row is kept; a model without classes adds the null row to the bias of its timestep embedding, which computes the same.
- RefineNet's learned positions are interpolated bicubically over the latent grid.
- RefineNet's bias matrices are interpolated bicubically over the query's and over the key's place in the window,
  tables over the two offsets, as Swin's are.
- The trunk's positions are sines and cosines of the new grid, as in a model that starts from nothing.
- A `DynamicGrainTransformer` of another number of levels has a new final layer: the levels are quantiles on the same
  scale, and the signal that it reads is the same.
- A `DynamicContentTransformer` takes the trunk of a `DiT`; its RefineNet and grain embedding are new.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2it.models.base import CONFIG_FILE, Model, saved_kind
from d2it.models.content import DynamicContentTransformer
from d2it.models.dit import DiT
from d2it.models.dvae import DynamicVAE
from d2it.models.grain import DynamicGrainTransformer

#: The folder of a model in that of a whole D2iT or of a run.
FOLDERS: Mapping[type[Model], str] = {
    DynamicVAE: "vae",
    DynamicGrainTransformer: "grain_transformer",
    DynamicContentTransformer: "content_transformer",
    DiT: "content_transformer",
}
#: Settings that may differ from those of the weights; all others must be the same.
FREE = {
    "image_size",
    "grid",
    "num_classes",
    "class_dropout_prob",
    "attention",
    "diffusion",
    "window",
    "min_grain",
    "refine_until",
    "masked",
    "levels",
    "edges",
    "thresholds",
    "num_bins",
    "value_range",
    "sigma",
    "normalize",
    "scaling_factor",
}
#: Settings whose changes are reported, because they change what the weights were trained for.
REPORTED = ("diffusion", "min_grain", "refine_until", "thresholds", "levels")
_LABELS = "condition.label.weight"


def start_from(
    model: Model, folder: str | Path, *, vae_sha256: str | None = None, any_vae: bool = False
) -> tuple[str, ...]:
    """Gives a new model the weights in a folder, as far as they fit (see the head of this module).

    Args:
        model: new, its weights as they are initialised. On the meta device only the configurations are read and
            compared.
        folder: of a model, or of a whole D2iT or a run, whose part of the model's kind is taken; `~` is the home
            folder.
        vae_sha256: of the weights of the VAE on whose latents a transformer is to be trained; None accepts any.
        any_vae: accept weights that were trained on the latents of another VAE.

    Returns:
        Lines that describe what was copied, interpolated and left new.

    Raises:
        ValueError: no such folder, no such model in it, damaged files, another VAE, or a setting other than `FREE` that
            differs; the message names it with both values.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(path)!r} to start from")
    if not (path / CONFIG_FILE).is_file():
        path = path / FOLDERS[type(model)]
    kinds: list[type[Model]] = [type(model), *([DiT] if isinstance(model, DynamicContentTransformer) else [])]
    kind = saved_kind(path, kinds)
    outline = next(model.parameters()).is_meta
    if outline:
        with torch.device("meta"):
            source = kind(kind.read_config(path))
        source.vae_sha256 = kind.saved_hashes(path)[1]
    else:
        source = kind.from_pretrained(path)
    if None not in (vae_sha256, source.vae_sha256) and vae_sha256 != source.vae_sha256 and not any_vae:
        raise ValueError(
            f"{path} was trained on the latents of another VAE (SHA-256 {str(source.vae_sha256)[:12]}...) than this "
            f"one ({str(vae_sha256)[:12]}...); any_vae=true starts from it all the same"
        )
    _require_same(model, source, path)
    return (f"starts from {path}", *carry_over(model, source))


@torch.no_grad()
def carry_over(model: Model, source: Model) -> list[str]:
    """Copies and interpolates the weights of `source` into `model`; returns lines that describe it.

    Args:
        model: new.
        source: trained; equal to `model` in every setting but those of `FREE`, or a `DiT` for the trunk of a
            `DynamicContentTransformer`.

    Raises:
        ValueError: weights that do not fit in a way that no setting explains.
    """
    theirs = {name: p.detach() for name, p in source.named_parameters()}
    if isinstance(source, DiT) and not isinstance(model, DiT):
        theirs = {name.replace("trunk.", "multi_grained.", 1): p for name, p in theirs.items()}
    taken, notes, new = 0, [], []
    parameters = dict(model.named_parameters())
    for name in sorted(theirs.keys() - parameters.keys()):
        if not name.endswith(_LABELS):
            raise ValueError(f"this {type(model).__name__} has no weights {name} to start from")
        # Without classes every image has the null label.
        bias = name.replace(_LABELS, "condition.timestep.fc2.bias")
        theirs[bias] = theirs[bias] + theirs[name][-1]
        notes.append(f"{name}: the null row is added to the timestep embedding")
    other_levels = getattr(model.config, "levels", None) != getattr(source.config, "levels", None)
    for name, ours in parameters.items():
        if other_levels and name.startswith("trunk.final.linear."):
            notes.append(f"{name}: new")
            continue
        if name not in theirs:
            new.append(name)
            continue
        found = theirs[name]
        if name.endswith(_LABELS) and found.shape[0] != ours.shape[0]:
            ours[-1].copy_(found[-1])
            taken += ours.shape[1]
            notes.append(
                f"{name}: {ours.shape[0] - 1} new rows (the weights have {found.shape[0] - 1} classes), null row kept"
            )
            continue
        if found.shape != ours.shape:
            found, how = _resized(name, found, model, source)
            notes.append(f"{name}: interpolated from {how}")
        if found.shape != ours.shape:
            raise ValueError(f"{name} has the shape {tuple(found.shape)} in the weights, {tuple(ours.shape)} here")
        ours.copy_(found)
        taken += ours.numel()
    total = sum(p.numel() for p in parameters.values())
    for name in REPORTED:
        before, now = (getattr(config, name, None) for config in (source.config, model.config))
        if before is not None and now is not None and before != now:
            notes.append(f"{name} changes: {_differences(before, now)}")
    return [f"  {taken / total:.1%} of the parameters carried over", *_folded(notes, new)]


def interpolate_grid(values: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Interpolates values on a grid bicubically, with antialiasing where the grid shrinks.

    Args:
        values: (h * w, C), row-major.
        before: (h, w).
        after: (h', w').

    Returns:
        (h' * w', C), in the dtype of `values`.
    """
    image = values.T.unflatten(1, before)[None]  # (1, C, h, w)
    # With antialiasing torch's cubic is Keys' with a = -0.5, which leaves linear functions as they are.
    image = F.interpolate(image, after, mode="bicubic", antialias=True, align_corners=False)
    return image[0].flatten(1).T.contiguous()


def interpolate_bias(bias: Tensor, before: int, after: int) -> Tensor:
    """Interpolates the bias matrices of windows over the query's and then over the key's place in the window.

    Args:
        bias: (1, H, n, n), n = `before`^2 places, row-major.
        before: side of the window.
        after: side of the new window.

    Returns:
        (1, H, m, m), m = `after`^2.
    """
    heads, cells, places = bias.shape[1], before * before, after * after
    sides = (before, before), (after, after)
    by_query = bias[0].permute(1, 0, 2).reshape(cells, heads * cells)
    by_query = interpolate_grid(by_query, *sides).unflatten(1, (heads, cells))  # (m, H, n)
    by_key = interpolate_grid(by_query.permute(2, 1, 0).reshape(cells, heads * places), *sides)
    return by_key.unflatten(1, (heads, places)).permute(1, 2, 0)[None].contiguous()


def _resized(name: str, found: Tensor, model: Model, source: Model) -> tuple[Tensor, str]:
    """Returns weights for another grid or window, and from what they were interpolated."""
    before, after = source.config, model.config
    if name == "refine.positions":
        sizes = " to ".join(f"{h} x {w}" for h, w in (before.grid, after.grid))
        return interpolate_grid(found, before.grid, after.grid), f"{sizes} cells"
    if name.endswith("attn.bias") and name.startswith("refine."):
        how = f"windows of {before.window} to {after.window}"
        if after.relative_bias == "matrix":
            return interpolate_bias(found, before.window, after.window), how
        sides = [(2 * window - 1,) * 2 for window in (before.window, after.window)]
        return interpolate_grid(found, sides[0], sides[1]), how
    return found, "nothing"


def _require_same(model: Model, source: Model, path: Path) -> None:
    """Raises ValueError, naming the setting, unless the two configurations agree in all that is not free."""
    ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(source.config)
    if isinstance(source, DiT) and not isinstance(model, DiT):
        theirs["downsampling"] = (theirs["downsampling"], *ours["downsampling"][1:])
    for key in sorted(theirs, key=lambda name: name != "downsampling"):  # others follow from it
        if key in ours and key not in FREE and ours[key] != theirs[key]:
            raise ValueError(
                f"{path} has {key}={_shown(theirs[key])}, this {type(model).__name__} {_shown(ours[key])}: they must "
                "be the same"
            )


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _differences(before: Any, now: Any) -> str:
    if not dataclasses.is_dataclass(before):
        return f"{_shown(before)} to {_shown(now)}"
    pairs = {f.name: (getattr(before, f.name), getattr(now, f.name)) for f in dataclasses.fields(before)}
    return ", ".join(f"{name} {a} to {b}" for name, (a, b) in pairs.items() if a != b)


def _folded(notes: list[str], new: list[str]) -> list[str]:
    """Returns the notes, those of equal blocks as one, and what is new."""
    lines: dict[str, int] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        part = name.split(".")
        key = f"{part[0]}'s bias: {text}" if part[-1] == "bias" and "blocks" in part else note
        lines[key] = lines.get(key, 0) + 1
    found = [f"  {line}" + (f" ({count} blocks)" if count > 1 else "") for line, count in lines.items()]
    parts = {name.split(".")[0] for name in new if not name.endswith(_LABELS)}
    parts |= {name for name in new if name.split(".")[0] not in parts}
    return found + ([f"  new: {', '.join(sorted(parts))}"] if parts else [])
