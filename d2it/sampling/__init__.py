"""Sampling: D2iT as one thing, and what a user says of its samples."""

from d2it.sampling.pipeline import D2iT, Samples

__all__ = ["D2iT", "Samples"]
