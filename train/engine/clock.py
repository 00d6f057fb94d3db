"""Measure how long a run takes. Linux only, as the project is."""

from __future__ import annotations

import os
import time
from math import nan
from pathlib import Path
from typing import Any

from pipelines.loader.train_loader import TrainLoader


class RunTimer:
    """Measure the times of a run, over all its starts.

    `times` is part of every checkpoint. Going back to a checkpoint goes back to its times, so they are those of the
    steps that count. A time is nan where a checkpoint of an older version does not hold it.

    training_s: whitening, finished epochs and the last evaluation, as the CIFAR-10 speedruns are compared, in s.
    epoch_time_s, epoch_wait_s, epoch_images: duration of the current epoch, its wait for data, images trained on.

    Compilation (train.warm_up) and loading are not counted.
    """

    def __init__(self) -> None:
        self._begun_s = command_start_s()
        self.times = {"training_s": 0.0, "epoch_time_s": 0.0, "epoch_wait_s": 0.0, "epoch_images": 0.0}

    @property
    def training_s(self) -> float:
        return self.times["training_s"]

    def add(self, seconds: float) -> None:
        """Add to training_s."""
        self.times["training_s"] += seconds

    def __enter__(self) -> None:
        """Add the duration of the context to training_s; the device must have been waited for at its end."""
        self._entered_s = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:  # what was interrupted is done again after a resume
            self.add(time.perf_counter() - self._entered_s)

    def begin(self, updates: int, loader: TrainLoader, *, images_per_step: int) -> None:
        """Start to count an epoch, or the rest of one; updates: optimizer updates of the run done before."""
        self._updates, self._loader, self._images_per_update = updates, loader, images_per_step
        self._time_s, self._wait_s = time.perf_counter(), loader.wait_s

    def count(self, updates: int) -> None:
        """Count the time since `begin` or the last call; the device must have been waited for."""
        now_s, wait_s = time.perf_counter(), self._loader.wait_s
        self.times["epoch_time_s"] += now_s - self._time_s
        self.times["epoch_wait_s"] += wait_s - self._wait_s
        self.times["epoch_images"] += (updates - self._updates) * self._images_per_update
        self._updates, self._time_s, self._wait_s = updates, now_s, wait_s

    def rates(self) -> dict[str, float]:
        """Return the times of the current epoch by the names that metrics have for them."""
        time_s = max(self.times["epoch_time_s"], 1e-9)
        return {
            "images_per_s": self.times["epoch_images"] / time_s,
            "data_wait_fraction": self.times["epoch_wait_s"] / time_s,
            "epoch_time_s": self.times["epoch_time_s"],
        }

    def end_epoch(self) -> None:
        """Add the current epoch to training_s and start the next one at zero."""
        self.add(self.times["epoch_time_s"])
        self.times |= {"epoch_time_s": 0.0, "epoch_wait_s": 0.0, "epoch_images": 0.0}

    def restore(self, content: dict[str, Any]) -> None:
        """Load the times of a checkpoint."""
        within_epoch = nan if content["position"]["step"] else 0.0
        unknown = {key: nan if key == "training_s" else within_epoch for key in self.times}
        self.times |= content.get("times") or unknown

    @property
    def command_s(self) -> float:
        """Seconds since the command was started: interpreter, imports and, under torchrun, its own start included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._begun_s


def command_start_s() -> float:
    """Return when this process, or the torchrun that started it, began, in s since the machine's start."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in clock ticks
