"""Rates, times and memory of a run, by host clocks; nothing here synchronises."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any

import torch

from pipelines.loader.train_loader import TrainLoader

GIB = 2**30


class ThroughputMeter:
    """Loss and rates since the last reading, within an epoch."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.begin(0, 0.0, 0.0, images_per_step=0)

    def begin(self, updates: int, loss: float, seen: float, *, images_per_step: int) -> None:
        """Before the first update of an epoch, or of the rest of one; loss: the sum over `seen` samples so far.

        images_per_update: of all ranks, in this epoch.
        """
        self._updates, self._loss, self._seen = updates, loss, seen
        self._images_per_update = images_per_step
        self._time_s, self._wait_s = time.perf_counter(), self._loader.wait_s

    def read(self, updates: int, loss: float, seen: float) -> dict[str, float]:
        """Of the updates since `begin` or the last reading, for metrics; the device must have been waited for."""
        duration_s = max(time.perf_counter() - self._time_s, 1e-9)
        values = {
            "step_loss": (loss - self._loss) / (seen - self._seen) if seen > self._seen else nan,  # all left out
            "images_per_s": (updates - self._updates) * self._images_per_update / duration_s,
            "data_wait_fraction": (self._loader.wait_s - self._wait_s) / duration_s,
        }
        self.begin(updates, loss, seen, images_per_step=self._images_per_update)
        return values


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


def memory_usage(device: torch.device) -> dict[str, float]:
    """Return the memory in use, in GiB, by the names that metrics and benchmarks share.

    memory_gib: the peak of torch's tensors on a GPU, the peak resident set of this process on the CPU.
    device_memory_gib: on a GPU only, see `device_memory_bytes`.
    """
    if device.type != "cuda":
        return {"memory_gib": (peak_rss_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / GIB}
    return {
        "memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "device_memory_gib": device_memory_bytes(device) / GIB,
    }


def peak_rss_bytes(process: int | str = "self") -> int:
    """Return the peak resident set of a process since it was forked or started, in bytes; 0 where it is not known.

    This is VmHWM of proc(5). ru_maxrss of getrusage also counts the time before exec, as a copy of the parent process.
    """
    with suppress(OSError):  # the process has ended, or there is no /proc
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    return 0


def device_memory_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory that are in use now, by all processes.

    These are the CUDA contexts, the loaded kernels, what torch's allocator reserves, and DALI's memory pools, which
    torch does not count. Both pools keep what they were given, so the value stays close to its peak. The driver is
    asked: up to a millisecond of the host's time, without waiting for the device.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free
