"""Interfaces between the parts of a loader: sources of samples, and runners that turn them into batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

# images uint8 [B, H, W, 3] and labels int64 [B] on the device; a function that blocks until the slot may be overwritten
RunnerResult = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]


class FileMonitor(Protocol):
    """Detects changes of the files that a source reads; see `pipelines.storage.monitor`."""

    def poll(self) -> None:
        """Raise UserError if a file is known to have changed; cheap enough for every batch."""
        ...

    def check(self) -> None:
        """Check all files now; raise UserError if one has changed."""
        ...


class SampleSource(Protocol):
    """Fills slots with the samples of a batch, in the loader's background threads."""

    monitor: FileMonitor | None = None  # None: all was read at the start

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor | list[np.ndarray]:
        """Return the samples at `indices`, int64 [B]. In host memory the next fill of the slot overwrites them.

        Raises:
            Undecodable: Samples cannot be decoded. Left out by sources whose decoder is DALI.
        """
        ...

    def defect(self, sample: int) -> str | None:
        """Return why a sample cannot be decoded; None: it can."""
        return None

    def poll(self) -> None:
        """Raise UserError if a file that was read is known to have changed; cheap enough for every batch."""
        if self.monitor is not None:
            self.monitor.poll()

    def check_unchanged(self) -> None:
        """Check all files now; raise UserError if one has changed."""
        if self.monitor is not None:
            self.monitor.check()


class Runner(Protocol):
    """Turns filled slots into batches on the device, first in, first out."""

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None: ...

    def result(self) -> RunnerResult:
        """Return the oldest batch that was submitted."""
        ...

    def restart(self) -> None:
        """Drop all submitted batches, after an error."""
        ...


def no_wait() -> None:
    """Return at once: the slot may be overwritten already."""
