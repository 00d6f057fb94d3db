"""A pool of worker processes that each hold a copy of the same object and are killed if their parent dies."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from configs.utils.errors import UserError
from configs.utils.process import die_with_parent, handle_signals

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")
SharedByAll = TypeVar("SharedByAll", covariant=True)
_shared: Any = None  # in a worker, its copy of the shared object


class Pool(Protocol[SharedByAll]):
    """Workers that share an object: processes of this machine (`WorkerPool`) or of a cluster (`RayPool`)."""

    def imap(self, function: Callable[[SharedByAll, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield `function(shared, task)` in task order, with a limited number of pending tasks."""
        ...


def _init_worker(shared: str, parent: int) -> None:
    global _shared
    die_with_parent(signal.SIGKILL, parent)
    with open(shared, "rb") as file:
        _shared = pickle.load(file)  # trusted: written by the parent


def _run_task(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_shared, task)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer SIGINT (Ctrl-C) and SIGTERM until the end of the block. In threads other than the main thread, do nothing.

    The handlers are replaced, since a signal mask covers only one thread, and any thread may receive the signal.
    """
    held: dict[int, object] = {}
    try:
        with handle_signals((signal.SIGINT, signal.SIGTERM), held.setdefault):
            yield
    finally:
        for number in held:
            signal.raise_signal(number)


class WorkerPool(Generic[Shared]):
    """Pool whose `imap` calls `function(shared, task)` in `workers` processes, or in this process if `workers` is 1."""

    def __init__(self, workers: int, shared: Shared) -> None:
        self._shared = shared
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._memory = -1  # file descriptor of the pickled shared object; -1 before workers start
        self._others: set[multiprocessing.process.BaseProcess] = set()

    def __enter__(self) -> WorkerPool[Shared]:
        self._others = set(multiprocessing.active_children())
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill the workers. A regular shutdown could hang if a killed worker holds the lock of the task queue."""
        if self._executor is None:
            return
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        self._executor.shutdown(cancel_futures=True)
        os.close(self._memory)

    def imap(self, function: Callable[[Shared, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yield the results in task order. At most two tasks per worker are pending, to keep disk reads sequential.

        Raises:
            UserError: A worker was killed.
        """
        if self._workers == 1:
            for task in tasks:
                yield function(self._shared, task)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(self._submit(function, task))
                if len(pending) >= 2 * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?); use fewer --workers, then run the same command again: "
                "it continues where it stopped"
            ) from None

    def _submit(self, function: Callable[[Shared, Task], Result], task: Task) -> Future[Result]:
        """Submit a task. Signals are deferred, since submitting may start a worker and must not be interrupted.

        Raises:
            BrokenProcessPool: A worker was killed.
        """
        executor = self._start_executor()
        with defer_signals():
            try:
                return executor.submit(_run_task, function, task)
            except (OSError, TypeError) as error:
                # If a worker has just been killed, Python's manager thread closes the pipe that submit writes to.
                if getattr(error, "errno", None) not in (None, errno.EBADF, errno.EPIPE):
                    raise
                raise BrokenProcessPool(str(error)) from error

    def _start_executor(self) -> ProcessPoolExecutor:
        """Return the executor. The first call creates it, so that a pass without tasks starts no processes."""
        if self._executor is None:
            # Python would send the shared object through a pipe, and hang if the worker is killed before reading it.
            self._memory = os.memfd_create("shared")
            with open(self._memory, "wb", closefd=False) as file:
                pickle.dump(self._shared, file)
            arguments = (f"/proc/{os.getpid()}/fd/{self._memory}", os.getpid())
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self._workers, context, _init_worker, arguments)
        return self._executor
