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


def checksum(indices: np.ndarray) -> SampleChecksum:
    """Return the checksum of the samples `indices`, int64 [N]."""
    return SampleChecksum(len(indices), int(hash64(indices.view(np.uint64)).sum()))


@lru_cache(maxsize=8)  # needed after every evaluation
def split_checksum(samples: int) -> SampleChecksum:
    """Return the checksum of a split with `samples` samples, each visited once."""
    return checksum(np.arange(samples, dtype=np.int64))
