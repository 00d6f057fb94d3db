"""Sample order of a training epoch, and read-ahead of shards for data larger than memory."""

from __future__ import annotations

import mmap
from functools import lru_cache
from threading import Lock

import numpy as np

from configs.schema import DataConfig
from pipelines import order
from pipelines.order import ShardSchedule
from pipelines.storage.split import Split


class TrainOrder:
    """Callable that returns the order of all samples in an epoch. Thread-safe.

    Attributes:
        split: The split.
        lanes: Shards that are read at a time, over all machines; 0: the order is random.
    """

    def __init__(self, data: DataConfig, split: Split, seed: int) -> None:
        self.split = split
        self.lanes = lanes = data.window_shards if data.order == "sequential-window" else 0
        self._lock, self._schedule_lock = Lock(), Lock()

        @lru_cache(maxsize=2)
        def epoch_order(epoch: int) -> np.ndarray:
            if lanes:
                return order.lane_permutation(split.shard, lanes, seed, epoch)
            return order.permutation(len(split), seed, epoch)

        self._epoch_order = epoch_order
        self._schedule = lru_cache(maxsize=2)(
            lambda epoch, *share: order.shard_schedule(self(epoch), split.shard, *share)
        )

    def __call__(self, epoch: int) -> np.ndarray:
        """Return all sample indices in the order of an epoch, int64 [samples]."""
        with self._lock:  # one thread computes the order while the others wait
            return self._epoch_order(epoch)

    def schedule(self, epoch: int, *share: int) -> ShardSchedule:
        """Return which shards a machine reads in an epoch; `share`: the other arguments of `order.shard_schedule`."""
        with self._schedule_lock:
            return self._schedule(epoch, *share)


class ReadAhead:
    """Ask the operating system to read shards before the model trains on them, and to release them afterwards.

    All requests are hints that do not affect results. Call the object for every batch, roughly in order, from any
    thread.

    Args:
        split: The split.
        ahead: Number of shards to read ahead of those in use.
    """

    def __init__(self, split: Split, ahead: int) -> None:
        self._split, self._ahead = split, ahead
        self._lock = Lock()
        self._reached = (-1, -1)  # (epoch, step)

    def __call__(self, epoch: int, step: int, schedule: ShardSchedule) -> None:
        """Send hints if a batch is the first to use a shard. `schedule` is that of the epoch."""
        with self._lock:
            before = self._reached
            if (epoch, step) <= before:
                return
            self._reached = (epoch, step)
        is_first = before[0] != epoch
        started = int(np.searchsorted(schedule.first, step, "right"))
        earlier = 0 if is_first else int(np.searchsorted(schedule.first, before[1], "right"))
        if started == earlier:
            return
        asked = slice(0 if is_first else earlier + self._ahead, started + self._ahead)
        needed = schedule.last[asked] >= step  # after a resumption, others are used up
        self._split.advise(schedule.shard[asked][needed], mmap.MADV_WILLNEED)
        unused = self._released(schedule, started) & ~self._released(schedule, earlier)
        self._split.advise(schedule.shard[unused], mmap.MADV_DONTNEED)

    def _released(self, schedule: ShardSchedule, started: int) -> np.ndarray:
        """Return which shards are no longer needed when `started` shards have been started: bool [K].

        Those just before are kept: other threads may still gather from them and would fault their pages in again.
        """
        return schedule.last < schedule.first[max(started - self._ahead, 1) - 1]
