"""Progressive resizing with one loader per stage, behind the interface of a single loader.

A stage is a range of epochs with the same image size and batch size. The loaders of all stages are built in
advance, so a new stage does not delay an epoch. The order of the samples does not depend on the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.interfaces import Position
from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.batches import Batch, BatchPlan
from pipelines.loader.epoch_iterator import EpochIterator
from pipelines.loader.loader import Loader


class StagedLoader:
    """Loader whose length, plan and image size depend on the stage of the current epoch.

    Args:
        loaders: Loader of each stage. Stages can share a loader.
        starts: First epoch of each stage, ascending from 0.
    """

    def __init__(self, loaders: Sequence[Loader], starts: Sequence[int]) -> None:
        self._loaders, self._starts = tuple(loaders), tuple(starts)
        self._current_stage = 0

    def at(self, epoch: int) -> Loader:
        """Return the loader of an epoch."""
        return self._loaders[self._stage_at(epoch)]

    @property
    def stages(self) -> Sequence[Loader]:
        """All distinct loaders, in the order of their first stage."""
        return tuple(dict.fromkeys(self._loaders))

    @property
    def position(self) -> Position:
        """See `Loader.position`."""
        return self._current().position

    @position.setter
    def position(self, position: Position) -> None:
        current = self.at(position.epoch)
        current.position = position
        self._current_stage = self._stage_at(position.epoch)
        for stage in self.stages:
            if stage is not current:
                stage.end_iteration()

    @property
    def plan(self) -> BatchPlan:
        return self._current().plan

    @property
    def image_size(self) -> int:
        return self._current().image_size

    @property
    def device(self) -> torch.device:
        return self._loaders[0].device

    @property
    def bad(self) -> BadSamples:
        return self._loaders[0].bad  # shared by all stages

    @property
    def wait_s(self) -> float:
        return sum(loader.wait_s for loader in self.stages)

    def check_unchanged(self) -> None:
        """See `Loader.check_unchanged`. One check is enough, since all stages read the same files."""
        self._current().check_unchanged()

    def __len__(self) -> int:
        return len(self._current())

    def __iter__(self) -> EpochIterator[Batch]:
        """See `Loader.__iter__`. Creating an iterator ends any earlier one, whichever stage it belongs to."""
        self.end_iteration()
        return iter(self._current())

    def end_iteration(self) -> None:
        """End the newest iterator, as creating another iterator would."""
        for stage in self.stages:
            stage.end_iteration()

    def _stage_at(self, epoch: int) -> int:
        return max(number for number, start in enumerate(self._starts) if start <= epoch)

    def _current(self) -> Loader:
        """Return the loader of the current epoch.

        If the stage has changed, pass the position on from the loader of the previous stage.
        """
        position = self._loaders[self._current_stage].position
        stage = self._stage_at(position.epoch)
        if stage != self._current_stage:
            self._current_stage = stage
            self._loaders[stage].position = position
        return self._loaders[stage]


TrainLoader = Loader | StagedLoader
