"""What an iteration handed over: how many samples, and a checksum of which they were, whatever their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.rng import hash64

MODULUS = 2**64


@dataclass(frozen=True)
class SampleChecksum:
    """samples: their number; checksum: the sum of a hash of each one's index, modulo 2^64.

    A sample that comes twice in another one's place shows, but for one time in 2^64.
    """

    samples: int = 0
    checksum: int = 0

    def __add__(self, other: SampleChecksum) -> SampleChecksum:
        return SampleChecksum(self.samples + other.samples, (self.checksum + other.checksum) % MODULUS)


EMPTY = SampleChecksum()


def checksums(indices: np.ndarray, batch_size: int) -> list[SampleChecksum]:
    """Of each batch of consecutive samples, int64 [N]; together, since NumPy's calls take most of the time of few."""
    starts = np.arange(0, len(indices), batch_size)
    sums = np.add.reduceat(hash64(indices.view(np.uint64)), starts)
    sizes = np.minimum(batch_size, len(indices) - starts)
    return [SampleChecksum(*pair) for pair in zip(sizes.tolist(), sums.tolist(), strict=True)]


@lru_cache(maxsize=8)  # asked for after every evaluation
def split_checksum(samples: int) -> SampleChecksum:
    """Of each of range(samples) once."""
    return checksums(np.arange(samples, dtype=np.int64), samples)[0]
