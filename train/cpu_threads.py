"""Choose how many threads compute on the CPU: those that find a free core.

OpenMP's threads spin while they wait for each other after every parallel loop. Where other processes want the cores,
all of them wait for the one that was preempted. LeNet on two cores beside two busy processes trained 200 to 1,800
images/s with two threads and 3,000 to 5,000 with one; on quiet cores 13,000 and 6,300.

The number is chosen once, when a run begins, and a resumed run takes it from the checkpoint, since sums of float32
depend on it. OMP_NUM_THREADS fixes it.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from statistics import median

import torch

from configs.notes import warn

SAMPLES, INTERVAL_S = 11, 0.01
FIXED_BY = "OMP_NUM_THREADS"  # also set by torchrun where it starts several processes


def leave_busy_cores(device: torch.device) -> None:
    """Where the CPU computes, lower torch's number of threads by the share of cores that other processes keep busy."""
    if device.type != "cpu" or FIXED_BY in os.environ:
        return
    before, busy, cores = torch.get_num_threads(), busy_cores(), os.cpu_count() or 1
    threads = max(1, before - round(before * busy / cores))
    if threads < before:
        torch.set_num_threads(threads)
        warn(
            f"other processes keep {busy:g} of {cores} cores busy, so that {threads} of {before} threads compute; "
            f"set {FIXED_BY} for another number"
        )


def restore(threads: int) -> None:
    """Compute with as many threads as the run began with, for bitwise the same weights; at most one for each core."""
    if FIXED_BY not in os.environ and threads > 0:
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))


def busy_cores() -> float:
    """Return how many threads of other processes want a core: the median of a tenth of a second; 0 where unknown."""
    counts = []
    for _ in range(SAMPLES):
        time.sleep(INTERVAL_S)
        try:
            found = re.search(r"^procs_running (\d+)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            return 0
        counts.append(int(found.group(1)) - 1 if found else 0)  # without this thread
    return max(0, median(counts))
