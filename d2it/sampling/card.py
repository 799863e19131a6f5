"""What stands beside saved weights for people and for other tools: a model card, and diffusers' index of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2it.errors import UserError
from d2it.files import read_json, write_text

CARD = "README.md"
#: The report of `evaluate.py --output`, whose scores a card shows.
SCORES = "evaluation.json"
_MARK = "<!-- Written by d2it with the weights; remove this line to keep your own text. -->"
_INDEX = {"_class_name": "D2iTPipeline", "d2it": ["d2it.sampling.diffusers_pipeline", "D2iTComponent"]}
_PIPELINE = '''"""The class that diffusers loads with `custom_pipeline`; pip install 'd2it[sample]'."""

from d2it.sampling.diffusers_pipeline import D2iTPipeline

__all__ = ["D2iTPipeline"]
'''


def write_companions(folder: Path, model: Any) -> None:
    """Writes README.md, model_index.json and pipeline.py for the D2iT `model`; another text in README.md stays."""
    card = folder / CARD
    if not card.is_file() or _MARK in card.read_text(errors="replace"):
        write_text(card, model_card(model, folder.resolve().name, scores_of(folder)))
    write_text(folder / "model_index.json", json.dumps(_INDEX, indent=2) + "\n")
    write_text(folder / "pipeline.py", _PIPELINE)


def scores_of(folder: Path) -> dict[str, Any]:
    """The scores in the folder's evaluation.json: name -> number; empty where there is no such report."""
    try:
        report = read_json(folder / SCORES)
    except UserError:
        return {}
    scores = report.get("metrics")
    return {k: v for k, v in scores.items() if isinstance(v, (int, float))} if isinstance(scores, dict) else {}


def model_card(model: Any, name: str, scores: dict[str, Any]) -> str:
    """A model card as the Hugging Face hub reads it: metadata in YAML, then Markdown.

    Args:
        model: the D2iT whose weights it describes; `model.facts` has what training knew: "data", "settings", "license".
        name: of the model.
        scores: name -> number.
    """
    facts = model.facts
    licence = facts.get("license")
    height, width = model.image_size
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    metadata = {
        "library_name": "d2it",
        "pipeline_tag": "unconditional-image-generation",
        "license": licence or "unknown",
        "tags": ["d2it", "diffusers", "image-generation", "diffusion"],
    }
    call = f"labels=[{', '.join(map(json.dumps, model.class_names[:2]))}]" if model.class_names else "4"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),  # JSON is YAML
        "---",
        _MARK,
        "",
        f"# {_line(name)}",
        "",
        f"A Dynamic Diffusion Transformer (arXiv 2504.09454) for images of {width} x {height} pixels, {classes}, "
        f"{model.num_grains} grains: it spends latent codes and tokens where an image has detail.",
        "",
        "## Use",
        "",
        "```python",
        "from d2it import D2iT",
        "",
        f"d2it = D2iT.from_pretrained({json.dumps(name)})  # the folder, or its name on the hub",
        f"samples = d2it({call}, seed=0)",
        "samples.images, samples.grain_maps  # (N, 3, H, W) in [-1, 1]; 0 = coarsest",
        "```",
        "",
        "With diffusers:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f"name = {json.dumps(name)}",
        "pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)",
        "pipe().images[0]",
        "```",
        "",
        "## Parts",
        "",
        "| part | class | parameters | SHA-256 of the weights |",
        "|---|---|---|---|",
        *(
            f"| {key} | {type(part).__name__} | {part.num_parameters() / 1e6:.2f} M | `{part.weights_sha256}` |"
            for key, part in model.parts.items()
        ),
        "",
        "## Data",
        "",
        *_table(facts.get("data"), "What it was trained on is not recorded."),
        "",
        "## Settings",
        "",
        *_table(facts.get("settings"), "The settings of its training are not recorded."),
        *(["", "Sampling, unless a call says otherwise:", "", *_table(model.described_sampling, "")]),
        "",
        "## Scores",
        "",
        *_table(scores, f"Not evaluated: the scores of `d2it evaluate --output {SCORES}` stand here."),
        "",
        "## Licence",
        "",
        f"Of the weights: {_line(licence)}."
        if licence
        else "Of the weights: not stated (`run.license` in the configuration of the training). The code of d2it is "
        "under Apache-2.0.",
    ]
    return "\n".join(lines) + "\n"


def _table(values: Any, absent: str) -> list[str]:
    if not isinstance(values, dict) or not values:
        return [absent] if absent else []
    cells = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in values.items()}
    return ["| | |", "|---|---|", *(f"| {_line(k)} | {_line(v)} |" for k, v in cells.items())]


def _line(value: Any) -> str:
    """A value as text of one line that cannot end a cell, open a tag or begin a list: a path may have any name."""
    text = " ".join(str(value).split())
    for character in "\\|<>`":
        text = text.replace(character, f"\\{character}")
    return text
