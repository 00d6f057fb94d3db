"""Conversions on a Ray cluster of three nodes: byte-identical, whatever dies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.converter import (
    ENVIRONMENT,
    ROOT,
    Contents,
    Conversion,
    block_count,
    contents,
    conversions,
    run,
    said,
    start,
    wait_for,
)
from helpers.ray_cluster import RayCluster

pytestmark = pytest.mark.slow
CAN_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
TASKS = """
import os, sys, time
from pathlib import Path
from configs.utils.errors import run_main
from pipelines.cluster.connection import connect
from pipelines.cluster.pool import RayPool

def work(shared, task):
    time.sleep(0.05 * (5 - task))
    if task == 3 and shared == "crash":
        os.kill(os.getpid(), 9)
    if task == 3 and shared == "raise":
        raise FileNotFoundError(2, "No such file", "x.jpg")
    return shared, task

def probe(shared):
    if shared == "not shared":  # the first call is in this process
        Path("{folder}", ".cluster-token").unlink()
    return None if shared != "probe" else os.getpid()

def main():
    shared = sys.argv[2]
    with connect(sys.argv[1]) as cluster:
        folder = Path("{folder}")
        with RayPool(cluster, shared, folder, probe, None) as pool:
            assert list(pool.imap(work, range(6))) == [(shared, task) for task in range(6)]

run_main(main)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Conversion]:
    return conversions(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def local(sources: dict[str, Conversion], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contents]:
    """All files of local conversions."""
    out = tmp_path_factory.mktemp("local")
    for encoding, conversion in sources.items():
        code, error = run(conversion.command(out / encoding))
        assert code == 0, error
    return {encoding: contents(out / encoding) for encoding in sources}


def test_conversion_on_a_cluster_is_byte_identical(
    cluster: RayCluster, sources: dict[str, Conversion], local: dict[str, Contents], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(sources["npy"].command(out, None, *cluster.options(), "--workers", "2")) == (0, "")
    assert contents(out) == local["npy"]


def test_node_that_dies_in_a_conversion_changes_no_byte(
    cluster: RayCluster, sources: dict[str, Conversion], local: dict[str, Contents], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(sources["jpeg"].command(out, None, *cluster.options()))
    wait_for(lambda: block_count(out) > 2, process)
    cluster.kill_node()
    assert not (out / "dataset.json").exists()
    printed, error = process.communicate(timeout=120)
    assert (process.returncode, said(error)) == (0, "")
    assert "8 quarantined" in printed
    assert len(printed.splitlines()) < 15  # no logs of Ray
    assert contents(out) == local["jpeg"]


@pytest.mark.skipif(not CAN_MOUNT, reason="needs unshare -rm")
def test_output_that_only_this_machine_sees_is_refused(
    cluster: RayCluster, sources: dict[str, Conversion], tmp_path: Path
) -> None:
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path)]
    code, error = run([*mount, *sources["npy"].command(tmp_path / "out", None, *cluster.options())])
    assert code == 2
    assert re.fullmatch(rf"error: node .* does not see the files in {tmp_path}/out/.spool; use a folder on a .*", error)


def test_unusable_image_ends_a_strict_conversion_as_on_one_machine(
    cluster: RayCluster, sources: dict[str, Conversion], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    expected = run([*sources["jpeg"].command(out), "--strict"])
    assert expected[0] == 2
    assert "fix or remove it, or omit --strict" in expected[1]
    shutil.rmtree(out)
    assert run(sources["jpeg"].command(out, None, *cluster.options(), "--strict")) == expected


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ("order", ""),
        (
            "crash",
            "error: a task failed on the cluster 4 times (The worker died unexpectedly while executing this task)",
        ),
        ("raise", "FileNotFoundError: [Errno 2] No such file: 'x.jpg'"),
        ("probe", "reads a different source than this machine under the same path"),
        ("not shared", "does not see the files in"),
    ],
)
def test_pool_keeps_order_and_raises_the_errors_of_tasks(
    shared: str, message: str, cluster: RayCluster, tmp_path: Path
) -> None:
    script = TASKS.replace("{folder}", str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", script, cluster.address, shared],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    assert (result.returncode == 0) == (message == ""), result.stderr
    if message:
        assert message in result.stderr.strip().splitlines()[-1], result.stderr
    else:
        assert result.stderr == ""
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
