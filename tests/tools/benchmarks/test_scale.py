"""tools/benchmarks/suites/scale.py: the loader accepts the generated data sets."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.open import open_split
from tools.benchmarks.suites import scale


def test_sparse_data_set_opens_and_takes_no_space(tmp_path: Path) -> None:
    scale.make_sparse_set(tmp_path / "made", samples=40_000, side=96)
    split = open_split(tmp_path / "made", "train", verify="off")
    assert len(split) == 40_000
    assert len(split.files) == 3
    view, rows = split.pixel_rows()
    assert view[rows[[0, 20_000, 39_999]]].sum() == 0
    assert sum(file.stat().st_blocks * 512 for file in split.files) < 2**20


def test_every_size_reports_cost_memory_and_first_batch(tmp_path: Path) -> None:
    group = scale.scale_table(tmp_path, 0.02, sizes=(10_000, 20_000), side=8).run({}, 0.01, 1, None)
    assert [row["samples"] for row in group["rows"]] == [10_000, 20_000]
    for row in group["rows"]:
        assert row["error"] is None
        assert min(row["loader_us"], row["order_us"], row["draws_us"], row["first_batch_s"]) > 0
        assert row["memory_mib"] < 200
