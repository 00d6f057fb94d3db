"""Measure the throughput, duration and memory use of a run. No function of this module synchronizes the device."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress
from math import nan
from pathlib import Path

import torch

from configs.utils.process import start_time_ticks
from pipelines.interfaces import Position
from pipelines.loader.train_loader import TrainLoader

GIB = 2**30


class ThroughputMeter:
    """Measures the mean loss, the throughput and the data-wait fraction between two readings within an epoch."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.start(0, 0.0, 0.0, images_per_step=0)

    def start(self, steps: int, loss: float, seen: float, *, images_per_step: int) -> None:
        """Start measuring, either at the beginning of an epoch or partway through it.

        Args:
            steps: Number of optimizer steps of the run so far.
            loss: Sum of the losses of the `seen` images.
            seen: Number of images trained on in the epoch so far, over all ranks.
            images_per_step: Images per optimizer step over all ranks, i.e. views of samples.
        """
        self._steps, self._loss, self._seen = steps, loss, seen
        self._images_per_step = images_per_step
        self._time_s, self._wait_s = time.perf_counter(), self._loader.wait_s

    def read(self, steps: int, loss: float, seen: float) -> dict[str, float]:
        """Return step_loss, images_per_s and data_wait_fraction since `start` or the previous call.

        step_loss is nan if no samples were added to `seen`. The device must be synchronized before the call.

        Args:
            steps: Number of optimizer steps of the run so far.
            loss: Sum of the losses of the `seen` images.
            seen: Number of images trained on in the epoch so far, over all ranks.
        """
        duration_s = max(time.perf_counter() - self._time_s, 1e-9)
        values = {
            "step_loss": (loss - self._loss) / (seen - self._seen)
            if seen > self._seen
            else nan,  # all steps were skipped
            "images_per_s": (steps - self._steps) * self._images_per_step / duration_s,
            "data_wait_fraction": (self._loader.wait_s - self._wait_s) / duration_s,
        }
        self.start(steps, loss, seen, images_per_step=self._images_per_step)
        return values


class RunTimer:
    """Measures how long a run takes, across resumes.

    `times` is saved in every checkpoint and restored on resume and rewind, so discarded steps are not counted. Start-up
    and compilation are not counted either. If a checkpoint has no `times`, training_s is nan, and so are the epoch
    entries if the checkpoint was saved partway through an epoch.

    Args:
        start_s: When the command started, by CLOCK_BOOTTIME, or None for the start of this process.

    Attributes:
        times: Dict with four entries.

            - training_s: Time spent on whitening, finished epochs and the last evaluation, in seconds, as in CIFAR-10
              speedruns.
            - epoch_time_s: Time spent on the current epoch so far, in seconds.
            - epoch_wait_s: Part of epoch_time_s spent waiting for data.
            - epoch_images: Number of images in the current epoch so far, over all ranks and including skipped steps.
    """

    def __init__(self, start_s: float | None = None) -> None:
        self._command_start_s = command_start_s() if start_s is None else start_s
        self.times = {"training_s": 0.0, "epoch_time_s": 0.0, "epoch_wait_s": 0.0, "epoch_images": 0.0}

    @property
    def training_s(self) -> float:
        return self.times["training_s"]

    def add(self, seconds: float) -> None:
        """Add `seconds` to training_s."""
        self.times["training_s"] += seconds

    def __enter__(self) -> None:
        """Add the duration of the context to training_s, unless an exception is raised in it.

        The device must be synchronized at the end of the context.
        """
        self._entered_s = time.perf_counter()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:  # an interrupted evaluation is repeated after a resume
            self.add(time.perf_counter() - self._entered_s)

    def start_epoch(self, steps: int, loader: TrainLoader, *, images_per_step: int) -> None:
        """Start timing, either at the beginning of an epoch or partway through it.

        Args:
            steps: Number of optimizer steps of the run so far.
            loader: Data loader that measures the time spent waiting for data.
            images_per_step: Images per optimizer step over all ranks, i.e. views of samples.
        """
        self._steps, self._loader, self._images_per_step = steps, loader, images_per_step
        self._time_s, self._wait_s = time.perf_counter(), loader.wait_s

    def count(self, steps: int) -> None:
        """Update `times` with the time, data wait and images since `start_epoch` or the previous call.

        The device must be synchronized before the call.

        Args:
            steps: Number of optimizer steps of the run so far.
        """
        now_s, wait_s = time.perf_counter(), self._loader.wait_s
        self.times["epoch_time_s"] += now_s - self._time_s
        self.times["epoch_wait_s"] += wait_s - self._wait_s
        self.times["epoch_images"] += (steps - self._steps) * self._images_per_step
        self._steps, self._time_s, self._wait_s = steps, now_s, wait_s

    def rates(self) -> dict[str, float]:
        """Return the throughput, data-wait fraction and elapsed time (s) of the current epoch, keyed by metric name."""
        time_s = max(self.times["epoch_time_s"], 1e-9)
        return {
            "images_per_s": self.times["epoch_images"] / time_s,
            "data_wait_fraction": self.times["epoch_wait_s"] / time_s,
            "epoch_time_s": self.times["epoch_time_s"],
        }

    def end_epoch(self) -> None:
        """Add epoch_time_s to training_s, and reset the entries of the epoch to 0."""
        self.add(self.times["epoch_time_s"])
        self.times |= {"epoch_time_s": 0.0, "epoch_wait_s": 0.0, "epoch_images": 0.0}

    def restore(self, times: dict[str, float] | None, position: Position) -> None:
        """Restore the `times` of a checkpoint at a position of the run, or None if it has none."""
        within_epoch = nan if position.step else 0.0
        unknown = {key: nan if key == "training_s" else within_epoch for key in self.times}
        self.times |= times or unknown

    @property
    def command_s(self) -> float:
        """Return the seconds since the start of the command, including the time to start torchrun and Python."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._command_start_s


def command_start_s() -> float:
    """Return the start time of this process, or of torchrun if torchrun started it, in seconds since boot."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return start_time_ticks(process) / os.sysconf("SC_CLK_TCK")


def memory_usage(device: torch.device) -> dict[str, float]:
    """Return the memory use in GiB, keyed by metric name.

    On a GPU, memory_gib is the peak memory of torch's tensors since `warm_up_training` last reset the peak, and
    device_memory_gib is the memory in use by all processes, see `device_memory_bytes`. On the CPU, memory_gib is the
    peak resident set of this process.
    """
    if device.type != "cuda":
        return {"memory_gib": (peak_rss_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / GIB}
    return {
        "memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "device_memory_gib": device_memory_bytes(device) / GIB,
    }


def peak_rss_bytes(process: int | str = "self") -> int:
    """Return the peak resident set of a process since its fork or exec, in bytes, or 0 if unknown.

    The value is VmHWM of proc(5). In contrast, ru_maxrss of getrusage(2) includes the time between fork and exec, when
    the process has the resident set of its parent.
    """
    with suppress(OSError):  # the process has ended, or the system has no /proc
        for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 2**10
    return 0


def device_memory_bytes(device: torch.device) -> int:
    """Return the GPU memory in use by all processes, in bytes.

    The value includes CUDA contexts, loaded kernels, and the memory pools of torch and DALI. The pools keep freed
    memory, so the value is close to the peak. Reading it from the driver takes up to 1 ms on the host and does not
    synchronize.
    """
    free, total = torch.cuda.mem_get_info(device)
    return total - free
