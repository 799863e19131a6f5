"""Random damage and nonsense against everything that reads from outside, for a given time.

    make fuzz                                        two minutes, a new seed
    python tests/fuzz.py --seconds 600 --seed 17     the cases of seed 17 again

A case must give the right result or an error of one line (`UserError`; `ValueError` or `TypeError` from the library).
Counted are the others: a wrong result that nothing reported (silent), any other exception (traceback), a pickle that
ran (executed), and a case that took longer than 30 seconds (hung). The kinds take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2it import ops
from d2it.data import Calibration, LatentCache, Loader, build_cache, finish_cache, open_source
from d2it.data.decode import Unreadable, decode
from d2it.data.sources import read_image
from d2it.distributed import World
from d2it.errors import UserError
from d2it.evaluation.inception import Inception
from d2it.models import DynamicGrainTransformer
from d2it.models.convert import load_dit
from d2it.models.lpips import LPIPS
from d2it.sampling.grain_maps import read_grain_maps
from d2it.training.checkpoint import Checkpoints
from d2it.training.config import load, setting_names
from d2it.training.meters import read_log
from tests.test_ops_errors import CALLS, NO_BACKEND

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(0, 1, 1, torch.device("cpu"))
LIMIT = 30  # seconds of a case
LIBRARY = (
    "weights",
    "pickles",
    "operators",
    "released_weights",
)  # what people call from Python, without a command around it
NONSENSE = (
    "",
    "nan",
    "-1",
    "0",
    "1e400",
    "9" * 40,
    "null",
    "true",
    "[]",
    "[1,2,3]",
    "{a: 1}",
    "text",
    "a: b",
    "\x01",
    "~",
    "~nobody-of-this-name",
    "[" * 50_000,
    "${run.dir}",
    "é/日本",
)


class Hung(BaseException):
    """A case took too long."""


class Mark:
    """Pickles as a command that leaves a file behind.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Fuzz:
    """The cases of all kinds, over one folder of sound files.

    Args:
        folder: for the files.
        rng: decides everything.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.mark = folder, rng, folder / "executed"
        torch.manual_seed(0)
        images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.source = folder / "source"
        (self.source / "photos").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(self.source / "photos" / f"{i:02d}.png")
        np.savez(self.source / "pack.npz", arr_0=images, arr_1=np.arange(12) % 3)
        with tarfile.open(self.source / "shard.tar", "w") as tar:
            for i in range(12):
                tar.add(self.source / "photos" / f"{i:02d}.png", f"{i:02d}.png")
        photos = open_source(self.source / "photos", 32)
        build_cache(self.source / "cache", photos, self._encode, facts={"thresholds": [4.0]}, unit_size=4)
        finish_cache(self.source / "cache")
        self.model = DynamicGrainTransformer.from_preset("tiny", grid=(4, 4), dim=32, depth=1, heads=2)
        self.model.save_pretrained(self.source / "model")
        self.state = {"model": {"weight": torch.randn(40, 30)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}}
        Checkpoints(self.source / "checkpoints", WORLD, {"stage": "fuzz"}).prepare(0)
        Checkpoints(self.source / "checkpoints", WORLD, {"stage": "fuzz"}).save(1, self.state)
        Calibration.load().save(self.source / "calibration.json")
        torch.save({"model": {"x_embedder.proj.weight": torch.randn(8, 4, 2, 2)}}, self.source / "weights.pt")
        maps = np.random.default_rng(1).integers(0, 3, (2, 4, 6))
        np.save(self.source / "maps.npy", maps)
        np.savez(self.source / "maps.npz", grain_maps=maps)
        (self.source / "pictures").mkdir()
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
            for suffix in (".png", ".jpg", ".webp", ".bmp"):
                with contextlib.suppress(OSError):  # not every format has every mode
                    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert(mode).save(
                        self.source / "pictures" / f"{mode.replace(';', '')}{suffix}"
                    )
        (self.source / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": 0.5}}\n' for i in range(20)))

    @staticmethod
    def _encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
        coarse, fine = (images[:, :1, ::side, ::side].float() / 255 for side in (16, 8))
        means = {"mean.0": coarse, "mean.1": fine, "std.0": coarse * 0.1, "std.1": fine * 0.1}
        return means | {"entropy": 3.5 + coarse[:, 0]}

    # ---- damage

    def damaged(self, name: str) -> Path:
        """Returns a copy of a file or folder in which one file is damaged."""
        target = self.folder / "work" / name
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        target.parent.mkdir(parents=True)
        (shutil.copytree if (self.source / name).is_dir() else shutil.copy)(self.source / name, target)
        files = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
        self.damage(self.rng.choice(files))
        return target

    def damage(self, path: Path) -> None:
        content, rng = bytearray(path.read_bytes()), self.rng
        how = rng.choice(
            ("bit", "bit", "bit", "cut", "byte", "insert", "zeros", "empty", "fifo", "pickle", "json", "deep", "gone")
        )
        at = rng.randrange(max(1, len(content)))
        if how == "bit" and content:
            content[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del content[at:]
        elif how == "byte" and content:
            content[at : at + 8] = rng.randbytes(8)
        elif how == "insert":
            content[at:at] = rng.randbytes(rng.randrange(1, 600))
        elif how == "zeros":
            content[at:] = bytes(len(content) - at)
        elif how == "empty":
            content.clear()
        elif how == "deep":
            content[:] = b"[" * 100_000
        elif how == "pickle":
            content[:] = pickle.dumps(Mark(self.mark))
        elif how == "json":
            content[:] = json.dumps(self.nonsense_json(content)).encode()
        path.unlink()
        if how == "fifo":
            os.mkfifo(path)
        elif how != "gone":
            path.write_bytes(content)

    def nonsense_json(self, content: bytes) -> Any:
        try:
            value = json.loads(content)
        except ValueError:
            return self.rng.choice((None, 5, [], {}, "text", [[]] * 3))
        place, keys = value, []
        while isinstance(place, dict) and place:
            keys.append(self.rng.choice(sorted(place)))
            place, parent = place[keys[-1]], place
        if keys:
            parent[keys[-1]] = self.rng.choice(
                (None, -1, 10**400, "text", [], {}, float("nan"), True, [None], {"a": 1})
            )
        return value

    # ---- kinds: each returns whether the result is right; the caller handles an exception

    def settings(self) -> bool:
        """Random values for one to three settings."""
        keys = setting_names()
        overrides = [f"{self.rng.choice(keys)}={self.rng.choice(NONSENSE)}" for _ in range(self.rng.randint(1, 3))]
        config = load(ROOT / "configs" / "demo.yaml", overrides)
        last = {item.partition("=")[0]: item.partition("=")[2] for item in overrides}
        return all(config.run.dir == os.path.expanduser(v) for k, v in last.items() if k == "run.dir")

    def configurations(self) -> bool:
        """A damaged YAML file."""
        (self.source / "c.yaml").write_bytes((ROOT / "configs" / "demo.yaml").read_bytes())
        load(self.damaged("c.yaml"))
        return True  # a changed value is a value

    def checkpoints(self) -> bool:
        folder = self.damaged("checkpoints")
        found = {"model": {"weight": torch.zeros(40, 30)}, "optimizer": {"lr": 0.0, "betas": (0.0, 0.0)}}
        checkpoints = Checkpoints(folder, WORLD, {"stage": "fuzz"})
        if (step := checkpoints.newest()) is not None:
            checkpoints.load(step, found)
            same = torch.equal(found["model"]["weight"], self.state["model"]["weight"])  # type: ignore[index]
            return same and found["optimizer"] == self.state["optimizer"]
        return False

    def weights(self) -> bool:
        found = DynamicGrainTransformer.from_pretrained(self.damaged("model"))
        ours, theirs = self.model.state_dict(), found.state_dict()
        return all(torch.equal(ours[name], theirs[name]) for name in ours)

    def latents(self) -> bool:
        cache, whole = (
            LatentCache(folder, extras=["entropy"]) for folder in (self.damaged("cache"), self.source / "cache")
        )
        found, wanted = cache.fetch(range(12)), whole.fetch(range(12))
        same = all(torch.equal(found[name], wanted[name]) for name in wanted)
        return same and cache.quantiles([0.3]) == whole.quantiles([0.3]) and cache.facts == whole.facts

    def unfinished_caches(self) -> bool:
        """A cache that is taken up after a file of what was encoded has been damaged."""
        folder, photos = self.folder / "begun", open_source(self.source / "photos", 32)
        shutil.rmtree(folder, ignore_errors=True)
        given = {"facts": {"thresholds": [4.0]}, "unit_size": 4}
        build_cache(folder, photos, self._encode, **given)
        self.damage(self.rng.choice(sorted(folder.iterdir())))
        build_cache(folder, photos, self._encode, **given)
        finish_cache(folder)
        found, wanted = LatentCache(folder).fetch(range(12)), LatentCache(self.source / "cache").fetch(range(12))
        return all(torch.equal(found[name], wanted[name]) for name in wanted)

    def pictures(self) -> bool:
        """A damaged picture of a random format and kind of pixels, read as a photo and as a map."""
        name = self.rng.choice(sorted(path.name for path in (self.source / "pictures").iterdir()))
        path = self.damaged(f"pictures/{name}")
        with contextlib.suppress(Unreadable):
            assert decode(read_image(path)).mode == "RGB"
        maps = read_grain_maps(path, (8, 8), 2)
        return maps.shape == (1, 8, 8) and int(maps.max()) < 2

    def maps(self) -> bool:
        path = self.damaged(self.rng.choice(("maps.npy", "maps.npz")))
        maps = read_grain_maps(path, (4, 6), 3)
        return maps.shape[1:] == (4, 6) and 0 <= int(maps.min()) <= int(maps.max()) < 3

    def released_weights(self) -> bool:
        """A file of torch.save that is damaged, as weights of the original DiT, of LPIPS and of Inception."""
        path = self.damaged("weights.pt")
        readers: list[Callable[[], Any]] = [
            lambda: load_dit(path),
            lambda: LPIPS.from_path(path, check=False),
            lambda: Inception.from_file(path, sha256=None),
        ]
        self.rng.choice(readers)()
        return False

    def packs(self) -> bool:
        source = open_source(self.damaged("pack.npz"), 32)
        batch = source.fetch(range(len(source)))
        return len(batch["image"]) + len(batch["unreadable"]) == len(source)

    def shards(self) -> bool:
        source = open_source(self.damaged("shard.tar"), 32)
        for _ in range(2):
            next(Loader(source, 4))
        return True

    def folders(self) -> bool:
        next(Loader(open_source(self.damaged("photos"), 32), 4))
        return True

    def calibrations(self) -> bool:
        Calibration.load(self.damaged("calibration.json")).thresholds(0.5)
        return True

    def logs(self) -> bool:
        path = self.damaged("log.jsonl")
        return all(isinstance(row["step"], int) for row in read_log(path))

    def pickles(self) -> bool:
        """A pickle under the name of every kind of file."""
        path = self.folder / f"evil{self.rng.choice(('.pt', '.npz', '.safetensors', '.json', '.tar', '.yaml'))}"
        if path.suffix == ".npz":
            np.savez(path, arr_0=np.array([Mark(self.mark)], dtype=object))
        else:
            buffer = io.BytesIO()
            torch.save(Mark(self.mark), buffer)
            path.write_bytes(self.rng.choice((pickle.dumps(Mark(self.mark)), buffer.getvalue())))
        readers: list[Callable[[], Any]] = [
            lambda: load_dit(path),
            lambda: open_source(path, 32).fetch([0]),
            lambda: load(path),
            lambda: Calibration.load(path),
            lambda: LPIPS.from_path(path, check=False),
            lambda: Inception.from_file(path, sha256=None),
            lambda: read_grain_maps(path, (4, 4), 2),
        ]
        self.rng.choice(readers)()
        return False

    def operators(self) -> bool:
        """One argument of an operator replaced by something of another type."""
        name = self.rng.choice(sorted(CALLS))
        call = dict(CALLS[name])
        argument = self.rng.choice(sorted(call))
        call[argument] = bad = self.rng.choice((object(), "x", {}, float("nan"), -1, 2**70, [object()], lambda: 0))
        if name not in NO_BACKEND and self.rng.random() < 0.2:
            call["backend"] = self.rng.choice(("x", 5, object()))
        try:
            result = getattr(ops, name)(**call)
        except (TypeError, ValueError) as error:
            return argument in str(error) or "backend" in str(error)
        return isinstance(bad, (int, float)) and result is not None


def outcome_of(fuzz: Fuzz, act: Callable[[], bool]) -> str:
    """Runs a case; returns "right", "silent", "traceback", "executed" or "hung"."""

    def ring(number: int, frame: object) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        verdict = "right" if act() else "silent"
    except Hung:
        verdict = "hung"
    except Exception as error:
        library = act.__name__ in LIBRARY and isinstance(error, (ValueError, TypeError))
        one_line = len(str(error).splitlines()) == 1
        verdict = "right" if (library or isinstance(error, UserError)) and one_line else "traceback"
        if verdict == "traceback":
            traceback.print_exc()
    finally:
        signal.alarm(0)
    if fuzz.mark.exists():
        fuzz.mark.unlink()
        return "executed"
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="time budget (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="random by default")
    parser.add_argument("--kinds", nargs="+", help="some of the kinds of the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = [
        name for name in vars(Fuzz) if not name.startswith("_") and name not in ("damaged", "damage", "nonsense_json")
    ]
    chosen = options.kinds or kinds
    if unknown := set(chosen) - set(kinds):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    verdicts = ("right", "silent", "traceback", "executed", "hung")
    counts = {name: dict.fromkeys(verdicts, 0) for name in chosen}
    failures: list[str] = []
    end, case = time.monotonic() + options.seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), random.Random())
        while time.monotonic() < end:
            name = chosen[case % len(chosen)]
            fuzz.rng.seed(f"{options.seed} {name} {case}")
            verdict = outcome_of(fuzz, getattr(fuzz, name))
            counts[name][verdict] += 1
            if verdict != "right":
                failures.append(f"{verdict}: {name}, case {case} of seed {options.seed}")
                print(failures[-1], file=sys.stderr, flush=True)
            case += 1
    print("\n".join(failures))
    print("| kind | cases | silent | traceback | executed | hung |\n|---|---|---|---|---|---|")
    for name, found in counts.items():
        print(f"| {name} | {sum(found.values())} | {' | '.join(str(found[v]) for v in verdicts[1:])} |")
    total = {v: sum(found[v] for found in counts.values()) for v in verdicts}
    print(f"| all | {sum(total.values())} | {' | '.join(str(total[v]) for v in verdicts[1:])} |")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
