"""Measure rates, waiting and memory of training, by host clocks; nothing here synchronises."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from math import nan
from pathlib import Path

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
