"""Train the runs of a sweep as processes of this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tools.runs.engine.processes import RunProcess, failure_line, start_run, terminate
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_points import Point
from tools.runs.sweep_runner import RunOutcome, config_path, log_path


@dataclass
class _Run:
    point: Point
    slot: RunSlot
    process: RunProcess


class LocalRuns:
    """Runs on this machine.

    Args:
        lock: File descriptor of the lock of the sweep's folder. The processes inherit it.
    """

    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._runs: list[_Run] = []

    def start(self, point: Point, slot: RunSlot) -> None:
        process = start_run(config_path(point), log_path(point), slot, (self._lock,))
        self._runs.append(_Run(point, slot, process))

    def ended(self) -> list[tuple[RunOutcome, RunSlot]]:
        found = [run for run in self._runs if run.process.process.poll() is not None]
        self._runs = [run for run in self._runs if run not in found]
        return [
            (RunOutcome(run.point, failure_line(run.process), time.monotonic() - run.process.started_at), run.slot)
            for run in found
        ]

    def terminate(self) -> None:
        terminate([run.process for run in self._runs])
