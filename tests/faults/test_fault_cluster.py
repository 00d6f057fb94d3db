"""Conversions and sweeps on a Ray cluster that are stopped, killed or lose a node continue where they were."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.converter import (
    Contents,
    Conversion,
    block_count,
    contents,
    kill_group,
    run,
    said,
    start,
    wait_for,
    write_hdf5,
)
from helpers.ray_cluster import RayCluster
from helpers.sweep_commands import call_sweep, start_sweep, sweep_command, table_rows, trainers
from helpers.training import Run, restore_signal_handlers
from train.reporting.metrics_file import read_metrics

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def npy(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return Conversion(write_hdf5(tmp_path_factory.mktemp("source") / "x.hdf5"), ("hdf5",))


@pytest.fixture(scope="module")
def local(npy: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """All files of a local conversion."""
    out = tmp_path_factory.mktemp("local") / "out"
    assert run(npy.command(out))[0] == 0
    return contents(out)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def open_files(folder: Path) -> list[str]:
    """Return the files in the folder that any process has open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_conversion_continues_on_one_machine(
    number: int,
    code: int,
    cluster: RayCluster,
    npy: Conversion,
    local: Contents,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    process = start(npy.command(out, None, *cluster.options()), preexec_fn=restore_signal_handlers)
    wait_for(lambda: block_count(out) > 2, process)
    process.send_signal(number)
    error = said(process.communicate(timeout=60)[1])
    assert (process.returncode, error.count("\n")) == (code, 0), error
    assert not (out / "dataset.json").exists()
    assert run(npy.command(out))[0] == 0
    assert contents(out) == local


def test_killed_conversion_ends_its_tasks_and_continues_on_the_cluster(
    cluster: RayCluster, npy: Conversion, local: Contents, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(npy.command(out))
    wait_for(lambda: block_count(out) > 2, process)
    kill_group(process)
    before = block_count(out)
    for _ in range(2):
        process = start(npy.command(out, None, *cluster.options()))
        wait_for(lambda: block_count(out) > before, process)
        kill_group(process)
        assert not (out / "dataset.json").exists()
    wait_until(lambda: open_files(out) == [])
    assert run(npy.command(out, None, *cluster.options())) == (0, "")
    assert contents(out) == local


def test_run_of_a_node_that_dies_is_finished_elsewhere(cluster: RayCluster, digits_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_sweep(sweep_command(digits_run.data, out, "seed=1,2,3", *cluster.options(), epochs=12))
    wait_until(lambda: all((out / f"seed={seed}" / "last.pt").exists() for seed in (1, 2, 3)))
    cluster.kill_node()
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert [row["status"] for row in table_rows(out)] == ["finished"] * 3
    resumed = [seed for seed in (1, 2, 3) if "resumed from" in (out / f"seed={seed}.log").read_text()]
    assert len(resumed) == 1, printed
    assert [record["epoch"] for record in read_metrics(out / f"seed={resumed[0]}")] == list(range(12))


def test_interrupted_sweep_ends_its_runs_and_continues_locally(
    cluster: RayCluster, digits_run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start_sweep(sweep_command(digits_run.data, out, "seed=1,2", *cluster.options(), epochs=20))
    wait_until(lambda: all((out / f"seed={seed}" / "last.pt").exists() for seed in (1, 2)))
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, "interrupted")
    assert trainers(out) == []
    assert "run the same command again: zhu sweep " in printed
    assert "stopped by SIGTERM" in (out / "seed=1.log").read_text()
    assert call_sweep(sweep_command(digits_run.data, out, "seed=1,2", "--parallel", "2", epochs=20))[0] == 0
    assert "resumed from" in (out / "seed=1.log").read_text()
    assert [row["status"] for row in table_rows(out)] == ["finished"] * 2


def test_runs_end_with_a_killed_sweep(cluster: RayCluster, digits_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_sweep(sweep_command(digits_run.data, out, "seed=1,2", *cluster.options(), epochs=500))
    wait_until(lambda: len(trainers(out)) >= 2)
    process.kill()
    process.communicate()
    wait_until(lambda: trainers(out) == [])
