"""Sample order of a training epoch, and read-ahead of shards for data larger than memory."""

from __future__ import annotations

import mmap
from functools import lru_cache
from threading import Lock

import numpy as np

from configs.schema import DataConfig
from pipelines import order
from pipelines.storage.split import Split


class TrainOrder:
    """Callable that returns the order of all samples in an epoch. Thread-safe."""

    def __init__(self, data: DataConfig, split: Split, seed: int) -> None:
        windowed = data.order == "sequential-window"
        self.read_ahead = ReadAhead(split, data.window_shards, seed) if windowed else None
        self._lock = Lock()

        @lru_cache(maxsize=2)
        def epoch_order(epoch: int) -> np.ndarray:
            if windowed:
                return order.window_permutation(split.shard, data.window_shards, seed, epoch)
            return order.permutation(len(split), seed, epoch)

        self._epoch_order = epoch_order

    def __call__(self, epoch: int) -> np.ndarray:
        """Return all sample indices in the order of an epoch, int64 [samples]."""
        with self._lock:  # one thread computes the order while the others wait
            return self._epoch_order(epoch)


class ReadAhead:
    """Ask the operating system to read the shards of the next window while the model trains on the current window.

    Shards that are no longer needed are released. All requests are hints that do not affect results. Call the object
    for every batch, roughly in order, from any thread.
    """

    def __init__(self, split: Split, window_shards: int, seed: int) -> None:
        self._split = split
        self._lock = Lock()
        self._reached = (-1, -1)  # (epoch, window)
        self._windows = lru_cache(maxsize=2)(
            lambda epoch: order.shard_windows(int(split.shard.max()) + 1, window_shards, seed, epoch)
        )

    def __call__(self, epoch: int, indices: np.ndarray) -> None:
        """Send hints if a batch is the first to reach a window.

        Args:
            epoch: Epoch of the batch.
            indices: Sample indices of the batch, int64 [B].
        """
        windows = self._windows(epoch)
        window = int(windows[self._split.shard[indices[-1]]])
        with self._lock:
            if (epoch, window) <= self._reached:
                return
            self._reached = (epoch, window)
        for wanted in (window, window + 1):
            self._split.advise(np.flatnonzero(windows == wanted), mmap.MADV_WILLNEED)
        # Keep the previous window: other threads may still gather from it and would fault its pages in again.
        self._split.advise(np.flatnonzero(windows == window - 2), mmap.MADV_DONTNEED)
