"""Memory of a contestant's process: what it has used at most, the limit it must keep, and which ends mean memory.

The limit on the CPU is watched from outside instead of set by RLIMIT_AS or RLIMIT_DATA. Both count what is reserved,
of which torch, DALI and every thread's stack never touch gigabytes; and a library that is refused memory ends in one of
a dozen ways. What is watched is the peak of the process's resident memory, which the kernel keeps (VmHWM), so
that no peak between two looks is missed. Libraries and mapped data sets count, processes that it started do not.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

from train.engine import meter
from train.engine.meter import GIB, peak_rss_bytes

SHARE_OF_AVAILABLE = 0.8  # of the memory free at the start, which a run takes where no limit is given
LIMIT_MESSAGE = "used more than the memory limit"
# what the allocators of C, C++, Python, torch, CUDA and its libraries say, in lower case
OUT_OF_MEMORY_MESSAGES = (
    LIMIT_MESSAGE,
    "out of memory",
    "outofmemory",
    "can't allocate memory",
    "cannot allocate memory",
    "memoryerror",
    "bad_alloc",
    "alloc_failed",
    "unable to allocate",
    "failed to allocate",
    "allocation failed",
)
KERNEL_KILL = "SIGKILL"  # by the kernel, which ends what takes the machine's or the container's last memory
# a library that is refused memory which it needs may end its process, or fail to load or to start a thread
REFUSED_ALLOCATION = (
    "SIGABRT",
    "SIGSEGV",
    "SIGBUS",
    "start new thread",
    "failed to map segment",
    "Resource temporarily unavailable",
)


def is_out_of_memory(error: str) -> bool:
    """Whether a contestant's error means that its memory did not suffice."""
    text = error.lower()
    if any(sentence in text for sentence in OUT_OF_MEMORY_MESSAGES) or KERNEL_KILL in error:
        return True
    return is_limited_by_user() and any(sentence in error for sentence in REFUSED_ALLOCATION)


def is_limited_by_user() -> bool:
    """Whether `ulimit -v` or `-d` is set, which every process inherits."""
    return any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )


def limit_error(limit_bytes: int) -> str:
    return f"{LIMIT_MESSAGE} of {limit_bytes / GIB:.3g} GiB"


def check_limit(limit_bytes: int, process: int) -> str | None:
    """A candidate's `monitor`: the sentence that ends it, once it has used more than the limit."""
    return limit_error(limit_bytes) if peak_rss_bytes(process) > limit_bytes else None


def available_bytes() -> int:
    """Memory that can be used before the machine swaps or this container's limit is reached."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            root = Path("/sys/fs/cgroup")  # of this container, as it sees it
            available = min(available, int((root / limit).read_bytes()) - int((root / used).read_bytes()))
    return max(0, available)


def prefer_oom_kill() -> None:
    """Of all processes, the kernel shall end this one when memory runs out, and not the one that waits for it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def memory_usage(device: torch.device) -> dict[str, float]:
    """Return `train.meter.memory` and, on a GPU, the peak reserved by torch's allocator and the GPU's size, in GiB."""
    if device.type != "cuda":
        return meter.memory_usage(device)
    return meter.memory_usage(device) | {
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB,
    }
