"""Random numbers and orders that follow from (seed, epoch or position) alone.

NumPy promises a fixed stream for its bit generators but not for the distributions built on them, so only raw
Philox words are used: the same seed gives the same order under every version, worker count and world size, and
no global generator moves.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Streams keep orders, augmentations and noise apart where seed and counter agree.
_ORDER, _AUGMENT = 1, 2


def seed_of(*parts: int | str) -> int:
    """Returns a 63-bit seed for these parts (run seed, step, rank, ...), the same on every machine and version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def derived_seed(seed: int, purpose: str) -> int:
    """Returns a seed of its own for each purpose, so that the noise of a map and of its content are independent."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "big") >> 1


def _philox(seed: int, counter: int, stream: int) -> np.random.Philox:
    word = (1 << 64) - 1
    return np.random.Philox(key=np.array([seed & word, counter & word], np.uint64), counter=[0, 0, 0, stream])


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the (count,) int64 order of one epoch."""
    return np.argsort(_philox(seed, epoch, _ORDER).random_raw(count), kind="stable")


class Draws:
    """Uniform numbers for one sample, which follow from the seed and the sample's position in the training stream.

    Args:
        seed: of the run.
        position: images seen before this sample.
    """

    def __init__(self, seed: int, position: int) -> None:
        self._bits = _philox(seed, position, _AUGMENT)

    def uniform(self) -> float:
        """Returns the next number in [0, 1)."""
        return (self._bits.random_raw() >> 11) * 2.0**-53

    def below(self, bound: int) -> int:
        """Returns the next integer in [0, bound); bound must be far below 2^53."""
        return int(self.uniform() * bound)
