"""Interfaces between the parts of a loader: sources of samples, and runners that turn them into batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

# Images uint8 [B, H, W, 3], labels int64 [B], and a function that blocks until the slot may be overwritten.
RunnerResult = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]


class FileMonitor(Protocol):
    """Detector of changes to the files that a source reads; see `pipelines.storage.monitor`."""

    def poll(self) -> None:
        """Raise UserError if a file is known to have changed. Cheap enough to call after every batch."""
        ...

    def check(self) -> None:
        """Check all files now; raise UserError if one has changed."""
        ...


class SampleSource(Protocol):
    """Source that fills slots with the samples of a batch, in the loader's background threads."""

    monitor: FileMonitor | None = None  # None: all samples were read at the start

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor | list[np.ndarray]:
        """Return the samples at `indices`, int64 [B]. In host memory they are valid until the next fill of the slot.

        Raises:
            Undecodable: Samples cannot be decoded. Samples that DALI decodes may also fail later, in the runner.
        """
        ...

    def defect(self, sample: int) -> str | None:
        """Return why a sample cannot be decoded; None if it can."""
        return None

    def poll(self) -> None:
        """Raise UserError if a file is known to have changed; cheap enough for every batch."""
        if self.monitor is not None:
            self.monitor.poll()

    def check_unchanged(self) -> None:
        """Check all files now; raise UserError if one has changed."""
        if self.monitor is not None:
            self.monitor.check()


class Runner(Protocol):
    """Runner that turns filled slots into batches on the device, first in, first out."""

    def submit(self, images: Any, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None: ...

    def result(self) -> RunnerResult:
        """Return the oldest submitted batch."""
        ...

    def restart(self) -> None:
        """Drop all submitted batches, after an error."""
        ...


def no_wait() -> None:
    """Return immediately, for a slot that may be overwritten already."""
