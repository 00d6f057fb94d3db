"""Locks, signal handlers and ties to a parent process, each across real processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from configs.utils.process import acquire_lock, handle_signals, importing_torch, start_time_ticks
from helpers.training import ROOT

HOLD = """
import subprocess, sys, time
from configs.utils.process import acquire_lock
file = open(sys.argv[1], "ab")
assert acquire_lock(file, is_inherited=sys.argv[2] == "inherited")
code = "import time; print('held', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], pass_fds=[file.fileno()])
print(child.pid, flush=True)
time.sleep(60)
"""
END_WITH_PARENT = """
import os, signal, subprocess, sys
from configs.utils.process import die_with_parent
parent = os.getpid()
child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent))
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("kind", ["inherited", "own"])
def test_lock_of_a_killed_process_is_held_by_its_children_only_if_inherited(kind: str, tmp_path: Path) -> None:
    with running(HOLD, str(tmp_path / "lock"), kind) as holder:
        assert holder.stdout is not None
        lines = {holder.stdout.readline().strip(), holder.stdout.readline().strip()}
        (child,) = lines - {"held"}
        with (tmp_path / "lock").open("ab") as file:
            assert not acquire_lock(file, is_inherited=kind == "inherited")
            holder.kill()
            assert acquire_lock(file, 0.5, is_inherited=kind == "inherited") == (kind == "own")
            os.kill(int(child), signal.SIGKILL)
            assert acquire_lock(file, 10.0, is_inherited=kind == "inherited")


def test_lock_is_awaited_for_as_long_as_its_holder_touches_the_file(tmp_path: Path) -> None:
    waits: list[float] = []

    def holder_works() -> None:
        waits.append(time.monotonic())
        if waits[-1] - waits[0] < 0.6:
            os.utime(tmp_path / "lock")

    with (tmp_path / "lock").open("ab") as held, (tmp_path / "lock").open("ab") as file:
        assert acquire_lock(held)
        assert not acquire_lock(file, 0.3, on_wait=holder_works)
        assert waits[-1] - waits[0] >= 0.7
        held.close()
        assert acquire_lock(file)


def test_signals_reach_the_handler_only_inside_and_ignored_ones_never() -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGUSR2, lambda *_: seen.append(0))]
    seen: list[int] = []
    try:
        with handle_signals(numbers, lambda number, _: seen.append(number)):
            for number in numbers:
                signal.raise_signal(number)
        assert seen == [signal.SIGUSR2]
        signal.raise_signal(signal.SIGUSR2)
        assert seen == [signal.SIGUSR2, 0]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_handler_of_c_code_is_replaced() -> None:
    code = """
import os, signal
from configs.utils.process import handle_signals
seen = []
# Python returns None for a handler of C code.
signal.getsignal = lambda number: None
signal_signal = signal.signal
signal.signal = lambda number, handler: (signal_signal(number, handler), None)[1]
with handle_signals([signal.SIGUSR2], lambda number, _: seen.append(number)):
    os.kill(os.getpid(), signal.SIGUSR2)
signal.signal = signal_signal
assert seen == [signal.SIGUSR2]
assert signal_signal(signal.SIGUSR2, signal.SIG_DFL) == signal.SIG_DFL
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_outside_the_main_thread_handlers_stay() -> None:
    seen: list[object] = []

    def enter() -> None:
        with handle_signals([signal.SIGUSR2], lambda *_: None):
            seen.append(signal.getsignal(signal.SIGUSR2))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGUSR2)]


def test_child_dies_with_its_killed_parent() -> None:
    with running(END_WITH_PARENT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        started = start_time_ticks(child)
        parent.kill()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and _is_running(child, started):
            time.sleep(0.02)
        assert not _is_running(child, started)


def _is_running(pid: int, started: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return start_time_ticks(pid) == started and state != "Z"
    except OSError:
        return False


def test_start_time_is_that_of_the_process() -> None:
    before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen(["sleep", "60"]) as process:
        started_s = start_time_ticks(process.pid) / os.sysconf("SC_CLK_TCK")
        process.kill()
    assert before_s - 0.02 <= started_s <= time.clock_gettime(time.CLOCK_BOOTTIME)
    with pytest.raises(OSError, match="No such"):
        start_time_ticks(process.pid)


def test_collector_is_paused_only_while_torch_is_first_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    with importing_torch():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with importing_torch():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
