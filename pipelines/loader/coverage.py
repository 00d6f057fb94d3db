"""Order-independent checksums of the samples that an iteration visited."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.rng import hash64

MODULUS = 2**64


@dataclass(frozen=True)
class SampleChecksum:
    """Number of samples, and the sum of a hash of each sample's index modulo 2^64.

    A sample visited twice in place of another changes the sum with probability 1 - 2^-64.
    """

    samples: int = 0
    checksum: int = 0

    def __add__(self, other: SampleChecksum) -> SampleChecksum:
        return SampleChecksum(self.samples + other.samples, (self.checksum + other.checksum) % MODULUS)


EMPTY = SampleChecksum()


def checksums(indices: np.ndarray, batch_size: int) -> list[SampleChecksum]:
    """Return the checksum of each batch of consecutive samples; indices: int64 [N].

    All batches are computed at once, since the overhead of NumPy calls dominates for small batches.
    """
    starts = np.arange(0, len(indices), batch_size)
    sums = np.add.reduceat(hash64(indices.view(np.uint64)), starts)
    sizes = np.minimum(batch_size, len(indices) - starts)
    return [SampleChecksum(*pair) for pair in zip(sizes.tolist(), sums.tolist(), strict=True)]


@lru_cache(maxsize=8)  # needed after every evaluation
def split_checksum(samples: int) -> SampleChecksum:
    """Return the checksum of range(samples)."""
    return checksums(np.arange(samples, dtype=np.int64), samples)[0]
