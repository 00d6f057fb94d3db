"""Memory of a candidate's process: its usage, its limit, and errors that mean out of memory.

On the CPU, the limit is checked by another process instead of being set with RLIMIT_AS or RLIMIT_DATA. Those limits
also count gigabytes that torch, DALI and thread stacks reserve but never touch, and libraries fail in many ways if an
allocation is refused. The check reads the peak resident memory that the kernel records (VmHWM), and thus does not miss
peaks between checks. Libraries and mapped data sets count towards the limit, but child processes do not.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

from train.engine import metrics
from train.engine.metrics import GIB, peak_rss_bytes

SHARE_OF_AVAILABLE = 0.8  # default limit, as a share of the memory that is available at the start
LIMIT_MESSAGE = "used more than the memory limit"
# messages of the allocators of C, C++, Python, torch, CUDA and its libraries, in lower case
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
KERNEL_KILL = "SIGKILL"  # sent by the kernel when the machine or the container runs out of memory
# errors of libraries whose allocation is refused
REFUSED_ALLOCATION = (
    "SIGABRT",
    "SIGSEGV",
    "SIGBUS",
    "start new thread",
    "failed to map segment",
    "Resource temporarily unavailable",
)


def is_out_of_memory(error: str) -> bool:
    """Return True if a candidate's error means that the candidate ran out of memory."""
    text = error.lower()
    if any(message in text for message in OUT_OF_MEMORY_MESSAGES) or KERNEL_KILL in error:
        return True
    return has_ulimit() and any(message in error for message in REFUSED_ALLOCATION)


def has_ulimit() -> bool:
    """Return True if a limit is set by `ulimit -v` or `ulimit -d`. Candidates inherit these limits."""
    return any(
        resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    )


def limit_error(limit_bytes: int) -> str:
    return f"{LIMIT_MESSAGE} of {limit_bytes / GIB:.3g} GiB"


def check_limit(limit_bytes: int, pid: int) -> str | None:
    """Return an error if the process has ever used more than `limit_bytes`, or None if it has not.

    `partial(check_limit, limit_bytes)` can be used as `Candidate.monitor`.
    """
    return limit_error(limit_bytes) if peak_rss_bytes(pid) > limit_bytes else None


def available_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that can be used before the machine swaps or the container reaches its limit.

    `root` is the folder of the container's control group.
    """
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    available = next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:"))
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such file, or "max"
            free = int((root / limit).read_bytes()) - int((root / used).read_bytes())
            with suppress(OSError, ValueError):
                fields = dict(line.split() for line in (root / statistics).read_text(encoding="utf-8").splitlines())
                free += int(fields.get(cached, 0))  # cached file pages, which the kernel reclaims
            available = min(available, free)
    return max(0, available)


def prefer_oom_kill() -> None:
    """Make the kernel kill this process rather than its parent when memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


def memory_usage(device: torch.device) -> dict[str, float]:
    """Return the memory usage in GiB, keyed by metric name.

    The metrics are those of `train.engine.metrics.memory_usage`. On a GPU, they also include `reserved_gib`, the peak
    memory reserved by torch's allocator, and `gpu_memory_gib`, the size of the GPU's memory.
    """
    usage = metrics.memory_usage(device)
    if device.type == "cuda":
        usage["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
        usage["gpu_memory_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
    return usage
