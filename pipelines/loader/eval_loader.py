"""The loader of an evaluation split, which proves that it has visited every sample once."""

from __future__ import annotations

import numpy as np

from pipelines.interfaces import Position
from pipelines.loader.coverage import SampleChecksum, checksum
from pipelines.loader.epoch_iterator import Loader
from pipelines.loader.stage import Stage


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
