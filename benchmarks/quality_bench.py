"""Diffusion transformers at one budget of multiply-accumulates, scored: which of the paper's claims hold here.

    python benchmarks/quality_bench.py --tier cpu                     # the core, then everything else
    python benchmarks/quality_bench.py --tier cpu --only dit d2it     # these variants alone
    python benchmarks/results.py --plots                              # docs/evidence.md and the plots, from the results

Every variant is trained by d2it's own stages on cached latents, for the same multiply-accumulates, and scored on
held-out images: the error of its denoising, and Frechet and kernel distance, precision, recall and class accuracy of
its samples in the features of EfficientNet-Lite0, over three seeds of sampling; beside them stand the distances of as
many real images, and of those as the VAE rebuilds them. The VAEs are trained once a tier and shared.
`benchmarks/quality/tiers.py` has the tiers and the variants.

What is killed goes on where it was when the same command is given again, and the same seed gives the same bits on the
same machine and number of threads. Data: two packs of images (docs/data.md), for training and held out; by default
Imagenette's in the folder that the variable D2IT_DATA names. Needs d2it[train,eval,lite], and matplotlib for the plots.
Results go to benchmarks/results/quality/<tier>/<variant>.json, the work (VAEs, latents, weights) to
runs/quality/<tier>.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from quality.scores import Scorer, timing
from quality.stages import Bench, digest, train_variant, write_json
from quality.tiers import TIERS, VARIANTS
from rows import RESULTS

from d2it import distributed
from d2it.errors import run_command
from d2it.files import only_writer

ROOT = machine.ROOT
DATA = Path(os.environ.get("D2IT_DATA", "data"))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="quality_bench.py"
    )
    parser.add_argument("--tier", choices=sorted(TIERS), required=True, help="data, sizes and budget")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help="these variants alone")
    parser.add_argument("--core", action="store_true", help="the core alone: " + ", ".join(core()))
    parser.add_argument("--train", type=Path, default=DATA / "imagenette128_train.npz", help="pack (%(default)s)")
    parser.add_argument("--held-out", type=Path, default=DATA / "imagenette128_val.npz", help="pack (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the trained parts (runs/quality/<tier>)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality", help="folder of the results (%(default)s)")
    return parser


def core() -> list[str]:
    return [name for name, variant in VARIANTS.items() if variant.core]


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the variants, the core first."""
    if options.only:
        return list(options.only)
    rest = [] if options.core else [name for name in VARIANTS if name not in core()]
    return core() + rest


def bench(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Trains and scores the variants; each one's result is written when it is there."""
    tier = TIERS[options.tier]
    work = options.work or ROOT / "runs" / "quality" / tier.name
    with distributed.joined("auto") as world:
        work.mkdir(parents=True, exist_ok=True)
        with only_writer(work):
            scorer = Scorer(Bench(tier, work, world, (options.train, options.held_out)))
            for name in names:
                measure(scorer, name, options.results / tier.name)


def measure(scorer: Scorer, name: str, results: Path) -> dict[str, Any]:
    """Trains a variant, scores it and writes its result.

    Args:
        scorer: of the tier in its folder.
        name: a key of `VARIANTS`.
        results: folder of the result.

    Returns:
        What was written.
    """
    made, variant, start = scorer.bench, VARIANTS[name], time.monotonic()
    plan = train_variant(made, name, variant)
    trained = time.monotonic()
    scores = scorer.variant(name, variant, plan)
    reconstruction = scorer.reconstruction(variant.vae)
    content = {
        "variant": name,
        "tier": made.tier.name,
        "tier_digest": digest(made.tier),
        "what": variant.what,
        **machine.header(),
        "vae": made.vae(variant),
        "settings": {key: value for key, value in dataclasses.asdict(variant).items() if key not in ("what", "core")},
        "macs_image": plan.macs,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "samples": made.tier.samples,
        "seeds": list(made.tier.seeds),
        "extractor": scorer.extractor.name,
        "floor": scorer.floor(),
        "scores": scores,
        "reconstruction": reconstruction,
        # What no repetition gives again.
        "seconds": {
            "training": timing(made, name, scores["curve"]),
            "this_call": {"training": trained - start, "scoring": time.monotonic() - trained},
        },
    }
    write_json(results / f"{name}.json", content)
    error = scores["error"]
    own = scores["samples"][variant.maps[0]]
    print(
        f"{name}: denoising error {error['mean']:.4f} +- {error['spread']:.4f}, "
        f"FD {own['fd']['mean']:.2f} +- {own['fd']['spread']:.2f}, KD {own['kd']['mean']:.1f} +- "
        f"{own['kd']['spread']:.1f}, accuracy {own['accuracy']['mean']:.0%}",
        flush=True,
    )
    return content


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    return run_command(lambda: bench(options, chosen(options)))


if __name__ == "__main__":
    raise SystemExit(main())
