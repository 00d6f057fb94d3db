"""What the tests share that call one thing from several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

THREADS = 6


def at_once(compute: Callable[[], np.ndarray]) -> list[np.ndarray]:
    """What `compute` returns in each of THREADS threads that begin together."""
    barrier = Barrier(THREADS)

    def wait_and_compute(_: int) -> np.ndarray:
        barrier.wait(timeout=60)
        return compute()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(wait_and_compute, range(THREADS)))
