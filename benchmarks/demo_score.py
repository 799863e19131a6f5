"""How well the demo or the showcase does: the samples that a classifier recognises, and distances from photographs.

    python benchmarks/demo_score.py runs/demo
    python showcase/crops.py --first 64 --output held_out.npz && \
        python benchmarks/demo_score.py showcase --data held_out.npz

The classifier is the nearest class mean in the features of an EfficientNet-Lite; means and distances are those of crops
that the model was not trained on, drawn as those that it was. Lite0 taught the VAE (`dvae.loss.features`), so a
distance by Lite2 is the one to read for reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from d2it import pictures
from d2it.data import DemoPhotos, open_source
from d2it.evaluation.extractors import open_extractor
from d2it.evaluation.generation import Summary, compare, summarize
from d2it.sampling import D2iT

METRICS = ("kd", "accuracy")


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run or of the model")
    parser.add_argument("--data", help="held-out images with the run's classes, as train.py reads them (the demo's)")
    parser.add_argument("--trained-on", type=int, default=512, metavar="N", help="crops of the demo (%(default)s)")
    parser.add_argument("--crops", type=int, default=512, help="held-out crops of the demo (%(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="samples (%(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of the first sample (%(default)s)")
    parser.add_argument("--guidance", type=float, help="its scale (the run's own)")
    options = parser.parse_args()

    d2it = D2iT.from_pretrained(options.run)
    if options.data:
        source = open_source(options.data, d2it.image_size)
        batch = source.fetch(range(len(source)))
    else:
        source = DemoPhotos(d2it.image_size, crops=options.trained_on + options.crops)
        batch = source.fetch(range(options.trained_on, len(source)))
    photos, true = batch["image"], batch["label"]
    drawn = torch.arange(options.samples) % source.num_classes
    samples = d2it(labels=drawn, seed=options.seed, guidance=options.guidance)
    rebuilt = torch.cat([_rebuilt(d2it, part) for part in photos.split(32)])
    error = (rebuilt.float() - photos.float()).div(255).square().mean(dim=(1, 2, 3))
    print(f"reconstructions: PSNR {float((-10 * error.log10()).mean()):.2f} dB")
    for name in ("efficientnet-lite0", "efficientnet-lite2"):
        extractor, _ = open_extractor(name)

        def of(images: Tensor, labels: Tensor, extractor: torch.nn.Module = extractor) -> Summary:
            return summarize(images.split(32), extractor, metrics=METRICS, labels=labels.split(32))

        reference = of(photos, true)
        made = torch.from_numpy(samples.uint8()).permute(0, 3, 1, 2)
        for what, summary in (("reconstructions", of(rebuilt, true)), ("samples", of(made, drawn))):
            found = compare(summary, reference, METRICS)
            print(
                f"{what} by {name}: kernel distance {found['kd']:.0f} +- {found['kd_error']:.0f}, "
                f"class recognised in {found['accuracy']:.1%} of {summary.count}"
            )


@torch.inference_mode()
def _rebuilt(d2it: D2iT, images: Tensor) -> Tensor:
    mean, _, grains, _ = d2it.vae.encode(pictures.from_uint8(images))
    return pictures.to_uint8(d2it.vae.decode(mean, grains))


if __name__ == "__main__":
    main()
