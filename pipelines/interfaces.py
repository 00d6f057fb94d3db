"""Interfaces between the parts of a loader: sources of samples, and runners that turn samples into batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

Draws = dict[str, np.ndarray]  # [B, ...] each: augmentation parameters by name, or inputs of a graph other than images
StoredImages = torch.Tensor | list[np.ndarray]  # uint8 [B, H, W, 3], or encoded files, uint8 [bytes] each
# Images uint8 [B, H, W, 3], labels int64 [B], and a function that blocks until the slot can be overwritten.
RunnerResult = tuple[torch.Tensor, torch.Tensor, Callable[[], None]]


@dataclass(frozen=True)
class Position:
    """Place in a run, from which it continues. In a loader, `step` counts batches; in a run, optimizer steps."""

    epoch: int  # counted from 0
    step: int = 0  # steps of the epoch that are done

    def __str__(self) -> str:
        """Return the position as in messages, which count epochs from 1."""
        return f"step {self.step} of epoch {self.epoch + 1}" if self.step else f"the start of epoch {self.epoch + 1}"


class FileMonitor(Protocol):
    """Detector of changes to the files that a source reads; see `pipelines.storage.monitor`."""

    def poll(self) -> None:
        """Raise UserError if a change to a file has been detected. Cheap enough to call after every batch."""
        ...

    def check(self) -> None:
        """Check all files now and raise UserError if one has changed."""
        ...


class SampleSource(Protocol):
    """Source of samples. The loader's background threads call `fill` to gather samples into slots (reused buffers)."""

    monitor: FileMonitor | None = None  # None if all samples were read at the start

    def fill(self, slot: int, indices: np.ndarray, draws: Draws) -> StoredImages:
        """Return the samples at `indices`, int64 [B], with the transforms that `draws` describe if the source has any.

        A sample with several views is several times in `indices`, one after the other.

        Samples in host memory are valid until the next call with the same `slot`.

        Raises:
            Undecodable: Samples cannot be decoded. Files that DALI decodes may also fail later, in `Runner.result`.
        """
        ...

    def defect(self, sample: int) -> str | None:
        """Return the reason a sample cannot be decoded, or None if the sample can be decoded."""
        return None

    def poll(self) -> None:
        """Raise UserError if a change to a file has been detected. Cheap enough to call after every batch."""
        if self.monitor is not None:
            self.monitor.poll()

    def check_unchanged(self) -> None:
        """Check all files now and raise UserError if one has changed."""
        if self.monitor is not None:
            self.monitor.check()


class Runner(Protocol):
    """Runner that turns filled slots into batches on the device, in the order of submission."""

    def submit(self, images: StoredImages, labels: np.ndarray, draws: Draws) -> None: ...

    def result(self) -> RunnerResult:
        """Remove and return the oldest submitted batch.

        Raises:
            RuntimeError: The batch cannot be processed, e.g. because a sample cannot be decoded.
        """
        ...

    def restart(self) -> None:
        """Drop all submitted batches, so that the runner can be used again after an error."""
        ...


def no_wait() -> None:
    """Return immediately. Used as the wait function of a slot that can be overwritten right away."""
