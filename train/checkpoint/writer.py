"""Writes a run's checkpoints in a thread, one at a time. `checkpoint` knows their files, `fit` when they are due."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint import store
from train.checkpoint.state import collect_state, to_host
from train.checkpoint.store import LAST, PREVIOUS
from train.distributed.process_group import is_first_rank
from train.engine.epoch import TrainState

SAVE_INTERVAL_S = 300.0  # where train.save_every_steps is not set


class CheckpointWriter:
    """Of one run, on all ranks, of which the first writes.

    Training waits for the copy to host memory, and for the checkpoint before where that is still being written. An
    error in writing is raised by the next call of anything here.
    """

    def __init__(self, folder: Path, training: TrainState, about: Mapping[str, Any]) -> None:
        """about: what every checkpoint of this run says of it."""
        self.folder = folder
        self.newest: Path | None = None  # the checkpoint that the run would go on from; None: there is none yet
        self.steps = 0  # optimizer steps of the run that it holds
        self._training, self._about = training, about
        self._saved_s = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "save")
        self._written: Future[None] | None = None

    def mark_saved(self, newest: Path, steps: int) -> None:
        """The run stands where this checkpoint does."""
        self.newest, self.steps = newest, steps

    @property
    def has_own_checkpoint(self) -> bool:
        """Whether the newest checkpoint is one of this folder's own."""
        return self.newest is not None and self.newest in [self.folder / name for name in (LAST, PREVIOUS)]

    def is_due(self) -> bool:
        """Whether the newest checkpoint is older than SAVE_INTERVAL_S."""
        return time.monotonic() - self._saved_s >= SAVE_INTERVAL_S

    def save(self, names: tuple[str, ...], position: Mapping[str, int], sums: Tensor, steps: int) -> None:
        """As the run stands now: last.pt, which the one before makes room for, or others such as best.pt.

        position: epoch, and optimizer steps done in it, which mean the same however a global batch is cut into ranks
        and forward passes; sums: the training's over all ranks; steps: done in all.
        """
        if LAST in names:
            self._saved_s = time.monotonic()
            self.mark_saved(self.folder / LAST, steps)
        if not is_first_rank():
            return
        self.wait()
        content = collect_state(self._training, sums, position=dict(position), **self._about)
        self._written = self._thread.submit(write_all, self.folder, names, to_host(content))

    def check(self) -> None:
        """Raise what went wrong in writing, without waiting."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Until the newest checkpoint stands."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """A write under way ends first; by then its error is nobody's any more."""
        self._thread.shutdown()


def write_all(folder: Path, names: tuple[str, ...], content: dict[str, Any]) -> None:
    for name in names:
        if name == LAST:
            store.write_last(folder, content)
        else:
            store.write(folder / name, content)
