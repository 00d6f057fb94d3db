"""Signals during a run: it ends soon with a checkpoint, and the resumed run equals the uninterrupted one."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from helpers.chance import seeded
from helpers.faults import (
    STEPS,
    assert_same_run,
    command_with,
    content,
    digits_in,
    logged,
    run_arguments,
    run_to_its_end,
    start,
    wait_for,
)
from helpers.training import CLEAN, restore_signal_handlers

EXIT_S = 60


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_in(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def unbroken(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    done = run_to_its_end(command_with({}, run_arguments(digits, output)))
    assert (done.returncode, done.stderr) == (0, "")
    return output / "digits_lenet"


def stop_and_resume(
    number: signal.Signals,
    digits: Path,
    output: Path,
    after: str | Path,
    processes: int = 0,
    **faults: object,
) -> tuple[int, str]:
    """Send a signal once the log contains `after`, or that file exists, then resume.

    Returns:
        The exit code of the stopped run, and the position of its checkpoint.
    """
    options = [f"data.batch_size={64 // max(processes, 1)}"]
    folder, command = output / "digits_lenet", run_arguments(digits, output, *options)
    process = start(command_with(dict(faults), command, processes))
    wait_for(process, lambda: after.exists() if isinstance(after, Path) else logged(folder, after))
    sent_s = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=EXIT_S)
    assert time.monotonic() - sent_s < EXIT_S
    assert f"stopped by {number.name} after step" in out, (out, err)
    assert "Traceback" not in err or processes, err  # torchrun shows one of its own
    position = content(folder / "last.pt")["position"]
    where = f"epoch {position['epoch']} step {position['step']}"
    done = run_to_its_end(command_with({}, [*command, "--resume", "auto"], processes))
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    return process.returncode, where


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_run_stopped_by_signal_resumes_like_the_unbroken_one(
    number: signal.Signals, digits: Path, unbroken: Path, tmp_path: Path
) -> None:
    pause = {"pause_at": [*range(STEPS + 3, STEPS + 6)]}
    code, where = stop_and_resume(number, digits, tmp_path, "epoch 1:", **pause)
    assert code == 128 + number
    assert where in {f"epoch 1 step {step}" for step in range(1, 8)}
    assert_same_run(tmp_path / "digits_lenet", unbroken)


def test_closed_terminal_ends_the_run_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    """As with a closed ssh session: SIGHUP arrives, and nothing can be printed anymore."""
    ours, terminal = pty.openpty()

    def take_it() -> None:
        restore_signal_handlers()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    pause = {"pause_at": [*range(STEPS + 3, STEPS + 6)]}
    process = subprocess.Popen(
        command_with(pause, run_arguments(digits, tmp_path)),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_it,
        env={**CLEAN, "PYTHONUNBUFFERED": ""},
    )
    os.close(terminal)
    folder, end_s = tmp_path / "digits_lenet", time.monotonic() + 120
    while not logged(folder, "epoch 1:"):
        assert time.monotonic() < end_s
        if select.select([ours], [], [], 0.02)[0]:
            os.read(ours, 65536)  # otherwise the run blocks on a full buffer
    os.close(ours)
    assert process.wait(EXIT_S) == 128 + signal.SIGHUP
    assert logged(folder, "stopped by SIGHUP after step")
    assert content(folder / "last.pt")["position"]["epoch"] == 1


@pytest.mark.slow
def test_evaluation_interrupted_by_signal_is_repeated(digits: Path, unbroken: Path, tmp_path: Path) -> None:
    begun = tmp_path / "evaluates"
    code, where = stop_and_resume(signal.SIGTERM, digits, tmp_path, begun, evaluation_s=3.0, evaluates=str(begun))
    assert code == 128 + signal.SIGTERM
    assert where == f"epoch 0 step {STEPS}"
    assert_same_run(tmp_path / "digits_lenet", unbroken)


@pytest.mark.campaign
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_stop_at_one_step_and_resume(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    done = run_to_its_end(command_with({}, run_arguments(digits, tmp_path / "unbroken", "data.batch_size=32"), 2))
    assert done.returncode == 0, done.stderr
    pause = {"pause_at": [*range(STEPS + 3, STEPS + 6)]}
    code, where = stop_and_resume(number, digits, tmp_path / "stopped", "epoch 1:", processes=2, **pause)
    assert code != 0
    assert where.startswith("epoch 1")
    assert_same_run(tmp_path / "stopped" / "digits_lenet", tmp_path / "unbroken" / "digits_lenet")


@pytest.mark.campaign
def test_ranks_of_a_killed_torchrun_stop_with_a_checkpoint(digits: Path, tmp_path: Path) -> None:
    unbroken = run_arguments(digits, tmp_path / "unbroken", "data.batch_size=32")
    assert run_to_its_end(command_with({}, unbroken, 2)).returncode == 0
    command = run_arguments(digits, tmp_path / "killed", "data.batch_size=32")
    folder = tmp_path / "killed" / "digits_lenet"
    process = start(command_with({"pause_at": [*range(STEPS + 3, STEPS + 6)]}, command, 2))
    wait_for(process, lambda: logged(folder, "epoch 1:"))
    ranks = [
        Path("/proc") / child for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert len(ranks) >= 2
    process.kill()
    end_s = time.monotonic() + EXIT_S
    while any(rank.exists() for rank in ranks) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert not any(rank.exists() for rank in ranks)
    process.communicate()
    assert logged(folder, "stopped by SIGTERM after step")
    done = run_to_its_end(command_with({}, [*command, "--resume", "auto"], 2))
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, tmp_path / "unbroken" / "digits_lenet")


def steps_in(log: Path) -> int:
    """Return the number of lines about steps: a new one shows progress."""
    return log.read_text().count(" step ") if log.exists() else 0


@pytest.mark.campaign
def test_repeatedly_stopped_run_ends_like_the_unbroken_one(digits: Path, unbroken: Path, tmp_path: Path) -> None:
    instants, stops = seeded(), 0
    folder, command = tmp_path / "digits_lenet", run_arguments(digits, tmp_path)
    while True:
        process = start(command_with({}, [*command, "--resume", "auto"]))
        before = steps_in(folder / "log.txt")
        wait_for(process, lambda p=process, n=before: p.poll() is not None or steps_in(folder / "log.txt") > n)
        time.sleep(instants.uniform(0.0, 0.1))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=EXIT_S)
        if process.returncode == 0:
            break
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), (out, err)
        stops += process.returncode == 128 + signal.SIGTERM
    assert stops >= 2
    assert_same_run(folder, unbroken)
