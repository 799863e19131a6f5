"""The class that diffusers loads with `custom_pipeline`; pip install 'd2it[sample]'."""

from d2it.sampling.diffusers_pipeline import D2iTPipeline

__all__ = ["D2iTPipeline"]
