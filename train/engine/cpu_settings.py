"""Configure the number of threads and the memory allocation for training on the CPU.

OpenMP threads spin while they wait for each other after each parallel loop. If another process preempts one of the
threads, all the others wait for that thread. On two cores shared with two busy processes, LeNet trained at 200 to 1,800
images/s with two threads and at 3,000 to 5,000 images/s with one. On two idle cores, LeNet trained at 13,000 images/s
with two threads and at 6,300 images/s with one.

The number of threads is chosen at the start of a run. A resumed run uses the number in the checkpoint, since float32
sums depend on the number of threads. The environment variable OMP_NUM_THREADS overrides both.
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
FIXED_BY = "OMP_NUM_THREADS"  # also set by torchrun if it starts several processes
HINT = f"set {FIXED_BY} to choose another number"


def limit_threads(device: torch.device) -> None:
    """Reduce the number of torch's CPU threads in proportion to the share of cores that other processes keep busy.

    Warn if the number is reduced. No-op if `device` is not a CPU or OMP_NUM_THREADS is set.
    """
    if device.type != "cpu" or FIXED_BY in os.environ:
        return
    before, busy, cores = torch.get_num_threads(), busy_cores(), len(os.sched_getaffinity(0))
    threads = max(1, before - round(before * busy / cores))
    if threads < before:
        torch.set_num_threads(threads)
        warn(
            f"other processes keep {busy:.1f} of {cores} cores busy, so {threads} of {before} threads are used; {HINT}"
        )


def restore_threads(threads: int) -> None:
    """Set the number of CPU threads to that of a checkpoint, so that weights are bitwise identical after a resume.

    At most one thread per available core is used. Warn if several threads are used but fewer cores are idle. No-op if
    OMP_NUM_THREADS is set or `threads` is 0.

    Args:
        threads: Number of threads in the checkpoint, or 0 if unknown.
    """
    if FIXED_BY in os.environ or threads < 1:
        return
    cores = len(os.sched_getaffinity(0))
    threads = min(threads, cores)
    torch.set_num_threads(threads)
    if threads > 1 and threads > max(1, cores - round(busy := busy_cores())):
        warn(
            f"other processes keep {busy:.1f} of {cores} cores busy, and {threads} threads are used, as when the run "
            f"started; {HINT}, which changes the last bits of results"
        )


def busy_cores() -> float:
    """Return how many of the cores available to this process are kept busy by other processes, or 0 if unknown.

    The load is measured while this process sleeps, in up to three windows of 0.1 s. The result is the minimum over the
    windows, so that short bursts of load do not count.
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
    """Return how many of the cores available to this process were busy on average between two results of `_times`."""
    busy = 0.0
    for core in os.sched_getaffinity(0) & before.keys() & after.keys():
        idle, total = (now - then for now, then in zip(after[core], before[core], strict=True))
        busy += 1 - idle / total if total else 0
    return busy


def _times() -> dict[int, tuple[int, int]]:
    """Return (idle, total) time since boot for each core, in clock ticks.

    The idle time includes waiting for I/O. The total excludes stolen time.
    """
    found = re.findall(r"^cpu(\d+) (.*)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
    times = {int(core): [int(value) for value in values.split()[:7]] for core, values in found}  # user to softirq
    return {core: (values[3] + values[4], sum(values)) for core, values in times.items()}


def keep_freed_memory() -> None:
    """Let glibc keep the freed memory of large tensors instead of returning it to the operating system.

    Otherwise, the memory of the activations is mapped again in each step, and the kernel zeroes every page on first
    access. No-op with other C libraries.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        mmap_threshold, trim_threshold = -3, -1
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
