"""data.limit: a part of both splits, equal on all ranks, in every order and placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import DataConfig
from helpers.loaders import NO_AUG, evaluation, train
from helpers.memory_source import rows_of
from pipelines import order
from pipelines.storage.open import open_split


def rows(loader: Any) -> list[int]:
    """Return the source rows of all samples of an iteration."""
    return [row for images, _ in loader for row in rows_of(images)]


@pytest.mark.parametrize("how", [{}, {"order": "sequential-window", "window_shards": 2}], ids=["random", "window"])
def test_limited_epochs_have_the_same_samples_on_any_ranks_and_placement(how: dict[str, Any], npy_data: Path) -> None:
    limited: dict[str, Any] = {"limit": 96, **how}
    chosen = rows(train(npy_data, 24, placement="host", **limited))
    assert len(set(chosen)) == len(chosen) == 96
    assert rows(train(npy_data, 24, placement="device", **limited)) == chosen
    ranks = [train(npy_data, 12, NO_AUG, rank, 2, **limited) for rank in range(2)]
    batches = [rows_of(batch.images) for pair in zip(*ranks, strict=True) for batch in pair]
    assert [row for batch in batches for row in batch] == chosen
    assert sorted(rows(train(npy_data, 24, seed=8, **limited))) == sorted(chosen)  # in another order


def test_limited_evaluation_visits_the_chosen_samples_once(npy_data: Path) -> None:
    parts = [evaluation(npy_data, rank=rank, world_size=2, limit=0.25) for rank in range(2)]
    chosen = [row for part in parts for row in rows(part)]
    assert len(set(chosen)) == len(chosen) == round(0.25 * 107)
    assert chosen == rows(evaluation(npy_data, limit=0.25))
    assert sum(part.seen.samples for part in parts) == len(parts[0].split) == len(chosen)


def test_limit_above_the_split_keeps_all_samples(npy_data: Path) -> None:
    assert len(evaluation(npy_data, limit=108).split) == 107
    assert rows(evaluation(npy_data, limit=107)) == rows(evaluation(npy_data))


def test_limited_jpeg_samples_keep_their_files_and_labels(jpeg_data: Path) -> None:
    whole = open_split(jpeg_data, "train")
    assert whole.labels is not None
    chosen = order.stratified_subset(whole.labels, 60)
    split = train(jpeg_data, 12, image_size=32, limit=60).split
    assert split.labels is not None
    np.testing.assert_array_equal(split.labels, whole.labels[chosen])
    for sample in (0, 31, 59):
        np.testing.assert_array_equal(split.image_bytes(sample), whole.image_bytes(int(chosen[sample])))


@pytest.mark.parametrize("limit", [1.0, 1.5, 0, -3, 0.0])
def test_limit_that_is_neither_a_number_nor_a_share_is_refused(limit: float, npy_data: Path) -> None:
    with pytest.raises(ValueError, match=r"whole number of samples|greater than 0"):
        DataConfig(path=str(npy_data), limit=limit)
