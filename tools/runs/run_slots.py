"""Slots of a sweep: groups of GPUs and threads, each used by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from configs.utils.errors import UserError


@dataclass(frozen=True)
class RunSlot:
    """GPUs and threads for one run at a time."""

    gpus: tuple[str, ...] = ()  # as in CUDA_VISIBLE_DEVICES; empty: the CPU
    processes: int = 1
    threads: int | None = None  # threads per process; None: all cores


def make_slots(gpus: Sequence[str], gpus_per_run: int, parallel: int | None) -> list[RunSlot]:
    """Divide the GPUs into groups of `gpus_per_run` and return the slots that use them.

    Without a GPU, slots use the CPU.

    Args:
        gpus: names of the GPUs.
        gpus_per_run: processes per run, one per GPU.
        parallel: number of slots; None for one per group, or one on the CPU. Slots share groups if there are more slots
            than groups, and all slots share the CPU's cores.

    Raises:
        UserError: a number is below 1, or there are fewer GPUs than `gpus_per_run`.
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
    """Return the GPUs visible to this process, named as in CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1"):
        return []
    import torch  # takes seconds

    count = torch.cuda.device_count()
    return [name.strip() for name in listed.split(",")][:count] if listed else [str(n) for n in range(count)]
