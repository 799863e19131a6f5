"""`d2it studio`: what it computes, and the page in a real Chromium."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2it import pictures
from d2it.errors import UserError
from d2it.models import DynamicContentTransformer, DynamicGrainTransformer, DynamicVAE
from d2it.sampling import D2iT
from d2it.studio.cli import main
from d2it.studio.session import Session

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def model() -> D2iT:
    torch.manual_seed(0)
    return D2iT(
        DynamicVAE.from_preset("tiny"),
        DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), **SMALL),
        DynamicContentTransformer.from_preset("tiny", image_size=64, **SMALL),
        class_names=["cat", "dog", "golden retriever"],
        sampling={"scheduler": "ddim", "steps": 3},
    )


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(model())


def photo(height: int = 80, width: int = 100) -> np.ndarray:
    """Half of it noise, half of it flat."""
    picture = np.full((height, width, 3), 90, np.uint8)
    picture[:, width // 2 :] = np.random.default_rng(0).integers(0, 255, (height, width - width // 2, 3))
    return picture


def test_a_painted_map_is_what_the_image_is_made_with(session: Session) -> None:
    grain_map = session.new_map(0)
    grain_map[1:3, 2:] = 1
    result = session.sample(grain_map, 1, seed=5, steps=2, guidance=1.0)
    expected = session.model(labels=1, grain_map=grain_map, seed=5, steps=2)
    assert np.array_equal(result.image, expected.uint8()[0])
    assert torch.equal(result.grain_map, grain_map)
    assert np.array_equal(result.states[-1], result.image)
    assert len(result.states) == 2
    assert re.match(r"32 tokens of at most 80 a step, 2 steps, [\d,]+ ms", result.cost)  # 16 regions, 4 x 4 fine cells
    assert session.sample(None, None, seed=5, steps=1, guidance=1.0).grain_map.shape == (4, 4)
    # A budget of 0.4 of 80 tokens is 4 fine regions of 16; of the painted ones, the 4 that were painted are the first.
    assert session.least_budget == 0.2
    spent = session.sample(grain_map, 1, seed=5, steps=1, guidance=1.0, budget=0.4)
    assert torch.equal(spent.grain_map, grain_map)
    assert int(session.sample(grain_map, 1, seed=5, steps=1, guidance=1.0, budget=0.6).grain_map.sum()) == 8


def test_a_photos_map_and_its_reconstruction(session: Session) -> None:
    found = session.photo_map(photo())
    assert torch.equal(found, session.model.vae.grain_map(session._images(session.crop(photo())))[0][0])
    rebuilt = [session.rebuild(photo(), share) for share in (0.0, 0.5, 1.0)]
    assert [int(r.grain_map.sum()) for r in rebuilt] == [0, 8, 16]
    assert rebuilt[1].grain_map[:, 2:].all(), "the noisy half has the higher entropy"
    assert [int(re.search(r"(\d+) latent codes", r.cost)[1]) for r in rebuilt] == [16, 40, 64]
    assert session.crop(photo(20, 30)).shape == (64, 64, 3)
    picture, again = session.crop(photo()), rebuilt[2]
    scaled = pictures.from_uint8(session._images(picture))
    fine = torch.ones(1, 4, 4, dtype=torch.int64)
    with torch.no_grad():
        decoded = session.model.vae.decode(session.model.vae.encode(scaled, fine)[0], fine)
    assert np.array_equal(again.image, pictures.to_pictures(decoded)[0])
    error = np.square(again.image.astype(float) - picture).mean()
    assert float(re.search(r"PSNR (\S+) dB", again.cost)[1]) == pytest.approx(10 * np.log10(255**2 / error), abs=0.051)


def test_what_cannot_be_done_is_one_line(session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="choose a photo first"):
        session.photo_map(None)  # type: ignore[arg-type]
    for nothing in (photo()[:0], photo()[..., 0], photo()[..., :2]):
        with pytest.raises(UserError, match="choose a photo first"):
            session.crop(nothing)
    with pytest.raises(UserError, match=r"the fine share must be in 0 ... 1, got 1.5"):
        session.rebuild(photo(), 1.5)
    with pytest.raises(UserError, match="seed must be at least 0, got -1"):
        session.sample(None, None, seed=-1, steps=1, guidance=1.0)
    assert main([str(tmp_path / "none")]) == 2
    assert "no d2it.json" in capsys.readouterr().err
    assert main([str(tmp_path), "--port", "70000"]) == 2
    assert "--port must be in 0 ... 65535, got 70000" in capsys.readouterr().err


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("studio") / "run"
    model().save_pretrained(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "d2it", "studio", str(folder), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split()[0]
        server.terminate()


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, headless=True, args=flags.split()
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.locator("#painter canvas").wait_for()
        yield page
        context.close()


def shown(page: Any, name: str) -> np.ndarray:
    """The picture that an element shows."""
    source = page.locator(f"#{name} img").get_attribute("src")
    if source.startswith("data:"):
        data = base64.b64decode(source.partition(",")[2])
    else:
        data = page.request.get(source).body()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def draw(page: Any) -> str:
    """Press Draw and wait for a cost that is not the one before."""
    field = page.locator("#cost textarea, #cost input")
    before = field.input_value()
    page.locator("#draw").click()
    page.wait_for_function(
        """before => {
            const field = document.querySelector('#cost textarea, #cost input');
            return field.value && field.value != before;
        }""",
        arg=before,
    )
    return field.input_value()


@browser
def test_paint_and_draw(page: Any, session: Session, tmp_path: Path) -> None:
    page.locator("#steps input[type=number]").fill("2")
    page.locator("#steps input[type=number]").press("Tab")
    assert draw(page).startswith("16 tokens of at most 80")
    first = shown(page, "image")
    box = page.locator("#painter canvas").bounding_box()
    side = box["width"] / 4
    page.mouse.move(box["x"] + 2.5 * side, box["y"] + 1.5 * side)  # three regions of the second row and column
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * side, box["y"] + 1.5 * side, steps=4)
    page.mouse.move(box["x"] + 3.5 * side, box["y"] + 2.5 * side, steps=4)
    page.mouse.up()
    started = time.perf_counter()
    assert draw(page).startswith("28 tokens of at most 80")
    assert time.perf_counter() - started < 10
    second = shown(page, "image")
    assert first.shape == second.shape == (256, 256, 3)
    assert not np.array_equal(first, second)
    assert len(shown(page, "states").shape) == 3
    page.get_by_label("Spend a budget of tokens").check()  # 0.5 of 80
    assert draw(page).startswith("40 tokens of at most 80")
    page.get_by_label("Spend a budget of tokens").uncheck()
    # All fine, and a photo's own map under its picture.
    page.get_by_role("button", name="All fine").click()
    assert draw(page).startswith("80 tokens of at most 80")
    page.locator('button:has-text("A photo\'s own map")').click()
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    page.locator("#map-photo input[type=file]").set_input_files(tmp_path / "photo.png")
    fine = int(session.photo_map(photo()).sum())
    page.wait_for_timeout(500)
    deadline = time.perf_counter() + 60
    while not draw(page).startswith(f"{16 + 4 * fine} tokens"):
        assert time.perf_counter() < deadline


@browser
def test_bad_input_says_so(page: Any) -> None:
    page.locator("#seed input").fill("-3")
    page.locator("#seed input").press("Tab")
    page.locator("#draw").click()
    page.get_by_text("seed must be at least 0, got -3").first.wait_for()
    page.locator("#seed input").fill("0.5")
    page.locator("#seed input").press("Tab")
    page.locator("#draw").click()
    page.get_by_text("seed must be a whole number, got 0.5").first.wait_for()
    page.locator("#seed input").fill("1")
    page.locator("#seed input").press("Tab")


@browser
def test_rebuild_a_photo(page: Any, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Rebuild a photo").click()
    page.locator("#rebuild").click()
    page.get_by_text("choose a photo first").first.wait_for()
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    page.locator("#rebuild-photo input[type=file]").set_input_files(tmp_path / "photo.png")
    has = "text => document.querySelector('#rebuilt-cost textarea, #rebuilt-cost input').value.includes(text)"
    page.wait_for_function(has, arg="40 latent codes")
    page.locator("#share input[type=number]").fill("1")
    page.locator("#share input[type=number]").press("Tab")
    page.locator("#rebuild").click()
    page.wait_for_function(has, arg="64 latent codes")
    assert shown(page, "rebuilt").shape == (256, 256, 3)
