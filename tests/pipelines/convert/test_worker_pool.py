"""Pool of worker processes: order, errors and killed workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from configs.utils.errors import UserError
from pipelines.convert.worker_pool import WorkerPool, defer_signals


def add(shared: np.ndarray, task: int) -> int:
    if task == 3:
        time.sleep(0.2)
    return int(shared[0]) + task


def end_itself(shared: np.ndarray, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail(shared: np.ndarray, task: int) -> int:
    if task == 1:
        raise UserError("as planned")
    time.sleep(3600)
    return task


LARGE = np.full(1 << 20, 7)  # larger than the buffer of a pipe


def test_results_keep_task_order_for_any_size_of_shared_object() -> None:
    for workers in (1, 2):
        with WorkerPool(workers, LARGE) as pool:
            assert list(pool.imap(add, range(9))) == [7 + task for task in range(9)]
    assert multiprocessing.active_children() == []


def test_killed_worker_gives_a_one_sentence_error() -> None:
    with pytest.raises(UserError, match="a worker process was killed"), WorkerPool(2, LARGE) as pool:
        list(pool.imap(end_itself, range(5)))


@pytest.mark.parametrize("closed", [OSError("handle is closed"), BrokenPipeError(32, "Broken pipe"), TypeError("None")])
def test_task_submitted_while_the_pool_breaks_gives_the_same_error(
    closed: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise error

    error = closed
    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit)
    with WorkerPool(2, None) as pool, pytest.raises(UserError, match="a worker process was killed"):
        list(pool.imap(add, [1]))
    error = OSError(12, "Cannot allocate memory")
    with WorkerPool(2, None) as pool, pytest.raises(OSError, match="Cannot allocate memory"):
        list(pool.imap(add, [1]))


def test_pool_closes_after_a_waiting_worker_was_killed() -> None:
    """A killed worker may hold the lock of the queue on which the others wait."""
    with WorkerPool(2, LARGE) as pool:
        assert len(list(pool.imap(add, range(4)))) == 4
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    assert multiprocessing.active_children() == []


def test_error_does_not_wait_for_pending_tasks() -> None:
    """The other tasks would take an hour."""
    with pytest.raises(UserError, match="as planned"), WorkerPool(2, LARGE) as pool:
        list(pool.imap(fail, [1, 0, 2]))
    assert multiprocessing.active_children() == []


def test_deferred_signal_arrives_at_the_end() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
