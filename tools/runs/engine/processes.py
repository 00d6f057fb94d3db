"""The process of a run: start it, explain its failure, terminate it.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.runs.run_slots import RunSlot

TRAIN_SCRIPT = Path(__file__).parents[3] / "train" / "ddp.py"
TERMINATE_GRACE_S = 30.0  # between SIGTERM and SIGKILL, as in torchrun
TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass
class RunProcess:
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # offset in bytes, after the output of earlier attempts
    started_at: float


def command_line(config_file: Path, slot: RunSlot) -> list[str]:
    """Return the command that trains a config, or continues its run."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={slot.processes}"]
    launcher = [sys.executable, *(torchrun if slot.processes > 1 else []), str(TRAIN_SCRIPT)]
    return [*launcher, "--cfg", str(config_file), "--resume", "auto"]


def start_run(config_file: Path, log: Path, slot: RunSlot, pass_fds: tuple[int, ...] = ()) -> RunProcess:
    """Start to train a config. The process appends its output to `log` and ends with this one."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    if slot.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
    if slot.threads is not None:
        environment["OMP_NUM_THREADS"] = str(slot.threads)
    launch = [sys.executable, str(Path(__file__).with_name("launch.py")), str(os.getpid())]
    with log.open("ab") as opened:
        log_start = opened.tell()  # read before the child writes, since it shares the position
        process = subprocess.Popen(
            [*launch, *command_line(config_file, slot)],
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=pass_fds,
            start_new_session=True,  # so that Ctrl-C only reaches the sweep
        )
    return RunProcess(process, log, log_start, time.monotonic())


def failure_line(run: RunProcess) -> str | None:
    """Return how a run failed and the log line that explains the failure, or None if the run finished.

    The log line is the last one that starts with an error message, or the last line of all if there is none.
    """
    code = run.process.returncode
    if code == 0:
        return None
    with run.log.open("rb") as file:
        file.seek(run.log_start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"(\[rank\d+\]: *)?(error: |[\w.]*(Error|Exception)\b)", line)]
    end = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    return f"{end}: {(telling or lines or ['it printed nothing'])[-1]}"


def terminate(runs: Sequence[RunProcess]) -> None:
    """Send SIGTERM to runs that have not ended, so that they save a checkpoint, and wait for their end."""
    for run in runs:
        run.process.terminate()
    give_up_at = time.monotonic() + TERMINATE_GRACE_S
    for run in runs:
        try:
            run.process.wait(max(0.0, give_up_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
