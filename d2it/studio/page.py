"""The studio's page, in Gradio."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2it import pictures
from d2it.errors import UserError
from d2it.studio.session import Session

RANDOM = "any"
_STYLE = """
canvas { width: 100%; image-rendering: pixelated; touch-action: none; cursor: crosshair; }
.tools { display: flex; gap: 4px; margin-bottom: 6px; }
.tools button { padding: 2px 10px; border: 2px solid transparent; border-radius: 4px; color: black; background: #ccc; }
.tools button.chosen { border-color: black; font-weight: bold; }
"""
PAINTED, SAMPLED = "the one painted here", "one that the model samples"


def build(session: Session) -> gr.Blocks:
    """The page of a session: a tab to sample under a map, and one to rebuild photos."""
    model = session.model
    own = model.sampling
    guidance = own.get("guidance", 1.0)
    guided = bool(model.num_classes) and bool(model.content_transformer.config.class_dropout_prob)
    with gr.Blocks(title="d2it studio", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# d2it studio\nPaint where an image is fine (red) or coarse (blue), and see what that makes and costs."
        )
        with gr.Tab("Sample"), gr.Row():
            with gr.Column():
                painter = gr.HTML(
                    _painted(session, session.new_map(0)),
                    html_template='<div class="tools"></div><canvas></canvas>',
                    css_template=_STYLE,
                    js_on_load=(files("d2it.studio") / "painter.js").read_text(),
                    elem_id="painter",
                )
                with gr.Row():
                    coarse, fine = gr.Button("All coarse"), gr.Button("All fine")
                with gr.Accordion("A photo's own map", open=False):
                    photo = gr.Image(label="Photo", type="numpy", elem_id="map-photo")
            with gr.Column():
                source = gr.Radio(
                    [PAINTED, SAMPLED] if model.grain_transformer is not None else [PAINTED],
                    value=PAINTED,
                    label="Grain map",
                )
                label = gr.Dropdown(
                    [RANDOM, *session.classes], value=RANDOM, label="Class", visible=bool(session.classes)
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=None, elem_id="seed")
                    steps = gr.Slider(1, 250, min(own.get("steps", 50), 250), step=1, label="Steps", elem_id="steps")
                strength = gr.Slider(
                    1.0,
                    8.0,
                    float(guidance.get("scale", 1.0) if isinstance(guidance, dict) else guidance) if guided else 1.0,
                    step=0.1,
                    label="Guidance",
                    visible=guided,
                )
                least = session.least_budget
                spend = gr.Checkbox(False, label="Spend a budget of tokens", visible=least is not None)
                what = "Budget: share of the tokens of the finest map"
                budget = gr.Slider(
                    least or 0, 1.0, max(least or 0, 0.5), step=0.01, label=what, visible=least is not None
                )
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                with gr.Row():
                    image = gr.Image(label="Image", type="numpy", format="png", elem_id="image")
                    outlined = gr.Image(label="With its map", type="numpy", format="png")
                cost = gr.Textbox(label="Cost", elem_id="cost")
                states = gr.Image(label="From noise to the image", type="numpy", format="png", elem_id="states")
        with gr.Tab("Rebuild a photo"), gr.Row():
            with gr.Column():
                own_photo = gr.Image(label="Photo", type="numpy", elem_id="rebuild-photo")
                share = gr.Slider(0.0, 1.0, 0.5, step=0.01, label="Share of fine regions", elem_id="share")
                again = gr.Button("Rebuild", variant="primary", elem_id="rebuild")
            with gr.Column():
                rebuilt = gr.Image(label="Rebuilt", type="numpy", format="png", elem_id="rebuilt")
                rebuilt_outlined = gr.Image(label="With its map", type="numpy", format="png")
                rebuilt_cost = gr.Textbox(label="Quality and cost", elem_id="rebuilt-cost")

        def sample(
            text: str, chosen: str, name: str, seed: Any, steps: Any, strength: Any, spends: bool, budget: Any
        ) -> tuple[Any, ...]:
            grain_map, background = _read(session, text)
            result = session.sample(
                grain_map if chosen == PAINTED else None,
                None if name == RANDOM else _class(session, name),
                seed=_whole("seed", seed),
                steps=_whole("steps", steps),
                guidance=_number("guidance", strength),
                budget=_number("budget", budget) if spends else None,
            )
            strip = pictures.sheet(pictures.magnify(result.states, len(result.states)), columns=len(result.states))
            used = _painted(session, result.grain_map, background)
            return large(result.image), lines(result.image, result.grain_map), result.cost, strip, used

        def rebuild(photo: Any, share: Any) -> tuple[Any, ...]:
            result = session.rebuild(photo, _number("the fine share", share))
            return large(result.image), lines(result.image, result.grain_map), result.cost

        def large(picture: np.ndarray) -> np.ndarray:
            return pictures.magnify(picture[None], 1, least=256)[0]

        def lines(picture: np.ndarray, grain_map: Tensor) -> np.ndarray:
            return pictures.outline_grains(large(picture)[None], grain_map[None].numpy(), model.num_grains)[0]

        def of_photo(photo: Any) -> str:
            return _painted(session, session.photo_map(photo), _data_url(session.crop(photo)))

        asked = [painter, source, label, seed, steps, strength, spend, budget]
        draw.click(_told(sample), asked, [image, outlined, cost, states, painter])
        photo.upload(_told(of_photo), photo, painter)
        coarse.click(lambda: _painted(session, session.new_map(0)), None, painter)
        fine.click(lambda: _painted(session, session.new_map(model.num_grains - 1)), None, painter)
        shown = [rebuilt, rebuilt_outlined, rebuilt_cost]
        again.click(_told(rebuild), [own_photo, share], shown)
        share.release(_told(rebuild), [own_photo, share], shown)
        own_photo.upload(_told(rebuild), [own_photo, share], shown)
    return blocks


def _told(act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, whose UserErrors the page shows."""

    def told(*values: Any) -> Any:
        try:
            return act(*values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return told


def _painted(session: Session, grain_map: Tensor, photo: str = "") -> str:
    return json.dumps({"grains": session.model.num_grains, "map": grain_map.tolist(), "photo": photo})


def _read(session: Session, text: str) -> tuple[Tensor, str]:
    """The map and the photo of the painter's value, which a browser sends."""
    try:
        value = json.loads(text)
        return torch.tensor(value["map"], dtype=torch.int64), str(value["photo"])
    except (ValueError, TypeError, KeyError, RuntimeError):  # nested too deeply, or beyond 64 bits, for the last
        raise UserError("the grain map that the page sent cannot be read: reload the page") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} must be a number, got {value}")
    return float(value)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) and not _number(name, value).is_integer():
        raise UserError(f"{name} must be a whole number, got {value}")
    return int(value)


def _class(session: Session, name: Any) -> int:
    if name not in session.classes:
        raise UserError(f"no class {name!r}")
    return session.classes.index(name)


def _data_url(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
