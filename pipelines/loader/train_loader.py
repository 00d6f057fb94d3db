"""Progressive resizing: one loader per stage of epochs, and the one iterator that goes from each to the next.

All stages are built at the start, so that a change of the image or batch size costs an epoch nothing. The order of the
samples and what is drawn for them do not depend on the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.epoch_iterator import EpochIterator
from pipelines.loader.loader import Batch, Loader
from pipelines.loader.prefetch import Plan


class StagedLoader:
    """Like a `Loader` of the epoch that `state` stands in: length, plan and image size are that epoch's."""

    def __init__(self, loaders: Sequence[Loader], starts: Sequence[int]) -> None:
        """starts: the first epoch of each loader, ascending from 0; a loader may come again later."""
        self._loaders, self._starts = tuple(loaders), tuple(starts)
        self._number = 0

    def at(self, epoch: int) -> Loader:
        return self._loaders[self._number_at(epoch)]

    @property
    def stages(self) -> Sequence[Loader]:
        return tuple(dict.fromkeys(self._loaders))

    @property
    def state(self) -> dict[str, int]:
        return self._current().state

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        current = self.at(state["epoch"])
        current.state = state
        self._number = self._number_at(state["epoch"])
        for stage in self.stages:
            if stage is not current:
                stage.end_iteration()

    @property
    def plan(self) -> Plan:
        return self._current().plan

    @property
    def image_size(self) -> int:
        return self._current().image_size

    @property
    def device(self) -> torch.device:
        return self._loaders[0].device

    @property
    def bad(self) -> BadSamples:
        return self._loaders[0].bad  # which all of them share

    @property
    def wait_s(self) -> float:
        return sum(loader.wait_s for loader in self.stages)

    def check_unchanged(self) -> None:
        """See `Loader`; all stages read the same files."""
        self._current().check_unchanged()

    def __len__(self) -> int:
        return len(self._current())

    def __iter__(self) -> EpochIterator[Batch]:
        """See `Loader`; an iterator of another stage ends as well."""
        self.end_iteration()
        return iter(self._current())

    def end_iteration(self) -> None:
        """End the last iterator, as a new one would."""
        for stage in self.stages:
            stage.end_iteration()

    def _number_at(self, epoch: int) -> int:
        return max(number for number, begin in enumerate(self._starts) if begin <= epoch)

    def _current(self) -> Loader:
        """The loader of the epoch that the last one used has come to."""
        state = self._loaders[self._number].state
        number = self._number_at(state["epoch"])
        if number != self._number:
            self._number = number
            self._loaders[number].state = state
        return self._loaders[number]


TrainLoader = Loader | StagedLoader
