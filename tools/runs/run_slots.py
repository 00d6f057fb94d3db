"""Divide GPUs and CPU threads into slots for the runs of a sweep. Each slot is used by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from configs.utils.errors import UserError
from pipelines.cluster.connection import Node


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
    _check_positive(gpus_per_run=gpus_per_run, parallel=parallel)
    if gpus_per_run > max(1, len(gpus)):
        raise UserError(f"--gpus-per-run {gpus_per_run} exceeds the {len(gpus)} visible GPUs; use fewer")
    starts = range(0, len(gpus) - gpus_per_run + 1, gpus_per_run)
    groups = [tuple(gpus[start : start + gpus_per_run]) for start in starts] or [()]
    count = len(groups) if parallel is None else parallel
    cores = len(os.sched_getaffinity(0))
    threads = None if count == 1 else max(1, cores // (count * gpus_per_run))
    return [RunSlot(groups[number % len(groups)], gpus_per_run, threads) for number in range(count)]


def make_cluster_slot(
    nodes: Sequence[Node], gpus_per_run: int, cpus_per_run: int | None, parallel: int | None
) -> tuple[RunSlot, int, int]:
    """Return the slot of each run on a cluster, and the CPUs and GPUs that it takes. The cluster chooses the place.

    Args:
        nodes: The nodes that are alive.
        gpus_per_run: Number of processes per run, one per GPU.
        cpus_per_run: CPUs per run. If None, the runs that fit a node divide its CPUs: one per group of GPUs or, without
            GPUs, one, or as many as `parallel` needs.
        parallel: Maximum number of concurrent runs, or None.

    Raises:
        UserError: A number is below 1, or no node has enough CPUs or GPUs.
    """
    _check_positive(gpus_per_run=gpus_per_run, cpus_per_run=cpus_per_run, parallel=parallel)
    has_gpus = any(node.gpus for node in nodes)
    usable = [node for node in nodes if (node.gpus if has_gpus else 1) >= gpus_per_run]
    if not usable:
        most = max((node.gpus for node in nodes), default=0)
        raise UserError(
            f"--gpus-per-run {gpus_per_run} exceeds the {most} GPUs of the cluster's largest node; use fewer"
        )
    if cpus_per_run is None:
        spread = -(-(parallel or 1) // len(usable))
        runs = [node.gpus // gpus_per_run if has_gpus else spread for node in usable]
        cpus_per_run = min(max(1, node.cpus // count) for node, count in zip(usable, runs, strict=True))
    elif cpus_per_run > (most := max(node.cpus for node in usable)):
        raise UserError(
            f"--cpus-per-run {cpus_per_run} exceeds the {most} CPUs of the cluster's largest node; use fewer"
        )
    slot = RunSlot((), gpus_per_run, max(1, cpus_per_run // gpus_per_run))
    return slot, cpus_per_run, gpus_per_run if has_gpus else 0


def _check_positive(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {number} is not a positive whole number; use 1 or more")


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that are visible to this process, as in CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and listed.strip() in ("", "-1"):
        return []
    import torch  # takes seconds

    count = torch.cuda.device_count()
    return [name.strip() for name in listed.split(",")][:count] if listed else [str(n) for n in range(count)]
