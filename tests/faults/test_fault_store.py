"""Runs on an object store that fails, and runs killed while they fetch: their result is that of a local run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.faults import assert_same_run, run_arguments, run_to_its_end, start, wait_for
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.object_store import ObjectStore, failing, s3_server, upload
from helpers.training import command_line

pytestmark = pytest.mark.campaign
SLOW_SHARD = "tiny-train-000005.tar"


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of ten shards, and beside it the run that is trained on it without a fault."""
    folder = tmp_path_factory.mktemp("local")
    write(memory_source(train=MemoryRows(2400), val=MemoryRows(300)), folder / "set")
    result = run_to_its_end(arguments(folder / "set", folder))
    assert result.returncode == 0, result.stderr
    return folder


def arguments(data: Path | str, output: Path, *options: str) -> list[str]:
    chosen = run_arguments(Path("unused"), output, "train.epochs=2", "data.image_size=32", "data.placement=host")
    chosen[chosen.index(Path("unused"))] = str(data)
    order = ("data.order=sequential-window", "data.window_shards=2", f"data.cache={output / 'cache'}")
    return command_line(*chosen, *order, *options)


def access() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.mark.parametrize("limit_mib", [None, 11])
def test_a_run_on_a_failing_store_is_the_local_run(
    limit_mib: int | None, local: Path, server: ObjectStore, tmp_path: Path
) -> None:
    url = upload(server, local / "set")
    server.fault = failing(0.3)
    options = [] if limit_mib is None else [f"data.cache_gib={limit_mib / 1024}"]
    result = run_to_its_end(arguments(url, tmp_path, *options), **access())
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "digits_lenet", local / "digits_lenet")


def test_a_run_killed_while_fetching_resumes_as_the_local_run(local: Path, server: ObjectStore, tmp_path: Path) -> None:
    url = upload(server, local / "set")
    server.fault = lambda method, path, answer: answer._replace(pause_s=5.0) if SLOW_SHARD in path else None

    def is_fetching() -> bool:
        return any(file.stat().st_size for file in (tmp_path / "cache").glob(f"*/{SLOW_SHARD}.part"))

    process = start(arguments(url, tmp_path), **access())
    wait_for(process, is_fetching)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.fault = None
    result = run_to_its_end(arguments(url, tmp_path, "--resume", "auto"), **access())
    assert result.returncode == 0, result.stderr
    assert_same_run(next(file.parent for file in tmp_path.glob("*/last.pt")), local / "digits_lenet")
    assert list((tmp_path / "cache").glob("*/*.part")) == []
    result = run_to_its_end(arguments(local / "set", tmp_path, "train.epochs=3", "--resume", "auto", "--extend"))
    assert result.returncode == 0, result.stderr
