"""Find the number of worker processes or threads at which a peer is fastest."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess

from tools.benchmarks.engine.results import rounded

GRACE_S = 1.0  # for worker processes to end by themselves


@dataclass(frozen=True)
class Fastest:
    """A peer with the number of workers at which it was fastest.

    Args:
        items: The peer's iterator, newly built with `workers`.
        workers: Number of worker processes or threads.
        rates: Images/s by number of workers. Empty if only one number was given.
    """

    items: Iterator[object]
    workers: int
    rates: dict[str, float]

    def details(self) -> dict[str, object]:
        """Return the fields of the peer's row."""
        return {"workers": self.workers, "sweep": self.rates}


def worker_counts(least: int, *, exceed_cores: bool = True) -> tuple[int, ...]:
    """Return the numbers of workers to try: `least` (0 or 1), the number of cores, and, if allowed, twice that."""
    cores = len(os.sched_getaffinity(0))
    return tuple(sorted({least, cores, 2 * cores if exceed_cores else cores}))


def fastest(
    build: Callable[[int], Iterator[object]], counts: Sequence[int], images_per_item: int, seconds: float
) -> Fastest:
    """Measure a peer once with each number of workers, and build it again with the best.

    Args:
        build: Builds the peer with a number of workers.
        counts: Numbers of workers.
        images_per_item: Images of one item.
        seconds: Minimum duration of each measurement, after a warm-up.
    """
    if len(counts) == 1:
        return Fastest(build(counts[0]), counts[0], {})
    rates = {}
    for count in counts:
        items = build(count)
        rates[count] = images_per_item * _items_per_s(items, count, seconds)
        close(items)
    best = max(rates, key=lambda count: rates[count])
    return Fastest(build(best), best, {str(count): rounded(rate, 4) for count, rate in rates.items()})


def _items_per_s(items: Iterator[object], workers: int, seconds: float) -> float:
    """Return the rate of an iterator, without the first item of each worker.

    Items of several workers may become ready at the same time, so a multiple of their number is taken.
    """
    step = max(2, workers)
    for _ in islice(items, 1 + step):
        pass
    start, taken = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - start) < seconds or not taken:
        for _ in range(step):
            next(items)
        taken += step
    return taken / elapsed_s


def close(items: Iterator[object]) -> None:
    """End the worker processes of this process and the threads of a peer, and free its memory.

    Workers that do not end within GRACE_S are killed, since DataLoader waits up to 5 s for each that has threads of its
    own. They are not killed at once: a worker may hold a lock that DataLoader needs to end them. Meanwhile, the handler
    by which DataLoader raises an error when a worker dies is replaced.
    """
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    workers = multiprocessing.active_children()
    killing = threading.Timer(GRACE_S, _kill, [workers])
    killing.start()
    if isinstance(items, Generator):
        items.close()
    gc.collect()
    killing.cancel()
    _kill(workers)  # those of a peer that leaves them running
    signal.signal(signal.SIGCHLD, handler)


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
