"""tools/benchmarks/engine/roofline.py: limits are positive and bound the rates."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import ModelConfig
from helpers.benchmarks import settings_in
from pipelines.storage.open import open_split
from tools.benchmarks.engine import roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import measure
from tools.benchmarks.engine.results import add_bound
from tools.benchmarks.suites.loading import loading_table


def test_every_limit_of_a_cpu_is_positive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements = measure([Candidate("limits", roofline.limit_workloads, ("cpu", tmp_path))], 0.05, 1)
    found = roofline.limits_from(measurements)
    assert set(found) == {roofline.MEMORY, roofline.ARITHMETIC, roofline.DISK}
    assert all(value > 0 for value in found.values())
    assert not list(tmp_path.iterdir())
    assert all("value" in row for row in roofline.limit_rows(measurements))


def test_reading_is_slower_than_one_copy(npy_data: Path, tmp_path: Path) -> None:
    size = open_split(npy_data, "train").image_shape
    group = loading_table(settings_in(tmp_path), npy_data, None, size=(size or (0,))[0], batch_size=128)
    ours, *bounds = group.run({}, 0.1, 3, None)["rows"]
    fastest = max(row["images_per_s"] for row in bounds)
    assert 0 < ours["share"] <= 1.2
    assert ours["bound"]["images_per_s"] == pytest.approx(fastest, rel=1e-3)


# forward multiply-adds as counted in the homework; backward costs twice as much, without the first layer's input
@pytest.mark.parametrize(("name", "size", "multiply_adds"), [("lenet", 32, 0.886e6), ("resnet18", 32, 555.4e6)])
def test_training_flops_are_three_forward_passes(name: str, size: int, multiply_adds: float) -> None:
    passes = roofline.training_flops(ModelConfig(name=name), 10, size) / (2 * multiply_adds)
    assert 2.4 < passes <= 3.01


def test_tightest_bound_is_named() -> None:
    found = {roofline.PINNED: 50e9, roofline.MEMORY: 100e9, roofline.DEVICE_MEMORY: 2000e9}
    sizes = {"stored_bytes": 1000, "output_bytes": 2000}
    host = roofline.loading_bounds(found, placement="host", device="cuda", **sizes)
    assert host == {roofline.PINNED: 50e6, roofline.MEMORY: 100e6}
    assert roofline.loading_bounds(found, placement="device", device="cuda", **sizes) == {roofline.DEVICE_MEMORY: 1e9}
    row = {"images_per_s": 45e6}
    add_bound(row, host, otherwise="the cores")
    assert (row["bound"], row["share"], row["binds"]) == (
        {"name": roofline.PINNED, "images_per_s": 50e6},
        0.9,
        roofline.PINNED,
    )
    row = {"images_per_s": 5e6}
    add_bound(row, host, otherwise="the cores")
    assert row["binds"] == "the cores"


def test_file_of_the_disk_limit_is_deleted_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with roofline.limit_workloads("cpu", tmp_path):
            assert (tmp_path / "disk-read").exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())
