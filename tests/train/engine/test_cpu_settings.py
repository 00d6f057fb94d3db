"""CPU threads: fewer beside busy processes, kept after a resume, and fixed by OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.utils import warnings
from helpers.training import CPU, alone, make_state, small_net
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.checkpoint.state import invalid_entry
from train.engine import cpu_settings


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate four cores without OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    warnings.warn.cache_clear()
    torch.set_num_threads(4)
    with alone():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("busy", "threads"), [(0, 4), (0.4, 4), (1, 3), (2, 2), (3, 1), (4, 1), (1.6, 2)])
def test_busy_cores_reduce_threads(
    busy: float, threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_settings, "busy_cores", lambda: busy)
    cpu_settings.limit_threads(CPU)
    assert torch.get_num_threads() == threads
    note = f"other processes keep {busy:.1f} of 4 cores busy, so {threads} of 4 threads are used"
    assert (note in capsys.readouterr().err) == (threads < 4)


def test_fewer_threads_are_reduced_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "busy_cores", lambda: 2)
    torch.set_num_threads(2)  # of four cores, as a job may have them
    cpu_settings.limit_threads(CPU)
    assert torch.get_num_threads() == 1


def test_omp_num_threads_fixes_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "busy_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    cpu_settings.limit_threads(CPU)
    cpu_settings.restore_threads(1)
    assert torch.get_num_threads() == 4


def test_gpu_run_keeps_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_settings, "busy_cores", lambda: 4)
    cpu_settings.limit_threads(torch.device("cuda"))
    assert torch.get_num_threads() == 4


def test_resumed_run_keeps_its_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_settings, "busy_cores", lambda: 3.0)
    first = make_state(small_net())
    cpu_settings.limit_threads(CPU)
    capsys.readouterr()
    store.save(tmp_path / "last.pt", first, first.sums)
    torch.set_num_threads(4)
    content = store.load(tmp_path / "last.pt")
    assert invalid_entry(content) is None
    restore_state(first, content, tmp_path / "last.pt")
    assert torch.get_num_threads() == 1
    del content["threads"]  # from a checkpoint of an earlier version
    restore_state(first, content, tmp_path / "last.pt")
    assert torch.get_num_threads() == 1
    assert "keep" not in capsys.readouterr().err
    cpu_settings.restore_threads(2)
    assert "3.0 of 4 cores busy, and 2 threads are used, as when the run started" in capsys.readouterr().err
    cpu_settings.restore_threads(64)  # from a larger machine
    assert torch.get_num_threads() == 4
    assert invalid_entry({**content, "threads": "4"}) == "threads"


def test_only_cores_of_this_process_count_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores 0 to 3 of eight are idle, half busy, busy and waiting for a disk. Other cores do not count."""
    core = [[10, 0, 0, 100, 0, 0, 0, 50, 9, 9] for _ in range(4)]
    changes = ((3, 10), (0, 5), (3, 5), (1, 8), (4, 10))  # column and clock ticks: idle, user, idle, nice, iowait

    def read(*_: object, **__: object) -> str:
        for number, (column, ticks) in zip((0, 1, 1, 2, 3), changes, strict=True):
            core[number][column] += ticks
            core[number][7] += 3  # stolen
        lines = [f"cpu{number} {' '.join(map(str, values))}" for number, values in enumerate(core)]
        return "\n".join(["cpu 1 2 3 4 5 6 7", *lines, f"cpu7 {core[2][1] * 9} 0 0 0 0 0 0", "intr 1"])

    monkeypatch.setattr(Path, "read_text", read)
    assert cpu_settings.busy_cores() == 1.5


def test_computing_processes_make_cores_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    count = len(os.sched_getaffinity(0))
    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        deadline = time.monotonic() + 60
        while cpu_settings.busy_cores() < 0.9 * count and time.monotonic() < deadline:
            time.sleep(0.1)
        assert cpu_settings.busy_cores() >= 0.5 * count
    finally:
        for process in spin:
            process.kill()
            process.wait()


def test_all_threads_are_used_if_core_load_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", missing)
        assert cpu_settings.busy_cores() == 0
