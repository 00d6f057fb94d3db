"""Order of data larger than memory: shards are read ahead and released, and machines share the global batches."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import AugConfig, MixConfig
from helpers.loaders import assert_same, copies, data_of, train
from helpers.memory_source import rows_of
from pipelines import build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.batches import MixedBatch, TrainBatches
from pipelines.order import lane_permutation
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

WINDOW: dict[str, Any] = {"order": "sequential-window", "window_shards": 4}


def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Return the list to which each later call of `Split.advise` is added: the advice and the shards, if any."""
    asked: list[tuple[int, list[int]]] = []
    advise = Split.advise

    def record(split: Split, shards: np.ndarray, advice: int) -> None:
        if len(shards):
            asked.append((advice, shards.tolist()))
        advise(split, shards, advice)

    monkeypatch.setattr(Split, "advise", record)
    return asked


def test_shards_are_read_ahead_in_their_order_and_released(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = advised(monkeypatch)
    loader = train(npy_data, 4, order="sequential-window", window_shards=1)
    assert isinstance(loader.plan, TrainBatches)
    reading = loader.plan.shard_schedule(0, loader.split.shard).shard.tolist()
    assert sorted(reading) == list(range(len(open_split(npy_data, "train").files)))
    list(loader)
    loader.drop_ahead()
    needed = [shards for advice, shards in asked if advice == mmap.MADV_WILLNEED]
    assert needed[: len(reading) - 1] == [reading[:2], *([shard] for shard in reading[2:])]
    dropped = [shards for advice, shards in asked if advice == mmap.MADV_DONTNEED]
    assert dropped == [[shard] for shard in reading[:-2]]


def test_resumed_epoch_reads_only_the_rest_ahead(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = advised(monkeypatch)
    loader = train(npy_data, 4, order="sequential-window", window_shards=1)
    assert isinstance(loader.plan, TrainBatches)
    schedule = loader.plan.shard_schedule(0, loader.split.shard)
    loader.position = Position(0, int(schedule.first[2]) + 1)
    next(iter(loader))
    assert asked[0] == (mmap.MADV_WILLNEED, schedule.shard[2:].tolist())


def test_resumed_epoch_has_the_batches_of_the_unbroken_one(npy_data: Path) -> None:
    loader = build_train_loader(data_of(npy_data, **WINDOW), device="cpu", rank=1, world_size=2, machines=2)
    expected = [copies(loader) for _ in range(2)]
    for epoch, step in ((0, 5), (1, 9)):
        loader.position = Position(epoch, step)
        assert_same(copies(loader), expected[epoch][step:])


@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mixup=1.0, mode="elem")], ids=["plain", "mixed"])
@pytest.mark.parametrize(("world_size", "machines"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_machines_share_the_global_batches_of_sequential_window(
    world_size: int, machines: int, mix: MixConfig, npy_data: Path
) -> None:
    def epoch(rank: int, world_size: int, machines: int) -> list[dict[int, tuple[int, tuple[float, ...]]]]:
        """Return the source row, label and mix of the samples of each batch, with those of the neighbor."""
        loader = build_train_loader(
            data_of(npy_data, 48 // world_size, **WINDOW), AugConfig(mix=mix), seed=3, device="cpu", rank=rank,
            world_size=world_size, machines=machines,
        )  # fmt: skip
        found = []
        for batch in loader:
            rows = rows_of(batch.images)
            table = batch.mix.tolist() if isinstance(batch, MixedBatch) else [()] * len(rows)
            found.append({row: (rows[i ^ 1], tuple(table[i])) for i, row in enumerate(rows)})
        return found

    whole = epoch(0, 1, 1)
    ranks = [epoch(rank, world_size, machines) for rank in range(world_size)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert {row: found for part in parts for row, found in part.items()} == expected


@pytest.mark.parametrize("machines", [1, 2])
def test_odd_parts_of_machines_are_not_split_into_pairs(machines: int, npy_data: Path) -> None:
    parts = [
        build_train_loader(
            data_of(npy_data, 5, **WINDOW), seed=3, device="cpu", rank=rank,
            world_size=2, machines=machines,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = np.concatenate([np.concatenate([part.plan.indices(0, step) for part in parts]) for step in range(70)])
    np.testing.assert_array_equal(found, lane_permutation(parts[0].split.shard, 4, 3, 0))
