"""A sweep on a Ray cluster gives the same table as on one machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.ray_cluster import RayCluster
from helpers.sweep_commands import call_sweep, sweep_command, table_rows
from helpers.training import Run

TIMES = ("training_time_s", "images_per_s", "memory_gib")
POINTS = ["train.lr=1e-3", "train.lr=6e-3", "aug.flip=0.5", "model.name=nothing"]


@pytest.mark.campaign
def test_sweep_on_a_cluster_gives_the_local_table(cluster: RayCluster, digits_run: Run, tmp_path: Path) -> None:
    variants = [word for number, point in enumerate(POINTS) for word in ("--variant", f"v{number}: {point}")]
    local, remote = tmp_path / "local", tmp_path / "remote"
    cores = str(len(os.sched_getaffinity(0)))  # one thread per run, as on the nodes of the cluster
    assert call_sweep(sweep_command(digits_run.data, local, *variants, "--parallel", cores, epochs=1))[0] == 1
    on_cluster = sweep_command(digits_run.data, remote, *variants, *cluster.options(), epochs=1)
    code, printed, errors = call_sweep(on_cluster)
    assert (code, errors) == (1, "")
    assert table_rows(remote, *TIMES) == table_rows(local, *TIMES)
    assert [row["status"] for row in table_rows(remote)] == ["finished"] * 3 + ["failed at epoch 0 of 1"]
    assert "v3: failed, exit code 2: error: model 'nothing' is unknown" in printed
    assert "raylet" not in printed
    assert json.loads((remote / "sweep.json").read_text())["best"]["run"] in ("v0", "v1", "v2")
    assert {path.name for path in remote.iterdir()} == {path.name for path in local.iterdir()}
    configs = [(out / "v2.yaml").read_text() for out in (local, remote)]
    assert configs[1].replace(str(remote), str(local)) == configs[0]
    code, printed, _ = call_sweep(on_cluster)
    assert code == 1
    assert "4 runs in" in printed
    assert "3 of them finished before" in printed
