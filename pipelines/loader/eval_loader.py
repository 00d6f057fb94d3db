"""The loader of an evaluation split, which proves that it has visited every sample once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.interfaces import Position
from pipelines.loader.epoch_iterator import Loader
from pipelines.loader.stage import Stage
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


class EvalLoader(Loader):
    """Loader of evaluation batches. Every iterator starts at the first batch."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self._stage = stage
        self._visited: list[np.ndarray] = []

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def seen(self) -> SampleChecksum:
        """Checksum of the samples that the newest iterator has visited."""
        return checksum(np.concatenate([np.empty(0, np.int64), *self._visited]))

    def start_iteration(self) -> Position:
        self._visited.clear()
        return Position(0)

    def count(self, indices: np.ndarray, *, is_last: bool) -> None:
        self._visited.append(indices)
