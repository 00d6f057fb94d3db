"""Fetch the shards of a split ahead of the batches that read them, and map them while they are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Literal, NamedTuple

import numpy as np

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.process import lock_byte
from pipelines.remote.cache import FETCHED_COPIES, DatasetCache, NoSpaceError
from pipelines.remote.store import StoppedError, shown_size
from pipelines.storage.dataset import ShardInfo
from pipelines.storage.hash_cache import FileStamp
from pipelines.storage.memory_map import MappedShards, map_file, unmap_file
from pipelines.storage.monitor import ShardMonitor
from pipelines.storage.split import ReadingPlan

FETCHES = 8  # shards that a process fetches at a time
POLL_S = 0.2  # other processes change the cache without a signal
IDLE_S = 2.0  # then a thread without work ends
END_S = 5.0  # for threads to remove their temporary files
FULL_S = 60.0  # without space for a shard that a batch waits for
NEVER = float("inf")


class EpochUses(NamedTuple):
    """The uses of shards in one epoch."""

    epoch: int
    order: np.ndarray  # int64 [K]: shards in the order of their first use
    first: np.ndarray  # float64 [shards]: step of the first use; NEVER if there is none
    last: np.ndarray  # float64 [shards]: step of the last use; -1 if there is none


class RemoteShards:
    """The shards of a split in a store, see `pipelines.storage.split.Residency`. Thread-safe.

    Threads fetch shards: first those that batches wait for, then the others in the order of their next use. A shard is
    mapped when the first batch that reads it is made. If the data set does not fit the cache, the shard is unmapped
    after the last such batch of the epoch, and can then be removed.

    Args:
        cache: Cache of the data set.
        shards: The shards of the split.
        mapped: Address range for them.
        monitor: Monitor of the mapped files.
        name: Name of the split, for messages.
    """

    def __init__(
        self,
        cache: DatasetCache,
        shards: tuple[ShardInfo, ...],
        mapped: MappedShards,
        monitor: ShardMonitor,
        name: str,
    ) -> None:
        self.evicts = cache.limit is not None and sum(shard.bytes for shard in cache.shards.values()) > cache.limit
        self._cache, self._shards, self._mapped, self._monitor, self._name = cache, shards, mapped, monitor, name
        self._numbers = {shard.file: number for number, shard in enumerate(shards)}
        self._locks = cache.open_locks()
        self._stamps = dict(enumerate(one and one.stamp for one in cache.verified(list(shards))))
        self._here = np.array([stamp is not None for stamp in self._stamps.values()])  # intact files in the cache
        self._attached, self._fetching = np.zeros((2, len(shards)), bool)
        self._users = np.zeros(len(shards), np.int64)  # contexts of `hold`
        self._no_earlier = np.zeros(len(shards))  # time of the next attempt, after one that failed
        self.is_complete = False
        self._errors: dict[int, BaseException] = {}
        self._demanded: dict[int, float] = {}  # shards that batches wait for, and when they were first without space
        self._received = 0  # bytes
        self._plan: ReadingPlan | None = None
        self._epochs: list[int] = []  # to read ahead
        self._uses: list[EpochUses] = []
        self._position = 0, 0
        self._key: object = None
        self._is_ended = False
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()  # guards all of the above; reentrant, for finalizers
        self._uses_lock = threading.Lock()
        cache.readers.add(self)

    @property
    def fetched_bytes(self) -> int:
        return self._cache.fetched_bytes

    # Batches

    def hold(self, shards: np.ndarray) -> AbstractContextManager[None]:
        if not self.evicts and self._attached[shards].all():
            return nullcontext()
        return self._held(np.unique(shards))

    @contextmanager
    def _held(self, shards: np.ndarray) -> Iterator[None]:
        with self._changed:
            self._users[shards] += 1
        try:
            self._wait_for(shards)
            yield
        finally:
            with self._changed:
                self._users[shards] -= 1
                self._detach_used()

    def _wait_for(self, shards: np.ndarray) -> None:
        with self._changed:
            missing = self._attach(shards)
            for number in missing:
                self._errors.pop(number, None)  # of reading ahead; it is tried again, now that it is needed
        if not missing:
            return
        total = sum(self._shards[number].bytes for number in missing)
        bar = progress_bar(
            total=total, desc=f"fetching {self._name}", unit="B", unit_scale=True, unit_divisor=1024, delay=1
        )
        with bar:
            before = self._received
            try:
                while missing:
                    with self._changed:
                        self._demand(missing)
                        self._changed.wait(POLL_S)
                        missing = self._attach(np.array(missing))
                    bar.update(min(max(self._received - before, 0), total) - bar.n)
            finally:
                with self._changed:
                    for number in missing:
                        self._demanded.pop(number, None)

    def _attach(self, shards: np.ndarray) -> list[int]:
        """Map those shards that are here, and return the others."""
        missing = []
        for number in shards.tolist():
            if self._attached[number] or self._map(number):
                self._demanded.pop(number, None)
            else:
                missing.append(number)
        return missing

    def _map(self, number: int) -> bool:
        """Map a shard if it is here and intact."""
        if not self._here[number] or self._fetching[number] or not self._lock(number, "shared"):
            return False
        stamp, file = self._stamps[number], self._cache.folder / self._shards[number].file
        with suppress(OSError, UserError):  # removed by another process
            if FileStamp.from_stat(file.stat()) == stamp == map_file(self._mapped, number, file):
                self._monitor.watch(number, stamp)
                self._attached[number] = True
                self.is_complete = not self.evicts and bool(self._attached.all())
                return True
        self._here[number] = False
        self._lock(number, "none")
        return False

    def _lock(self, number: int, kind: Literal["shared", "none"]) -> bool:
        return lock_byte(self._locks, self._cache.places[self._shards[number].file], kind)

    def _demand(self, missing: list[int]) -> None:
        """Let threads fetch shards. Raises the error of a shard that cannot be fetched."""
        if self._is_ended:
            raise StoppedError
        for number in missing:
            if number in self._errors:
                raise self._errors[number]
            if time.monotonic() - self._demanded.setdefault(number, NEVER) > FULL_S:
                raise UserError(
                    f"{self._limit_text()} has no space for {self._shards[number].file}: all other shards in the cache "
                    f"{self._cache.folder} are in use; raise it, or reduce data.window_shards"
                )
        self._start_threads()
        self._changed.notify_all()

    def _detach_used(self) -> None:
        """Unmap the shards that no batch reads and that are not read again in the current epoch."""
        epoch, step = self._position
        current = next((one for one in self._uses if one.epoch == epoch), None)
        if self._plan is None:
            self.release()
        elif current is not None:
            self._detach(current.last < step)

    def release(self) -> None:
        """Unmap all shards that no batch reads now."""
        with self._changed:
            self._detach(np.True_)

    def _detach(self, chosen: np.ndarray | np.bool_) -> None:
        if not self.evicts:
            return
        for number in np.flatnonzero(self._attached & (self._users == 0) & chosen).tolist():
            self._monitor.watch(number, None)
            unmap_file(self._mapped, number, self._cache.folder)
            self._attached[number] = False
            self._lock(number, "none")
            self._no_earlier[:] = 0  # there may be space now
            self._changed.notify_all()

    # Reading ahead

    def follow(self, plan: ReadingPlan, epoch: int, step: int) -> object:
        with self._changed:
            self._plan, self._epochs, self._uses, self._position = plan, [epoch], [], (epoch, step)
            self._key, self._is_ended = object(), False
            if self._stopped.is_set():
                self._stopped, self._threads = threading.Event(), []
            self._errors.clear()
            self._start_threads()
            return self._key

    def add_epoch(self, epoch: int) -> None:
        with self._changed:
            self._epochs.append(epoch)
            self._start_threads()

    def advance(self, epoch: int, step: int) -> None:
        with self._changed:
            self._position = epoch, step = max(self._position, (epoch, step))
            self._epochs = [one for one in self._epochs if one >= epoch]
            self._uses = [one for one in self._uses if one.epoch >= epoch]
            if self._plan is not None and self._plan.order:
                self._cache.clock = epoch + step / self._plan.steps
            self._detach_used()

    def unfollow(self, key: object) -> None:
        with self._changed:
            if key is not self._key:
                return
            self._key, self._plan, self._epochs, self._uses, self._is_ended = None, None, [], [], True
            self._stopped.set()
            self._detach_used()
            threads = self._threads
            self._changed.notify_all()
        end_s = time.monotonic() + END_S
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end_s - time.monotonic()))

    def next_use(self, name: str) -> float:
        """Return when a shard is read next, in epochs of the run, see `pipelines.remote.cache.Reader`."""
        with self._changed:
            number, plan = self._numbers.get(name), self._plan
            if number is None:
                return NEVER
            if number in self._demanded:
                return -1.0
            epoch, step = self._position
            steps = [max(one.first[number], step if one.epoch == epoch else 0) for one in self._uses]
            left = [
                (one.epoch, float(first))
                for one, first in zip(self._uses, steps, strict=True)
                if one.last[number] >= first
            ]
            if plan is not None and plan.order:
                return left[0][0] + left[0][1] / plan.steps if left else NEVER
            # An evaluation: now, in the order of its batches, or at the end of the epoch in training.
            clock = self._cache.clock
            return clock + 1e-9 * left[0][1] if left else float(np.floor(clock)) + 1

    def forget(self, name: str) -> None:
        number = self._numbers.get(name)
        if number is not None:
            with self._changed:
                self._here[number] = False

    def check_space(self, plan: ReadingPlan, ahead: int) -> None:
        if not self.evicts or self._cache.limit is None:
            return
        schedule = plan.schedule(0)
        sizes = np.array([self._shards[number].bytes for number in schedule.shard.tolist()], np.int64)
        change = np.zeros(plan.steps + ahead + 2, np.int64)
        np.add.at(change, schedule.first, sizes)
        np.subtract.at(change, schedule.last + ahead + 1, sizes)
        # One more is being fetched, and an evaluation reads two.
        more = FETCHED_COPIES + 2
        needed = int(np.cumsum(change).max()) + more * max(shard.bytes for shard in self._cache.shards.values())
        if needed <= self._cache.limit:
            return
        total = shown_size(sum(shard.bytes for shard in self._cache.shards.values()))
        if plan.order == "random":
            raise UserError(
                f"data.order=random reads all shards of split {self._name!r} at a time, {shown_size(needed)}, but "
                f"{self._limit_text()} (the data set has {total}); set data.order=sequential-window, or raise the limit"
            )
        raise UserError(
            f"{self._limit_text()} is less than the {shown_size(needed)} of shards that are read at a time (the data "
            f"set has {total}); raise it, or reduce data.window_shards"
        )

    def _limit_text(self) -> str:
        return f"data.cache_gib={(self._cache.limit or 0) / 2**30:g}"

    # Threads

    def _start_threads(self) -> None:
        if self._here.all() and not (self.evicts or self._demanded):
            return
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        wanted = FETCHES if self._plan is not None else min(FETCHES, len(self._demanded))
        for _ in range(wanted - len(self._threads)):
            thread = threading.Thread(target=self._fetch, args=(self._stopped,), name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _fetch(self, stopped: threading.Event) -> None:
        """Fetch shards until all that will be read are here, or `stopped` is set."""
        busy_s = time.monotonic()
        while not stopped.is_set():
            self._compute_uses()
            with self._changed:
                number, is_done = self._next_shard()
                if number is None:
                    if is_done and time.monotonic() - busy_s > IDLE_S:
                        return
                    self._changed.wait(POLL_S)
                    continue
                self._fetching[number] = True
            self._provide(number, stopped)
            busy_s = time.monotonic()

    def _compute_uses(self) -> None:
        with self._uses_lock:
            with self._changed:
                plan, known = self._plan, {one.epoch for one in self._uses}
                epoch = next((one for one in self._epochs if one not in known), None)
            if plan is None or epoch is None:
                return
            schedule = plan.schedule(epoch)
            first, last = np.full(len(self._shards), NEVER), np.full(len(self._shards), -1.0)
            first[schedule.shard], last[schedule.shard] = schedule.first, schedule.last
            with self._changed:
                if self._plan is plan and epoch in self._epochs:
                    self._uses.append(EpochUses(epoch, schedule.shard, first, last))

    def _next_shard(self) -> tuple[int | None, bool]:
        """Return the shard to fetch next, if there is one, and whether there will be no other one for now."""
        now, epoch, step = time.monotonic(), *self._position
        wanted = [np.array(list(self._demanded), np.int64)]
        for one in self._uses:
            is_left = one.last[one.order] >= (step if one.epoch == epoch else 0)
            wanted.append(one.order[is_left])
        shards = np.concatenate(wanted)
        shards = shards[~self._here[shards]]
        failed = np.array([number in self._errors for number in shards.tolist()], bool)
        open_shards = shards[~failed & ~self._fetching[shards]]
        allowed = open_shards[self._no_earlier[open_shards] <= now]
        is_done = not len(shards[~failed]) and not (self.evicts and self._plan is not None)
        return (int(allowed[0]) if len(allowed) else None), is_done

    def _provide(self, number: int, stopped: threading.Event) -> None:
        stamp, error, has_space = None, None, True
        try:
            stamp = self._cache.provide(self._shards[number], self._locks, stopped, self._count)
        except NoSpaceError:
            has_space = False
        except StoppedError:
            pass
        except BaseException as raised:  # for the batch that needs the shard
            error = raised
        with self._changed:
            self._fetching[number] = False
            if stamp is not None:
                self._stamps[number], self._here[number] = stamp, True
            elif error is not None:
                self._errors[number] = error
            else:
                later_s = time.monotonic() + POLL_S
                # Without space for this shard, there is none for those that are read later.
                self._no_earlier[slice(None) if not has_space and number not in self._demanded else number] = later_s
                if not has_space and number in self._demanded:
                    self._demanded[number] = min(self._demanded[number], time.monotonic())
            self._changed.notify_all()

    def _count(self, size: int) -> None:
        self._received += size
