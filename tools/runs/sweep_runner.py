"""Run the processes of a sweep: start runs in free slots, collect their outcomes, and terminate them with the sweep.

Processes must be started by a thread that outlives them, since `die_with_parent` signals a child when the *thread* that
started it ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.load import to_yaml
from configs.utils.errors import UserError
from configs.utils.process import acquire_lock, die_with_parent, handle_signals
from tools.common.tables import write_text
from tools.runs.records import compared_settings, format_setting, read_run
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_points import Point
from train.checkpoint.resume import resolve_resume

TRAIN_SCRIPT = Path(__file__).parents[2] / "train" / "ddp.py"
LOCK_WAIT_S = 5.0  # children of a killed sweep hold its lock until they end
TERMINATE_GRACE_S = 30.0  # between SIGTERM and SIGKILL, as in torchrun
POLL_S = 0.1
TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class RunOutcome:
    point: Point
    error: str | None  # one line, or None if the run finished
    time_s: float


@dataclass
class _RunProcess:
    point: Point
    slot: RunSlot
    process: subprocess.Popen[bytes]
    log_start: int  # offset in bytes, after the output of earlier attempts
    started_at: float


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


def run_points(points: Sequence[Point], slots: Sequence[RunSlot], lock: int) -> Generator[RunOutcome, None, None]:
    """Run each point in a separate process, with one run per slot at a time, and yield each outcome when a run ends.

    All processes have ended when the generator ends or is closed.

    Args:
        points: The points to run.
        slots: One slot per concurrent run.
        lock: File descriptor of the folder's lock. The processes inherit it.

    Raises:
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP was received and is not ignored.
    """
    waiting, free, children = list(points), list(slots), list[_RunProcess]()
    # The handler does not raise, since Python drops exceptions that are raised during a fork.
    signals: list[int] = []
    with handle_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda number, _: signals.append(number)):
        try:
            while waiting or children:
                while waiting and free and not signals:
                    children.append(_start(waiting.pop(0), free.pop(0), lock))
                time.sleep(POLL_S)
                if signals:
                    raise KeyboardInterrupt
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    free.append(child.slot)
                    yield RunOutcome(child.point, _failure_line(child), time.monotonic() - child.started_at)
        finally:
            _terminate(children)


def command_line(point: Point, slot: RunSlot) -> list[str]:
    """Return the command that trains a point with the copy of its config in the output folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={slot.processes}"]
    launcher = [sys.executable, *(torchrun if slot.processes > 1 else []), str(TRAIN_SCRIPT)]
    return [*launcher, "--cfg", str(config_path(point)), "--resume", "auto"]


def _start(point: Point, slot: RunSlot, lock: int) -> _RunProcess:
    config = point.config
    if slot.threads is not None and config.data.threads is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"threads": slot.threads})})
    write_text(config_path(point), to_yaml(config))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    if slot.threads is not None:
        environment["OMP_NUM_THREADS"] = str(slot.threads)
    parent = os.getpid()

    def before_exec() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until exec, the sweep's handler would swallow it
        die_with_parent(signal.SIGTERM, parent)  # torchrun forwards it to its processes

    with log_path(point).open("ab") as log:
        log_start = log.tell()  # read before the child writes, since it shares the position
        process = subprocess.Popen(
            command_line(point, slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,  # so that Ctrl-C only reaches the sweep
            preexec_fn=before_exec,
        )
    return _RunProcess(point, slot, process, log_start, time.monotonic())


def _failure_line(child: _RunProcess) -> str | None:
    """Return how a run failed and the log line that explains the failure, or None if the run finished.

    The log line is the last one that starts with an error message, or the last line of all if there is none.
    """
    code = child.process.returncode
    if code == 0:
        return None
    with log_path(child.point).open("rb") as file:
        file.seek(child.log_start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(\[rank\d+\]: *)?(error: |[\w.]*(Error|Exception)\b)", line)]
    end = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return f"{end}: {(telling or lines or ['it printed nothing'])[-1]}"


def _terminate(children: Sequence[_RunProcess]) -> None:
    for child in children:
        child.process.terminate()
    give_up_at = time.monotonic() + TERMINATE_GRACE_S
    for child in children:
        try:
            child.process.wait(max(0.0, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
