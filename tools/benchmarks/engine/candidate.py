"""Candidates to measure, and the loop that runs in a candidate's process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """An endless iterator whose items are timed.

    Args:
        items: The iterator. Each item counts as `units_per_item` images, bytes or operations.
        details: Called after the last round. Returns additional fields for the row.
        prefetches: Whether the iterator prepares items between rounds. If so, each round starts with one untimed item.
        at_once: Items that may become ready at the same time, such as one of each worker process. A round takes a
            multiple of it.
    """

    items: Iterator[object]
    units_per_item: float
    details: Callable[[], Mapping[str, object]] = dict
    prefetches: bool = True
    at_once: int = 1


@dataclass(frozen=True)
class Candidate:
    """A program to be measured in a separate process.

    Args:
        build: Called with `arguments` in the candidate's process. Returns a context manager that yields workloads by
            name. A single workload may be named "".
        monitor: Called repeatedly with the process id while waiting for a reply. Returns a reason to kill the process,
            or None to let it run.
    """

    name: str
    build: Callable[..., AbstractContextManager[dict[str, Workload]]]
    arguments: tuple[object, ...] = ()
    monitor: Callable[[int], str | None] | None = None


def serve(pipe: Connection, candidate: Candidate, seconds: float) -> None:
    """Build and warm up a candidate, then answer requests over `pipe`.

    The first message sent is {workload: error or None}, or an error if the candidate cannot be built. A request is the
    name of a workload, and the reply is the rate of one round in units/s or an error. The last request is None, and the
    reply is {workload: details}.
    """
    os.setpgid(0, 0)  # own process group, with all workers; the kernel ends a stopped group if its parent dies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # the default start method, as for the workers of a DataLoader in a user's program
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with suppress(BrokenPipeError, EOFError):
        try:
            with candidate.build(*candidate.arguments) as workloads:
                counts = {name: _attempt(_calibrate, workload, seconds) for name, workload in workloads.items()}
                pipe.send({name: count if isinstance(count, str) else None for name, count in counts.items()})
                while (name := pipe.recv()) is not None:
                    pipe.send(_attempt(_measure_round, workloads[name], counts[name]))
                pipe.send({name: workload.details() for name, workload in workloads.items()})
                pipe.recv()
        except (BrokenPipeError, EOFError):
            raise
        except BaseException as error:
            pipe.send(error_text(error))


def _end_with_parent() -> None:
    """Kill this process group when the parent ends, even during a long step."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _attempt(function: Callable[..., T], *arguments: object) -> T | str:
    """Return the result of the function, or the error as text if it raises an exception."""
    try:
        return function(*arguments)
    except Exception as error:
        return error_text(error)


def error_text(error: BaseException) -> str:
    """Return the type and message of an exception as one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _calibrate(workload: Workload, seconds: float) -> int:
    """Warm up the workload and return the number of items that take about `seconds`, a multiple of `at_once`.

    The number is at least 2, and at least two multiples of an `at_once` above 1. It is at least 1 if the workload does
    not prefetch and its first item takes at least `seconds`; the first item is then the only warm-up.
    """
    count = min_count = 2 if workload.prefetches or _time_items(workload.items, 1) < seconds else 1
    if min_count == 2:
        _time_items(workload.items, 3)
    if workload.at_once > 1:
        count = min_count = 2 * workload.at_once
    while (duration_s := _time_items(workload.items, count)) < seconds / 4:
        count *= 2
    return max(min_count, round(count * seconds / duration_s / workload.at_once) * workload.at_once)


def _measure_round(workload: Workload, count: int) -> float:
    """Return the rate of one round of `count` items, in units/s."""
    if workload.prefetches:  # a loader has prefetched while other candidates ran
        _time_items(workload.items, 1)
    return count * workload.units_per_item / _time_items(workload.items, count)


def _time_items(items: Iterator[object], count: int) -> float:
    """Return the time in seconds to take `count` items, including their pending work on the GPU.

    Raises:
        RuntimeError: The iterator ends before `count` items.
    """
    start = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(items, count))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if taken < count:
        raise RuntimeError(f"ended after {taken} of {count} items")
    return time.perf_counter() - start
