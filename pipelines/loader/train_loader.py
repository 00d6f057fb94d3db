"""The loader of a training split, with one or more stages (progressive resizing)."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipelines.interfaces import Position
from pipelines.loader.epoch_iterator import Loader
from pipelines.loader.stage import Stage


class TrainLoader(Loader):
    """Loader of training batches, whose length, plan and image size depend on the stage of the current epoch.

    The stages are built in advance, so a new one does not delay an epoch. The order of the samples does not depend on
    the stages.

    Args:
        stages: What makes the batches of each stage. Several stages may be the same object.
        starts: First epoch of each stage, ascending from 0.
        augment: Applied to the images of each batch, see `Loader`.
        epochs: Number of epochs of the run, which ends the reading ahead; None: unknown.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        starts: Sequence[int] = (0,),
        augment: Callable[[torch.Tensor, Position], torch.Tensor] | None = None,
        epochs: int | None = None,
    ) -> None:
        super().__init__(stages[0])
        self.augment, self._epochs = augment, epochs
        self._stages, self._starts = tuple(stages), tuple(starts)
        self._position = Position(0)

    def single_stage(self, stage: Stage | None = None) -> TrainLoader:
        """Return a loader of one stage, the first if `stage` is None, for all epochs. The augmentation is the same."""
        return TrainLoader([stage or self._stages[0]], augment=self.augment)

    def at(self, epoch: int) -> Stage:
        """Return the stage of an epoch."""
        return self._stages[bisect(self._starts, epoch) - 1]

    @property
    def stages(self) -> Sequence[Stage]:
        """All distinct stages, in order."""
        return tuple(dict.fromkeys(self._stages))

    @property
    def stage(self) -> Stage:
        """The stage of the current epoch."""
        return self.at(self._position.epoch)

    @property
    def position(self) -> Position:
        """Position of the next batch. The step is the number of batches of the epoch that have been consumed.

        Setting the position ends an iterator that has started, and raises ValueError if the epoch or step is out of
        range. An iterator that has not started begins at the new position.
        """
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        steps = len(self.at(max(position.epoch, 0)))
        if position.epoch < 0 or not 0 <= position.step < steps:
            raise ValueError(f"loader position {position} is outside of epochs of {steps} steps")
        self.end_iteration(only_started=True)
        self.drop_ahead()
        self._position = position

    def start_iteration(self) -> Position:
        return self._position

    def next_stage(self) -> Stage | None:
        epoch = self._position.epoch + 1
        return self.at(epoch) if self._epochs is None or epoch < self._epochs else None

    def count(self, indices: np.ndarray, *, is_last: bool) -> None:
        epoch, step = self._position.epoch, self._position.step
        self._position = Position(epoch + 1) if is_last else Position(epoch, step + 1)
