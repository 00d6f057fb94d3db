"""When a run's checkpoints are written, and where in its epochs each of them stands. `checkpoint` knows their files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.staged import TrainLoader
from train import checkpoint, dist
from train.loop import Training

SAVE_EVERY_S = 300.0  # where train.save_every_steps is not set


class Saving:
    """Of one run, on all ranks, which must come here at the same step; the first one writes."""

    def __init__(
        self, folder: Path, training: Training, loader: TrainLoader, about: Mapping[str, Any], log_every_steps: int
    ) -> None:
        """about: what every checkpoint of this run says of it."""
        self._folder, self._training, self._loader, self._about = folder, training, loader, about
        self._log_every_steps = log_every_steps
        self._saved_s = time.monotonic()

    @property
    def position(self) -> dict[str, int]:
        """Where the loader stands, in optimizer steps: they mean the same however a global batch is cut into ranks and
        forward passes."""
        state = self._loader.state
        return {"epoch": state["epoch"], "step": state["step"] // self._training.config.accumulation_steps}

    def save(self, name: str) -> None:
        """As the run stands now; the sums are added up over ranks for it.

        Nothing that was trained on bytes that changed under the run is saved: a rank that finds any does not take part.
        """
        self._loader.check_unchanged()
        sums = dist.sum_over_ranks(self._training.sums.clone())
        if dist.is_first_rank():
            checkpoint.save(self._folder / name, self._training, sums, position=self.position, **self._about)

    def save_last(self) -> None:
        self.save("last.pt")
        self._saved_s = time.monotonic()

    def save_within_epoch(self, done: int) -> None:
        """After `done` updates of the run, where train.save_every_steps or the clock says so."""
        if self._loader.state["step"] != 0 and self._is_due(done):  # the end of an epoch saves anyhow
            self.save_last()

    def _is_due(self, done: int) -> bool:
        if (every_steps := self._training.config.save_every_steps) is not None:
            return done % every_steps == 0
        # the first rank's clock decides; looked at once per log interval, since all ranks wait for the answer
        return done % self._log_every_steps == 0 and dist.from_first_rank(
            lambda: time.monotonic() - self._saved_s >= SAVE_EVERY_S
        )
