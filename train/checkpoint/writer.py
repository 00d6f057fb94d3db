"""Write the checkpoints of a run in a background thread, one at a time."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from pipelines.interfaces import Position
from train.checkpoint import store
from train.checkpoint.progress import RunInfo
from train.checkpoint.state import Checkpoint, collect_state, to_host
from train.checkpoint.store import LAST, PREVIOUS
from train.distributed.process_group import is_first_rank
from train.engine.state import TrainState

SAVE_INTERVAL_S = 300.0  # used if train.save_every_steps is not set


class CheckpointWriter:
    """Writes checkpoints on rank 0, and tracks the newest one on all ranks.

    `save` waits for the copy to host memory, and for the previous checkpoint if it is still being written. If writing
    fails in the background thread, the next call to `save` or `wait` raises the error. `check` raises it only after the
    write has ended.

    Args:
        folder: The run folder.
        state: The training state to save.
        run_info: Entries of every checkpoint of this run. They are read at each save.
    """

    def __init__(self, folder: Path, state: TrainState, run_info: RunInfo) -> None:
        self.folder = folder
        self.newest: Path | None = None  # the checkpoint to resume from, if any
        self.steps = 0  # optimizer steps of the run at `newest`
        self._state, self._run_info = state, run_info
        self._saved_s = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "save")
        self._write: Future[None] | None = None

    def mark_saved(self, newest: Path, steps: int) -> None:
        """Record that the checkpoint `newest` contains the state of the run after `steps` optimizer steps."""
        self.newest, self.steps = newest, steps

    @property
    def has_own_checkpoint(self) -> bool:
        """True if the newest checkpoint is last.pt or previous.pt in the folder of this run."""
        return self.newest is not None and self.newest in [self.folder / name for name in (LAST, PREVIOUS)]

    def is_due(self) -> bool:
        """Return True if SAVE_INTERVAL_S has passed since last.pt was last saved, or since the writer was created."""
        return time.monotonic() - self._saved_s >= SAVE_INTERVAL_S

    def save(self, names: tuple[str, ...], position: Position, sums: Tensor, steps: int) -> None:
        """Copy the current state to host memory, and write it to each of `names` in the background.

        Only rank 0 copies and writes. If `names` contains last.pt, all ranks record last.pt as the newest checkpoint.
        See `store.write_last` for what happens to the existing last.pt.

        Args:
            names: File names, e.g. last.pt and best.pt.
            position: The epoch, and the number of optimizer steps done in this epoch.
            sums: The metric sums of the epoch so far, over all ranks.
            steps: Optimizer steps of the run so far.

        Raises:
            UserError: The previous write failed.
        """
        if LAST in names:
            self._saved_s = time.monotonic()
            self.mark_saved(self.folder / LAST, steps)
        if not is_first_rank():
            return
        self.wait()
        checkpoint = collect_state(self._state, sums, position=asdict(position), **self._run_info.entries())
        self._write = self._thread.submit(write_all, self.folder, names, to_host(checkpoint))

    def check(self) -> None:
        """Raise the error of a write that has failed. Does not wait for a write in progress."""
        if self._write is not None and self._write.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress, and raise its error if it failed."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the write in progress, without raising its error. Call `wait` first to raise it."""
        self._thread.shutdown()


def write_all(folder: Path, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """Write the same checkpoint to each of `names` in the folder. Raises UserError if a file cannot be written."""
    for name in names:
        if name == LAST:
            store.write_last(folder, checkpoint)
        else:
            store.write(folder / name, checkpoint)
