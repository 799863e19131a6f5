"""The command `d2it studio`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from d2it.errors import UserError, run_command, user_error
from d2it.sampling.pipeline import D2iT
from d2it.studio.session import Session


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="d2it studio",
        description="A local page: paint grain maps, sample under them, rebuild photos at any share of fine regions.",
    )
    parser.add_argument("model", type=Path, help="the folder of a training run, or of D2iT.save_pretrained")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes one that is free (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C."""

    def act() -> None:
        options = parser().parse_args(arguments)
        if not 0 <= options.port <= 65535:
            raise UserError(f"--port must be in 0 ... 65535, got {options.port}")
        cuda = torch.cuda.is_available()
        if options.device == "cuda" and not cuda:
            raise UserError("--device cuda: this torch sees no GPU")
        device = "cuda" if cuda and options.device != "cpu" else "cpu"
        with user_error():
            model = D2iT.from_pretrained(options.model, device=device)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import gradio as gr

        from d2it.studio.page import build

        page = build(Session(model))
        try:
            page.launch(
                server_name=options.host,
                server_port=options.port or _free_port(options.host),
                inbrowser=not options.no_browser,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none is fetched
                quiet=True,
                share=False,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"--host {options.host} --port {options.port}: {error}") from None
        print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
        page.block_thread()

    return run_command(act)


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as taken:
        taken.bind((host, 0))
        return taken.getsockname()[1]
