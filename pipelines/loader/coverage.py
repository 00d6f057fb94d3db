"""Order-independent checksums of the samples that an iteration visited."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.rng import hash64

MODULUS = 2**64


@dataclass(frozen=True)
class SampleChecksum:
    """Number of visited samples, and the sum of their hashed indices modulo 2^64.

    If one sample is visited twice and another one is missed, the sum always changes, since the hash is a bijection.
    """

    samples: int = 0
    checksum: int = 0

    def __add__(self, other: SampleChecksum) -> SampleChecksum:
        return SampleChecksum(self.samples + other.samples, (self.checksum + other.checksum) % MODULUS)


EMPTY = SampleChecksum()


def checksums(indices: np.ndarray, batch_size: int) -> list[SampleChecksum]:
    """Return one checksum for each batch.

    All checksums are computed at once, since the overhead of NumPy calls dominates for small batches.

    Args:
        indices: Sample indices of consecutive batches, int64 [N].
        batch_size: Samples per batch; the last batch may be smaller.
    """
    starts = np.arange(0, len(indices), batch_size)
    sums = np.add.reduceat(hash64(indices.view(np.uint64)), starts)
    sizes = np.minimum(batch_size, len(indices) - starts)
    return [SampleChecksum(*pair) for pair in zip(sizes.tolist(), sums.tolist(), strict=True)]


@lru_cache(maxsize=8)  # needed after every evaluation
def split_checksum(samples: int) -> SampleChecksum:
    """Return the checksum of a split with `samples` samples, each visited once."""
    return checksums(np.arange(samples, dtype=np.int64), samples)[0]
