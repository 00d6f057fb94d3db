"""Run the points of a sweep: start runs in free slots, collect their outcomes, and terminate them with the sweep."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from configs.load import to_yaml
from configs.utils.errors import UserError
from configs.utils.process import acquire_lock, handle_signals
from tools.common.tables import write_text
from tools.runs.records import compared_settings, format_setting, read_run
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_points import Point
from train.checkpoint.resume import resolve_resume

LOCK_WAIT_S = 5.0  # children of a killed sweep hold its lock until they end
POLL_S = 0.1


@dataclass(frozen=True)
class RunOutcome:
    point: Point
    error: str | None  # one line, or None if the run finished
    time_s: float


class Engine(Protocol):
    """Where runs are trained, see `tools.runs.engine`."""

    def start(self, point: Point, slot: RunSlot) -> None:
        """Start to train the config at `config_path(point)`, with the output in `log_path(point)`."""
        ...

    def ended(self) -> list[tuple[RunOutcome, RunSlot]]:
        """Return the outcomes of runs that have ended since the last call, and their slots."""
        ...

    def terminate(self) -> None:
        """End all runs, and return when they have ended."""
        ...


@contextmanager
def lock_folder(folder: Path, wait_s: float = LOCK_WAIT_S) -> Iterator[int]:
    """Lock the folder for this sweep, and yield the file descriptor of the lock.

    Child processes that inherit the descriptor hold the lock too.

    Raises:
        UserError: Another sweep still holds the lock after `wait_s` seconds.
    """
    with (folder / ".lock").open("wb") as file:
        if not acquire_lock(file, wait_s):
            raise UserError(f"another sweep is running in {folder}; wait for its end, or give another --out")
        yield file.fileno()


def is_finished(point: Point) -> bool:
    """Return True if the point's run has trained all epochs and saved its last checkpoint.

    Raises:
        UserError: The folder contains an unreadable run or a run with different settings, or the run would be resumed
            in a different folder.
    """
    folder = run_folder(point)
    latest = resolve_resume(point.config, "auto")[0]  # the folder that the run would resume in
    if latest not in (None, folder):
        raise UserError(f"{latest} would be taken for the latest run of {folder}; move it away, or give another --out")
    config_file, last = folder / "config.yaml", folder / "last.pt"
    if not config_file.is_file() or config_file.stat().st_size == 0:  # killed before it started
        return False
    run = read_run(folder)
    there, here = compared_settings(run.config), compared_settings(point.config)
    if different := [
        f"{key}: {format_setting(there[key])} there, {format_setting(here[key])} here"
        for key in here
        if here[key] != there[key]
    ]:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{folder} contains a run with other settings ({'; '.join(different[:3])}{more}); "
            "give another --out, or move that folder away"
        )
    # the last epoch is logged before its checkpoint is written
    return run.is_finished and last.is_file() and last.stat().st_mtime >= (folder / "metrics.jsonl").stat().st_mtime


def run_folder(point: Point) -> Path:
    return Path(point.config.output) / point.name


def config_path(point: Point) -> Path:
    return Path(point.config.output) / f"{point.name}.yaml"


def log_path(point: Point) -> Path:
    """Return the path of the run's console log."""
    return Path(point.config.output) / f"{point.name}.log"


def run_points(points: Sequence[Point], slots: Sequence[RunSlot], engine: Engine) -> Generator[RunOutcome, None, None]:
    """Train each point, with one run per slot at a time, and yield each outcome when a run ends.

    All runs have ended when the generator ends or is closed.

    Args:
        points: The points to run.
        slots: One slot per concurrent run.
        engine: Trains the runs.

    Raises:
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP was received and is not ignored.
    """
    waiting, free, running = list(points), list(slots), 0
    # The handler does not raise, since Python drops exceptions that are raised during a fork.
    signals: list[int] = []
    with handle_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda number, _: signals.append(number)):
        try:
            while waiting or running:
                while waiting and free and not signals:
                    point, slot = waiting.pop(0), free.pop(0)
                    _write_config(point, slot)
                    engine.start(point, slot)
                    running += 1
                time.sleep(POLL_S)
                if signals:
                    raise KeyboardInterrupt
                for outcome, slot in engine.ended():
                    running -= 1
                    free.append(slot)
                    yield outcome
        finally:
            engine.terminate()


def _write_config(point: Point, slot: RunSlot) -> None:
    config = point.config
    if slot.threads is not None and config.data.threads is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"threads": slot.threads})})
    write_text(config_path(point), to_yaml(config))
