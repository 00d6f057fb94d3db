"""tools/benchmark.py: that it measures the real loader and step, and what it writes. No figure is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import benchmark, convert, peers


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark") / "digits"
    convert.main(["digits", "--out", str(folder)])
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/benchmark.py", *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


def test_loader_stage_writes_rows_for_ours_and_for_every_installed_peer(digits: Path, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    quick = ("--seconds", 0.02, "--rounds", 1, "--batch-size", 32, "--workers", 1)
    result = run("loader", "--data-path", digits, "--peers", *quick, "--json", rows_file)
    assert result.returncode == 0, result.stderr
    rows = json.loads(rows_file.read_text())
    names = [row["name"] for row in rows]
    assert {"ours, reading", "ours, reading + augmentation", *peers.importable()} <= set(names)
    assert {"DataLoader over h5py", "DataLoader over pickle", "DALI readers.webdataset"} <= set(names)
    for row in rows:
        assert row["stage"] == "loader"
        assert row["images_per_s"] > 0
        assert row["name"] in result.stdout
        assert {"machine", "torch", "dali", "date", "batch_size", "device"} <= set(row)


def test_train_stage_gives_the_ratio_of_end_to_end_to_the_resident_batch(digits: Path, tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    config = ("--cfg", "configs/digits_lenet.yaml", "--data-path", digits)
    result = run("train", *config, "--seconds", 0.05, "--rounds", 2, "--json", rows_file)
    assert result.returncode == 0, result.stderr
    model, train = json.loads(rows_file.read_text())
    assert (model["stage"], train["stage"]) == ("model", "train")
    assert train["ratio"] == pytest.approx(train["images_per_s"] / model["images_per_s"], abs=2e-3)


@pytest.mark.parametrize("name", sorted(peers.importable()))
def test_a_peer_delivers_the_same_images_as_ours(digits: Path, tmp_path: Path, name: str) -> None:
    """The multiset of images of a split, told apart by their sums of weighted pixels, is the same from every loader."""
    source = peers.PeerSource(benchmark.open_split(digits, "val"), tmp_path, batch_size=36, workers=0)
    if name == "DALI readers.webdataset":
        source = peers.PeerSource(source.split, tmp_path, batch_size=36, workers=1)
    if name == "FFCV raw":
        pytest.skip("FFCV compiles for most of a minute and needs at least one worker")
    batches = peers.PEERS[name](source)
    sums = sorted(int(image.sum()) for _ in range(10) for image in next(batches)[0].reshape(36, -1).int())
    assert sums == sorted(source.pixels().reshape(360, -1).astype(int).sum(1).tolist())


def test_nothing_to_measure_is_a_user_error() -> None:
    result = run("loader")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing to measure")
    assert "Traceback" not in result.stderr
