"""d2it: the Dynamic Diffusion Transformer, built around its kernels."""

__version__ = "0.1.0"
