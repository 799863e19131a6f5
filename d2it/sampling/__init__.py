"""Sampling: D2iT as one thing, and how its samples are asked for: options, grain maps, the command line."""

from d2it.sampling.pipeline import D2iT, Samples

__all__ = ["D2iT", "Samples"]
