"""Tests of tools.runs.sweep_runner, with short scripts in place of train/ddp.py."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.load import load_config
from configs.utils.errors import UserError
from helpers.sweeps import points_of
from tools.runs import sweep_runner
from tools.runs.engine import processes
from tools.runs.engine.local_runs import LocalRuns
from tools.runs.run_slots import RunSlot
from tools.runs.sweep_runner import RunOutcome, run_points

Fake = Callable[[str], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace every run by a script, which gets the point's name as sys.argv[1]."""

    def use(script: str) -> None:
        monkeypatch.setattr(processes, "command_line", lambda file, _: [sys.executable, "-c", script, file.stem])

    return use


def run_fakes(folder: Path, slots: list[RunSlot], *axes: str) -> dict[str, RunOutcome]:
    with sweep_runner.lock_folder(folder) as lock:
        outcomes = run_points(points_of(*axes, output=str(folder)), slots, LocalRuns(lock))
        return {outcome.point.name: outcome for outcome in outcomes}


def test_failed_run_reports_its_error_and_others_continue(tmp_path: Path, fake: Fake) -> None:
    fake("import sys; print('begin'); assert sys.argv[1] != 'seed=1', 'too large\\nfor this GPU'; print('end')")
    (tmp_path / "seed=1.log").write_text("error: of an earlier attempt\n")
    outcomes = run_fakes(tmp_path, [RunSlot()], "seed=0,1,2")
    assert {name: outcome.error for name, outcome in outcomes.items()} == {
        "seed=0": None, "seed=1": "exit code 1: AssertionError: too large", "seed=2": None,
    }  # fmt: skip
    assert (tmp_path / "seed=2.log").read_text() == "begin\nend\n"
    assert (tmp_path / "seed=1.log").read_text().startswith("error: of an earlier attempt\n")
    fake("import os; os.kill(os.getpid(), 9)")
    assert run_fakes(tmp_path, [RunSlot()], "seed=0")["seed=0"].error == "killed by SIGKILL: it printed nothing"


def test_gpu_groups_run_one_point_at_a_time(tmp_path: Path, fake: Fake) -> None:
    fake("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], time.time()); "
         "time.sleep(0.2); print(time.time())")  # fmt: skip
    slots = [RunSlot(("0", "1"), 1, threads=3), RunSlot(("GPU-a",), 1, threads=3)]
    run_fakes(tmp_path, slots, "seed=0,1,2,3,4,5")
    used: dict[str, list[tuple[float, float]]] = {}
    for number in range(6):
        gpus, threads, start, end = (tmp_path / f"seed={number}.log").read_text().split()
        assert threads == "3"
        used.setdefault(gpus, []).append((float(start), float(end)))
        assert load_config(tmp_path / f"seed={number}.yaml").data.threads == 3
    assert set(used) == {"0,1", "GPU-a"}
    for times in used.values():
        times.sort()
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))


def test_second_sweep_in_a_locked_folder_is_refused(tmp_path: Path) -> None:
    with (
        sweep_runner.lock_folder(tmp_path),
        pytest.raises(UserError, match="another sweep is running in"),
        sweep_runner.lock_folder(tmp_path, wait_s=0.1),
    ):
        pass
