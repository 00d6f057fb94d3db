"""Threads that gather groups of batches into slots, ahead of the consumer and past the end of an epoch."""

from __future__ import annotations

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread

from pipelines.interfaces import Position
from pipelines.loader.batches import BatchPlan
from pipelines.loader.stage import HostBatch, Stage

Ready = SimpleQueue[list[HostBatch] | BaseException]  # holds one gathered group, or the error that ended it
Tasks = SimpleQueue[tuple[int, range, int, Ready] | None]  # epoch, batches to gather, slot to fill, place of the result
Epochs = SimpleQueue[int | None]  # epochs to prepare


class Gathering:
    """The groups of batches that threads gather for one stage, the free slots, and the batches in the runner.

    Groups are gathered in the order of the batches, from a position on. The threads end with `close`, and when the
    object is dropped. A stage has one set of slots, so a new object closes the previous one of the stage.

    Attributes:
        in_flight: Batches in the runner, oldest first, without their images.
    """

    def __init__(self, stage: Stage, position: Position) -> None:
        self.stage = stage
        self.in_flight: deque[HostBatch] = deque()
        self._epochs = deque([(position.epoch, stage.groups(position.step))])  # those with groups to gather
        self._ready: deque[Ready] = deque()  # in the order of the batches
        self._free = deque(range(stage.slots))
        self._tasks: Tasks = SimpleQueue()
        self._to_prepare: Epochs = SimpleQueue()
        # Daemons, since Python waits for other threads before it finalizes this object.
        threads = [
            Thread(target=_gather, args=(stage, self._tasks), name="gather", daemon=True)
            for _ in range(stage.backend.threads)
        ]
        self._preparer = Thread(target=_prepare, args=(stage.plan, self._to_prepare), name="prepare", daemon=True)
        stage.claim_slots(self.close)
        unfollow = stage.follow(position)
        # Threads do not refer to this object, so that it is finalized when its owner drops it.
        self._stop = weakref.finalize(
            self, _stop, stage, self.in_flight, self._tasks, self._to_prepare, [*threads, self._preparer], unfollow
        )
        # At exit, `finalize` may be called after DALI has shut its graphs down. Functions of atexit run newest first.
        atexit.register(self._stop)
        self._fill_free_slots()
        for thread in threads:
            thread.start()

    @property
    def is_closed(self) -> bool:
        return not self._stop.alive

    def close(self) -> None:
        """End the threads after the groups that they are gathering, and take the batches out of the runner."""
        self._stop()
        atexit.unregister(self._stop)

    def add_epoch(self, epoch: int) -> None:
        """Gather the batches of `epoch` after those of the epochs added before."""
        self._epochs.append((epoch, self.stage.groups(0, grow=False)))
        self.stage.add_epoch(epoch)
        self._fill_free_slots()

    def prepare(self, epoch: int) -> None:
        """Let a thread prepare the plan for an epoch; see `BatchPlan.prepare`."""
        if self._preparer.ident is None:
            self._preparer.start()
        self._to_prepare.put(epoch)

    def release(self, slot: int) -> None:
        """Let a thread fill a slot that the consumer no longer needs with the next group, if there is one."""
        self._free.append(slot)
        self._fill_free_slots()

    def take(self) -> list[HostBatch] | None:
        """Return the next group in reverse order, or None if there is none yet. Wait for it if no batch is in flight.

        The error of a thread is raised only if no batch is in flight, since that batch's error comes first.
        """
        waits = not self.in_flight
        if not self._ready or not (waits or not self._ready[0].empty()):
            return None
        group = self._ready[0].get()
        if isinstance(group, BaseException):
            if waits:
                raise group
            self._ready[0].put(group)
            return None
        self._ready.popleft()
        return group

    def _fill_free_slots(self) -> None:
        while self._free and (group := self._next_group()) is not None:
            self._ready.append(SimpleQueue())
            self._tasks.put((*group, self._free.popleft(), self._ready[-1]))

    def _next_group(self) -> tuple[int, range] | None:
        while self._epochs:
            epoch, groups = self._epochs[0]
            if (steps := next(groups, None)) is not None:
                return epoch, steps
            self._epochs.popleft()
        return None


def _gather(stage: Stage, tasks: Tasks) -> None:
    """Gather groups until there is a None."""
    while (task := tasks.get()) is not None:
        epoch, steps, slot, ready = task
        try:
            ready.put(stage.gather_group(epoch, steps, slot))
        except BaseException as error:
            ready.put(error)


def _prepare(plan: BatchPlan, epochs: Epochs) -> None:
    """Prepare epochs until there is a None."""
    while (epoch := epochs.get()) is not None:
        plan.prepare(epoch)


def _stop(
    stage: Stage,
    in_flight: deque[HostBatch],
    tasks: Tasks,
    to_prepare: Epochs,
    threads: Sequence[Thread],
    unfollow: Callable[[], None],
) -> None:
    """Take the batches in flight out of the runner, and end the threads after the groups that they are gathering."""
    while in_flight:
        slot = in_flight.popleft().slot
        with suppress(RuntimeError, StopIteration):  # a graph that failed has no more results
            *_, stage.slot_waits[slot] = stage.runner.result()
    with suppress(Empty):
        while True:
            tasks.get_nowait()
    unfollow()  # wakes threads that wait for a shard
    to_prepare.put(None)
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        # Only those that were started. The garbage collector may call this function in one of them.
        if thread.ident is not None and thread is not current_thread():
            thread.join()
