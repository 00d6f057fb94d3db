"""Helpers for tests that call a function from several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

THREADS = 6


def at_once(compute: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """Return the results of `compute` in THREADS threads that start together."""
    barrier = Barrier(THREADS)

    def wait_and_compute(_: int) -> np.ndarray:
        barrier.wait(timeout=60)
        return compute()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(wait_and_compute, range(THREADS)))
