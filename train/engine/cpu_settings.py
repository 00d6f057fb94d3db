"""Choose how many threads compute on the CPU: those that find a free core.

OpenMP's threads spin while they wait for each other after every parallel loop. Where other processes want the cores,
all of them wait for the one that was preempted. LeNet on two cores trained 200 to 1,800 images/s with two threads
beside two busy processes, and 3,000 to 5,000 with one; on quiet cores 13,000 and 6,300.

The number is chosen once, when a run begins, and a resumed run takes it from the checkpoint, since sums of float32
depend on it. OMP_NUM_THREADS fixes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path

import torch

from configs.utils.warnings import warn

WINDOWS, INTERVAL_S = 3, 0.1
FIXED_BY = "OMP_NUM_THREADS"  # also set by torchrun where it starts several processes
HINT = f"set {FIXED_BY} for another number"


def limit_threads(device: torch.device) -> None:
    """Where the CPU computes, lower torch's number of threads by the cores that other processes keep busy."""
    if device.type != "cpu" or FIXED_BY in os.environ:
        return
    before, busy, cores = torch.get_num_threads(), busy_cores(), len(os.sched_getaffinity(0))
    threads = max(1, before - round(before * busy / cores))
    if threads < before:
        torch.set_num_threads(threads)
        warn(
            f"other processes keep {busy:.1f} of {cores} cores busy, so that {threads} of {before} threads compute; "
            f"{HINT}"
        )


def restore_threads(threads: int) -> None:
    """Compute with as many threads as the run began with, for bitwise the same weights; at most one for each core.

    threads: 0 where that is not known. Warns of fewer free cores.
    """
    if FIXED_BY in os.environ or threads < 1:
        return
    cores = len(os.sched_getaffinity(0))
    threads = min(threads, cores)
    torch.set_num_threads(threads)
    if threads > 1 and threads > max(1, cores - round(busy := busy_cores())):
        warn(
            f"other processes keep {busy:.1f} of {cores} cores busy, and {threads} threads compute, as when the run "
            f"began; {HINT}, which changes the last bits of results"
        )


def busy_cores() -> float:
    """Return how many of the cores that this process may use are busy while it waits; 0 where the system does not tell.

    The least of up to three tenths of a second, so that a short burst does not count.
    """
    least = float("inf")
    try:
        before = _times()
        for _ in range(WINDOWS):
            time.sleep(INTERVAL_S)
            after = _times()
            least = min(least, _busy_between(before, after))
            if least < 0.5:
                break
            before = after
    except OSError:
        return 0.0
    return least


def _busy_between(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> float:
    busy = 0.0
    for core in os.sched_getaffinity(0) & before.keys() & after.keys():
        idle, total = (now - then for now, then in zip(after[core], before[core], strict=True))
        busy += 1 - idle / total if total else 0
    return busy


def _times() -> dict[int, tuple[int, int]]:
    """Return idle and total time of each core since the start of the system, clock ticks; without stolen time."""
    found = re.findall(r"^cpu(\d+) (.*)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
    times = {int(core): [int(value) for value in values.split()[:7]] for core, values in found}  # user to softirq
    return {core: (values[3] + values[4], sum(values)) for core, values in times.items()}


def keep_freed_memory() -> None:
    """Let the C library reuse the memory of large tensors instead of giving it back to the system at every free.

    Each step's activations would else be mapped, zeroed and faulted in anew, page by page.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        mmap_threshold, trim_threshold = -3, -1
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
