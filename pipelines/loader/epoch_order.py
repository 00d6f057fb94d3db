"""Order sequential-window, for data larger than memory: has the next window's shards read while this one is trained on.

Nothing depends on it but speed: it only gives the kernel hints. Knows no images and no draws.
"""

from __future__ import annotations

import mmap
import threading
from functools import lru_cache

import numpy as np

from pipelines import order
from pipelines.storage.split import Split


class ReadAhead:
    """Called with every batch's samples, in order, from any thread."""

    def __init__(self, split: Split, window_shards: int, seed: int) -> None:
        self._split = split
        self._lock = threading.Lock()
        self._reached = (-1, -1)  # epoch and window
        self._windows = lru_cache(maxsize=2)(
            lambda epoch: order.shard_windows(len(split.files), window_shards, seed, epoch)
        )

    def __call__(self, epoch: int, indices: np.ndarray) -> None:
        """indices: int64 [B], the samples of a batch of `epoch`."""
        windows = self._windows(epoch)
        window = int(windows[self._split.shard[indices[-1]]])
        with self._lock:
            if (epoch, window) <= self._reached:
                return
            self._reached = (epoch, window)
        for wanted in (window, window + 1):
            self._split.advise(np.flatnonzero(windows == wanted), mmap.MADV_WILLNEED)
        # One window back stays: other threads may still gather from it, and would fault its pages in again.
        self._split.advise(np.flatnonzero(windows == window - 2), mmap.MADV_DONTNEED)
