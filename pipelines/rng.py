"""Counter-based random numbers for each sample and epoch.

Every draw is a hash of (seed, epoch, purpose, sample index, draw number). A draw does not depend on the batch, the
rank, the number of workers or earlier draws.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def hash64(values: np.ndarray) -> np.ndarray:
    """Apply one step of splitmix64, a bijection of 64-bit integers.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    values = values + np.uint64(_GOLDEN)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=64)  # cached, since hashing single numbers takes longer than the draws of a batch
def stream(seed: int, epoch: int, purpose: str) -> np.uint64:
    """Return the 64-bit key of a stream of draws. Adding a purpose does not change the streams of other purposes."""
    key = np.uint64(0)
    for part in (seed, epoch, zlib.crc32(purpose.encode())):
        key = hash64(np.array([int(key) ^ (part & _MASK)], np.uint64))[0]
    return key


def view_seed(seed: int, view: int) -> int:
    """Return the seed of the draws of a view, counted from 0: `seed` itself for view 0, otherwise a hash of both."""
    return seed if view == 0 else int(stream(seed, view, "view") >> np.uint64(1))


def uniform(samples: np.ndarray, seed: int, epoch: int, purpose: str, draws: int) -> np.ndarray:
    """Draw uniform numbers in [0, 1) for each sample index in `samples`: float64 [len(samples), draws]."""
    base = hash64(samples.astype(np.uint64) ^ stream(seed, epoch, purpose))
    counter = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (hash64(base[:, None] + counter) >> np.uint64(11)) * 2.0**-53


def normal(samples: np.ndarray, seed: int, epoch: int, purpose: str, draws: int) -> np.ndarray:
    """Draw standard normal numbers for each sample index in `samples`: float64 [len(samples), draws].

    Each number uses two uniform draws. Source: Box and Muller, "A Note on the Generation of Random Normal Deviates",
    1958.
    """
    drawn = uniform(samples, seed, epoch, purpose, 2 * draws)
    radius = np.sqrt(-2.0 * np.log1p(-drawn[:, :draws]))  # 1 - u is never 0
    return radius * np.cos(2.0 * np.pi * drawn[:, draws:])
