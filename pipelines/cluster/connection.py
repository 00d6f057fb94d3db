"""A connection to an existing Ray cluster. Ray places, retries and ends the tasks."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from configs.utils.errors import UserError
from pipelines.cluster import node
from pipelines.cluster.node import Requirements

if TYPE_CHECKING:
    from types import ModuleType

    from ray import ObjectRef

Result = TypeVar("Result")
RETRIES = 3  # of a task whose worker or node died
CONNECT_TIMEOUT_S = 5.0
HOW_TO_START = "start one with `ray start --head`, and run this command on one of its nodes"
# Read when Ray is imported. Its reports on workers that died would be printed between progress bars.
RAY_VARIABLES = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_NUM_REDIS_GET_RETRIES": "1",  # attempts to reach a cluster that no longer exists: 40 s each
}


@dataclass(frozen=True)
class Node:
    """A node that runs tasks."""

    id: str
    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Task(Generic[Result]):
    """A submitted call, whose result Ray may not have yet."""

    reference: ObjectRef


class Cluster:
    """A connection to a cluster, made by `connect`. Tasks are submitted inside `sharing`."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._requirements: Requirements | None = None

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive and have CPUs for tasks."""
        found = [
            Node(
                one["NodeID"],
                one["NodeManagerHostname"],
                int(one["Resources"].get("CPU", 0)),
                int(one["Resources"].get("GPU", 0)),
            )
            for one in self._ray.nodes()
            if one["Alive"]
        ]
        return [one for one in found if one.cpus > 0]

    @contextmanager
    def sharing(self, folder: Path, libraries: tuple[str, ...]) -> Iterator[None]:
        """Require that the nodes of tasks share a folder with this process, and have the same code and libraries.

        Every worker process checks this before its first task, so nodes may join at any time.
        """
        token = folder.absolute() / ".cluster-token"
        content = secrets.token_hex(16)
        token.write_text(content, encoding="utf-8")
        self._requirements = Requirements(token, content, os.getcwd(), node.installed_versions(libraries))
        try:
            yield
        finally:
            token.unlink(missing_ok=True)

    def put(self, value: object) -> ObjectRef:
        """Store an object in the cluster, from where each node copies it once."""
        return self._ray.put(value)

    def submit(
        self, function: Callable[..., Result], *arguments: object, cpus: float = 1, gpus: float = 0, node_id: str = ""
    ) -> Task[Result]:
        """Submit a call, which Ray repeats if its worker or node dies. `node_id` selects the node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
        remote = self._ray.remote(node.call).options(
            num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy=place, name=function.__name__
        )
        return Task(remote.remote(self._requirements, function, arguments))

    def result(self, task: Task[Result]) -> Result:
        """Wait for a task and return its result, or raise its exception.

        Raises:
            UserError: The node of the task is unsuitable, or its workers died more often than RETRIES.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            result: Result = self._wait(self._ray.get, task.reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            raise UserError(
                f"a task failed on the cluster {1 + RETRIES} times ({_first_sentence(error)}); see the logs of Ray, "
                "then run the same command again: it continues where it stopped"
            ) from None
        return result

    def finished(self, tasks: Sequence[Task[Result]], timeout_s: float) -> list[Task[Result]]:
        """Wait until a task has ended, or for the timeout, and return the tasks that have ended."""
        references = [task.reference for task in tasks]
        done = set(self._wait(self._ray.wait, references, timeout=timeout_s)[0]) if references else set()
        return [task for task in tasks if task.reference in done]

    def interrupt(self, tasks: Sequence[Task[Result]], wait_s: float) -> None:
        """Raise KeyboardInterrupt in tasks, and wait until they end, at most `wait_s` seconds.

        Use this for long tasks only: Ray 2.60 can abort this process if a task ends while it is being cancelled.
        """
        references = [task.reference for task in tasks]
        if not references:
            return
        for reference in self._ray.wait(references, num_returns=len(references), timeout=0)[1]:
            self._ray.cancel(reference)
        self._wait(self._ray.wait, references, num_returns=len(references), timeout=wait_s)

    def _wait(self, function: Callable[..., Any], *arguments: object, **options: object) -> Any:
        """Call a function of Ray that waits, and raise what a signal handler raised, also in Ray's C code."""
        try:
            return function(*arguments, **options)
        except SystemError as error:
            raise (error.__cause__ or error) from None

    def on_each_node(self, function: Callable[..., Result], *arguments: object) -> list[tuple[Node, Result]]:
        """Call a function on all nodes, without waiting for a free CPU. Nodes that leave meanwhile are left out.

        Raises:
            UserError: A node is unsuitable or cannot run the function.
        """
        from ray.exceptions import RayError, RayTaskError

        tasks = [(one, self.submit(function, *arguments, cpus=0, node_id=one.id)) for one in self.nodes()]
        results = []
        for one, task in tasks:
            try:
                results.append((one, self._wait(self._ray.get, task.reference)))
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                reason = (str(error.cause).strip().splitlines() or [type(error.cause).__name__])[-1]
                raise UserError(
                    f"node {one.host} cannot do the work ({reason}); start Ray on all nodes from an environment with "
                    "this project, and give them access to the same files"
                ) from None
            except RayError:  # the node has left
                continue
        return results


@contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Connect to a cluster. Leaving the context ends the tasks.

    Args:
        address: HOST:PORT of the cluster, or None for $RAY_ADDRESS or the cluster of this machine.

    Raises:
        UserError: Ray is not installed, or no cluster can be reached.
    """
    for name, value in RAY_VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs the package ray, which is not installed; run: pip install ray") from None
    chosen = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_address(chosen)
    path = os.pathsep.join(filter(None, [str(node.ROOT), os.environ.get("PYTHONPATH")]))
    before = signal.getsignal(signal.SIGTERM)
    try:
        # PYTHONPATH: this checkout, if a node has it, comes before the node's own installation.
        ray.init(
            chosen, log_to_driver=False, logging_level=logging.CRITICAL, runtime_env={"env_vars": {"PYTHONPATH": path}}
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"no Ray cluster can be used at {chosen!r} ({_first_sentence(error)}); {HOW_TO_START}"
        ) from None
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray sets no handler
            signal.signal(signal.SIGTERM, before)
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise UserError if nothing listens at an address. Ray itself would try for minutes, or start a cluster."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            f"--address {address} is not of the form HOST:PORT, such as 10.0.0.1:6379, which `ray start --head` "
            "prints; run this command on one of the cluster's nodes"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no Ray cluster can be reached at {address} ({reason}); {HOW_TO_START}") from None


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
