"""`read_grain_maps` is in `d2it.sampling.grain_maps`; this name stays for code written before it moved there."""

from d2it.sampling.grain_maps import read_grain_maps as read_grain_maps
