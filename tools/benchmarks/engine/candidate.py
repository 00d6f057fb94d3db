"""Candidates of a measurement, and the loop that runs in a candidate's own process."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch


@dataclass(frozen=True)
class Workload:
    """What is timed: an endless iterator, each of whose items stands for `units` images (or bytes, or operations)."""

    items: Iterator[Any]
    units_per_item: float
    details: Callable[[], dict[str, Any]] = dict  # asked for after the last round
    prefetches: bool = True  # when its turn begins it may have items ready, which are not counted


@dataclass(frozen=True)
class Candidate:
    """build(*arguments), called in the contestant's own process, gives its streams by name ('' where it has one).

    watch(process id), called every 20 ms while it runs, gives a sentence where the process shall end at once.
    """

    name: str
    build: Callable[..., AbstractContextManager[dict[str, Workload]]]
    arguments: tuple[Any, ...] = ()
    monitor: Callable[[int], str | None] | None = None


def serve(pipe: Connection, candidate: Candidate, seconds: float) -> None:
    """The contestant's process: build, warm up, then answer each stream's name with a rate; None ends it.

    Replies: {stream: its error, or None}; then units/s or an error for each name; at last {stream: facts}.
    """
    os.setpgid(0, 0)  # its workers with it; the kernel ends a stopped group whose parents are gone
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # a DataLoader starts its workers as it does in a user's program, not as this process was started
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    with suppress(BrokenPipeError, EOFError):
        try:
            with candidate.build(*candidate.arguments) as workloads:
                steps = {name: _attempt(_calibrate, workload, seconds) for name, workload in workloads.items()}
                pipe.send({name: count if isinstance(count, str) else None for name, count in steps.items()})
                while (name := pipe.recv()) is not None:
                    duration = _attempt(_timed_turn, workloads[name], steps[name])
                    pipe.send(
                        duration
                        if isinstance(duration, str)
                        else steps[name] * workloads[name].units_per_item / duration
                    )
                pipe.send({name: workload.details() for name, workload in workloads.items()})
                pipe.recv()
        except (BrokenPipeError, EOFError):
            raise
        except BaseException as error:
            pipe.send(_sentence(error))


def _end_with_parent() -> None:
    """In the midst of a step nothing else would notice that nobody waits for its rate any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return _sentence(error)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _calibrate(workload: Workload, seconds: float) -> int:
    """Warm up, and find the number of items that take about `seconds`; of slow ones, as few as can be."""
    least = 2 if workload.prefetches or _timed(workload.items, 1) < seconds else 1
    if least == 2:
        _timed(workload.items, 3)
    count = least
    while (duration := _timed(workload.items, count)) < seconds / 4:
        count *= 2
    return max(least, round(count * seconds / duration))


def _timed_turn(workload: Workload, count: int) -> float:
    if workload.prefetches:  # a loader that went idle while others ran has batches ready: they are not counted
        _timed(workload.items, 1)
    return _timed(workload.items, count)


def _timed(batches: Iterator[Any], count: int) -> float:
    """Seconds for `count` items, until the device is done with them."""
    begin = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(batches, count))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if taken < count:
        raise RuntimeError(f"ended after {taken} of {count} items")
    return time.perf_counter() - begin
