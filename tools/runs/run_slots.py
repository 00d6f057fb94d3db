"""Divide GPUs and CPU threads into slots for the runs of a sweep. Each slot is used by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from configs.utils.errors import UserError


@dataclass(frozen=True)
class RunSlot:
    """The GPUs, process count and threads per process available to one run at a time."""

    gpus: tuple[str, ...] = ()  # named as in CUDA_VISIBLE_DEVICES; empty for runs on the CPU
    processes: int = 1
    threads: int | None = None  # threads per process, or None for all cores


def make_slots(gpus: Sequence[str], gpus_per_run: int, parallel: int | None) -> list[RunSlot]:
    """Divide the GPUs into groups of `gpus_per_run` and return the slots that use them.

    Without a GPU, slots use the CPU. If there are several slots, the CPU cores are divided among their processes.

    Args:
        gpus: Names of the GPUs.
        gpus_per_run: Number of processes per run, one per GPU.
        parallel: Number of slots. If None, there is one slot per group, or a single slot without GPUs. If there are
            more slots than groups, slots share groups.

    Raises:
        UserError: A number is below 1, or `gpus_per_run` exceeds the number of GPUs (or 1 if there are none).
    """
    for name, number in (("gpus-per-run", gpus_per_run), ("parallel", 1 if parallel is None else parallel)):
        if number < 1:
            raise UserError(f"--{name} {number} is not a positive whole number; use 1 or more")
    if gpus_per_run > max(1, len(gpus)):
        raise UserError(f"--gpus-per-run {gpus_per_run} exceeds the {len(gpus)} visible GPUs; use fewer")
    starts = range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)
    groups = [tuple(gpus[start : start + gpus_per_run]) for start in starts] or [()]
    count = len(groups) if parallel is None else parallel
    cores = len(os.sched_getaffinity(0))
    threads = None if count == 1 else max(1, cores // (count * gpus_per_run))
    return [RunSlot(groups[number % len(groups)], gpus_per_run, threads) for number in range(count)]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that are visible to this process, as in CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1"):
        return []
    import torch  # takes seconds

    count = torch.cuda.device_count()
    return [name.strip() for name in listed.split(",")][:count] if listed else [str(n) for n in range(count)]
