"""What the benchmark trains: the tiers (data, sizes, budgets) and the variants, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tier:
    """Data, sizes and budgets that all variants of a tier share.

    Args:
        name: of the tier, and of its folder of results.
        image_size: pixels.
        classes: names of the classes of the pack that are taken; () is all.
        vaes: by name, the settings of `dvae.overrides`; "thresholds" comes from the entropies of the images.
        shares: by name of the VAE, the shares of regions above each threshold.
        vae: settings of the section `dvae`.
        grain: settings of the section `grain`.
        content: settings of the section `content`; "overrides" are the sizes that all variants share.
        depth: blocks in all, of the trunk and RefineNet together.
        budget: multiply-accumulates of a variant's training: three times the forward pass of all its images.
        samples: images of one seed of sampling.
        seeds: of sampling, and of the noise of the held-out denoising error.
        scheduler: of sampling; both paths know it.
        steps: of sampling.
        held_out: images of the held-out set; None is all.
        errors: how many of them measure the denoising error.
        rebuilt: how many of them measure a VAE at every share of fine regions.
        extractor: of the scores.
        side: pixels of the extractor's images; None is its own.
        checkpoints: parts of the training, after each of which the curve of a core variant has a point; that of another
            one has the last alone.
    """

    name: str
    image_size: int
    classes: tuple[str, ...]
    vaes: dict[str, dict[str, Any]]
    shares: dict[str, tuple[float, ...]]
    vae: dict[str, Any]
    grain: dict[str, Any]
    content: dict[str, Any]
    depth: int
    budget: float
    samples: int
    seeds: tuple[int, ...] = (0, 1, 2)
    scheduler: str = "dpm++"
    steps: int = 25
    held_out: int | None = None
    errors: int = 256
    rebuilt: int = 256
    extractor: str = "efficientnet-lite0"
    side: int | None = None
    checkpoints: int = 4


@dataclass(frozen=True)
class Variant:
    """A content transformer that is trained and scored.

    Args:
        what: in a few words.
        vae: whose latents it is trained on, a key of `Tier.vaes`.
        refine: blocks of RefineNet; 0 trains the Multi-grained Net alone; None is a plain DiT.
        added: blocks beyond the tier's depth.
        share: of fine regions; None is the VAE's own. Another one gives the VAE other thresholds.
        diffusion: settings of the section `diffusion`.
        content: further settings of the section `content`.
        overrides: further settings of the model.
        maps: where the grain maps of the samples come from; the first one gives the variant's scores.
        seed: of the training.
        repeats: the variant that this one is again, from another seed: how far one training is from the next.
        core: whether it is one of the few that everything else is held against.
    """

    what: str
    vae: str = "two"
    refine: int | None = 1
    added: int = 0
    share: float | None = None
    diffusion: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    maps: tuple[str, ...] = ("predicted",)
    seed: int = 0
    repeats: str | None = None
    core: bool = False


VARIANTS: dict[str, Variant] = {
    "d2it": Variant("D2iT as the paper has it", maps=("predicted", "true", "random"), core=True),
    "d2it-v": Variant("the same, predicting v", diffusion={"prediction": "v"}, core=True),
    "dit": Variant("DiT of the same width and depth, on a VAE of fine codes alone", vae="fine", refine=None, core=True),
    "dit-v": Variant("DiT predicting v", vae="fine", refine=None, diffusion={"prediction": "v"}, core=True),
    "d2it-3": Variant("three grains: about as many codes on a quarter of the trunk's tokens", vae="three", core=True),
    "d2it-seed1": Variant("D2iT from another seed", seed=1, repeats="d2it"),
    "routing": Variant(
        "grained noise and the grain embedding, without RefineNet, every cell weighing 1 in the loss",
        refine=0,
        content={"dynamic_loss": False},
    ),
    "refine-0": Variant("the same with the loss weighed by codes (Eq. 11)", refine=0),
    "refine-2": Variant("two of the blocks in RefineNet", refine=2),
    "refine-4": Variant("four of the blocks in RefineNet", refine=4),
    "added-1": Variant("a block of RefineNet on top of the trunk's", added=1),
    "added-2": Variant("two blocks of RefineNet on top of the trunk's", refine=2, added=2),
    "fine-0": Variant("D2iT's trunk on a VAE of coarse codes alone", vae="coarse", refine=None),
    "fine-30": Variant("D2iT at 30 % fine regions", share=0.3),
    "fine-70": Variant("D2iT at 70 % fine regions", share=0.7),
    "d2it-v-seed1": Variant(
        "D2iT predicting v, from another seed", diffusion={"prediction": "v"}, seed=1, repeats="d2it-v"
    ),
    "dit-v-seed1": Variant(
        "DiT predicting v, from another seed",
        vae="fine",
        refine=None,
        diffusion={"prediction": "v"},
        seed=1,
        repeats="dit-v",
    ),
    "repa": Variant(
        "D2iT with REPA: half-way up, the trunk follows EfficientNet-Lite2, which does not judge",
        content={"repa": {"teacher": "efficientnet-lite2", "block": 3, "weight": 0.5, "hidden": 256}},
    ),
    "d2it-flow": Variant(
        "the linear path, predicting the velocity", diffusion={"path": "linear", "prediction": "velocity"}
    ),
    "d2it-x0": Variant("predicting x_0, the loss in v", diffusion={"prediction": "sample", "weighting": "v"}),
    "until-60": Variant("refining the cleaner 60 % of the timesteps alone", overrides={"refine_until": 0.6}),
}

CPU = Tier(
    name="cpu",
    image_size=32,
    classes=("church", "golf ball", "parachute"),
    vaes={
        "two": {"downsampling": [4, 8], "encoder_mult": [1, 2, 4, 8], "decoder_mult": [1, 2, 4]},
        "three": {"downsampling": [4, 8, 16], "encoder_mult": [1, 2, 4, 8, 8], "decoder_mult": [1, 2, 4]},
        "fine": {"downsampling": [4], "encoder_mult": [1, 2, 4], "decoder_mult": [1, 2, 4]},
        "coarse": {"downsampling": [8], "encoder_mult": [1, 2, 4, 8], "decoder_mult": [1, 2, 4, 8]},
    },
    shares={"two": (0.5,), "three": (0.75, 0.5), "fine": (), "coarse": ()},
    vae={
        "preset": "tiny",
        "overrides": {"channels": 8, "latent_channels": 16, "num_bins": 256},
        "steps": 1000,
        "batch_size": 16,
        "lr": 3e-3,
        "betas": [0.9, 0.99],
        "warmup": 20,
        "schedule": "cosine",
        "ema": 0.98,
        "loss": {"disc_start": None, "features": "efficientnet-lite2", "features_weight": 1.0},
    },
    grain={
        "preset": "tiny",
        "steps": 300,
        "batch_size": 32,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "warmup": 20,
        "schedule": "cosine",
        "ema": 0.98,
    },
    content={
        "preset": "tiny",
        "overrides": {"dim": 128, "heads": 4, "learn_sigma": False},
        "batch_size": 32,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "warmup": 50,
    },
    depth=6,
    budget=8e11,
    samples=256,
    steps=10,
    side=96,
    errors=128,
    checkpoints=5,
)

GPU = Tier(
    name="gpu",
    image_size=128,
    classes=(),
    vaes={
        "two": {"downsampling": [8, 16], "encoder_mult": [1, 1, 2, 2, 4], "decoder_mult": [1, 1, 2, 2]},
        "three": {"downsampling": [8, 16, 32], "encoder_mult": [1, 1, 2, 2, 4, 4], "decoder_mult": [1, 1, 2, 2]},
        "fine": {"downsampling": [8], "encoder_mult": [1, 1, 2, 2], "decoder_mult": [1, 1, 2, 2]},
        "coarse": {"downsampling": [16], "encoder_mult": [1, 1, 2, 2, 4], "decoder_mult": [1, 1, 2, 2, 4]},
    },
    shares={"two": (0.5,), "three": (0.75, 0.5), "fine": (), "coarse": ()},
    vae={
        "preset": "tiny",
        "overrides": {"channels": 32, "latent_channels": 8, "num_bins": 256},
        "steps": 500,
        "batch_size": 32,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "warmup": 50,
        "schedule": "cosine",
        "ema": 0.99,
        "loss": {"disc_start": None, "features": "efficientnet-lite2"},
    },
    grain={
        "preset": "tiny",
        "steps": 400,
        "batch_size": 128,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "warmup": 50,
        "schedule": "cosine",
        "ema": 0.99,
    },
    content={
        "preset": "D2iT-S",
        "overrides": {"dim": 384, "heads": 6, "learn_sigma": False, "window": 8, "relative_bias": "matrix"},
        "batch_size": 256,
        "lr": 5e-4,
        "betas": [0.9, 0.99],
        "warmup": 50,
    },
    depth=12,
    budget=4e14,
    samples=1024,
    steps=16,
)

TIERS = {tier.name: tier for tier in (CPU, GPU)}
