"""A pool of Ray's workers, with the interface of the pool of local processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from configs.utils.errors import UserError
from pipelines.cluster.connection import Cluster, Task

if TYPE_CHECKING:
    from ray import ObjectRef

LIBRARIES = ("numpy", "pillow", "h5py")  # that read and encode images
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


@lru_cache(maxsize=1)  # unpickled once per worker process
def _fetch(reference: ObjectRef) -> Any:
    import ray

    return ray.get(reference)


def _run_task(reference: ObjectRef, function: Callable[[Any, Item], Result], task: Item) -> Result:
    return function(_fetch(reference), task)


def _run_probe(reference: ObjectRef, probe: Callable[[Any], object]) -> object:
    return probe(_fetch(reference))


class RayPool(Generic[Shared]):
    """Pool whose `imap` calls `function(shared, task)` on the nodes of a cluster.

    Leaving the context does not cancel the pending tasks, see `Cluster.interrupt`. They end with the connection.

    Args:
        cluster: The cluster.
        shared: Object that all tasks use.
        folder: Folder that all nodes must share.
        probe: Called with `shared` on every node at the start. Must return the same as in this process.
        workers: Maximum number of concurrent tasks, or None for all CPUs of the cluster.
    """

    def __init__(
        self, cluster: Cluster, shared: Shared, folder: Path, probe: Callable[[Shared], object], workers: int | None
    ) -> None:
        self._cluster = cluster
        self._shared = shared
        self._folder = folder
        self._probe = probe
        self._workers = workers
        self._pending: deque[Task[Any]] = deque()
        self._context = ExitStack()

    def __enter__(self) -> RayPool[Shared]:
        """Check all nodes.

        Raises:
            UserError: A node has other code, or cannot read the folder or what `probe` reads.
        """
        with ExitStack() as context:
            context.enter_context(self._cluster.sharing(self._folder, LIBRARIES))
            self._reference = self._cluster.put(self._shared)
            expected = self._probe(self._shared)
            for node, found in self._cluster.on_each_node(_run_probe, self._reference, self._probe):
                if found != expected:
                    raise UserError(
                        f"node {node.host} reads a different source than this machine under the same path; put the "
                        "source on a file system that all nodes share"
                    )
            self._context = context.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.close()

    def imap(self, function: Callable[[Shared, Item], Result], tasks: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in task order. At most two tasks per CPU of the cluster are pending.

        Raises:
            UserError: The workers or nodes of a task died repeatedly, or a node that has joined is unsuitable.
        """
        for task in tasks:
            self._pending.append(self._cluster.submit(_run_task, self._reference, function, task))
            while len(self._pending) >= self._limit():
                yield self._next()
        while self._pending:
            yield self._next()

    def _limit(self) -> int:
        """Return how many tasks may be pending. The size of the cluster may change at any time."""
        limit = max(2, 2 * sum(node.cpus for node in self._cluster.nodes()))
        return limit if self._workers is None else min(limit, self._workers)

    def _next(self) -> Any:
        result = self._cluster.result(self._pending[0])
        self._pending.popleft()
        return result
