"""Train the runs of a sweep as tasks on the nodes of a Ray cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.utils.errors import UserError
from pipelines.cluster.connection import Cluster, Task
from tools.runs.engine.processes import TERMINATE_GRACE_S, failure_line, start_run, terminate
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_points import Point
from tools.runs.sweep_runner import POLL_S, RunOutcome, config_path, log_path

LIBRARIES = ("torch", "numpy", "numba", "pillow")  # that determine the results of training on a CPU


class ClusterRuns:
    """Runs on the nodes of a cluster. If a node dies, Ray starts its runs elsewhere, from their last checkpoints.

    The lock of a run's folder keeps two attempts apart.

    Args:
        cluster: The cluster.
        cpus: CPUs per run.
        gpus: GPUs per run.
    """

    def __init__(self, cluster: Cluster, cpus: int, gpus: int) -> None:
        self._cluster = cluster
        self._cpus, self._gpus = cpus, gpus
        self._runs: dict[Task[tuple[str | None, float]], tuple[Point, RunSlot]] = {}

    def start(self, point: Point, slot: RunSlot) -> None:
        task = self._cluster.submit(
            train_on_node, config_path(point), log_path(point), slot, cpus=self._cpus, gpus=self._gpus
        )
        self._runs[task] = (point, slot)

    def ended(self) -> list[tuple[RunOutcome, RunSlot]]:
        return [self._outcome(task) for task in self._cluster.finished(list(self._runs), timeout_s=0)]

    def _outcome(self, task: Task[tuple[str | None, float]]) -> tuple[RunOutcome, RunSlot]:
        point, slot = self._runs.pop(task)
        try:
            error, time_s = self._cluster.result(task)
        except (UserError, OSError) as failure:
            error, time_s = str(failure), 0.0
        return RunOutcome(point, error, time_s), slot

    def terminate(self) -> None:
        self._cluster.interrupt(list(self._runs), TERMINATE_GRACE_S + 5)


def train_on_node(config_file: Path, log: Path, slot: RunSlot) -> tuple[str | None, float]:
    """Train a config on this node. Return the failure, or None, and the time in seconds."""
    run = start_run(config_file, log, slot)
    try:
        while run.process.poll() is None:
            time.sleep(POLL_S)
    finally:  # also when the task is cancelled
        terminate([run])
    return failure_line(run), time.monotonic() - run.started_at


@contextmanager
def sharing(cluster: Cluster | None, folder: Path, data: Collection[str]) -> Iterator[None]:
    """Check that all nodes share the folder of the sweep and have the data sets, and require the former of later nodes.

    Without a cluster, there is nothing to check.

    Raises:
        UserError: A node does not, or has other code.
    """
    if cluster is None:
        yield
        return
    local = [path for path in data if os.path.exists(path)]
    with cluster.sharing(folder, LIBRARIES):
        for node, missing in cluster.on_each_node(missing_paths, local):
            if missing:
                raise UserError(
                    f"node {node.host} has no data set {missing[0]}; put it on a file system that all nodes share, or "
                    "copy it to the same path on every node"
                )
        yield


def missing_paths(paths: Collection[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
