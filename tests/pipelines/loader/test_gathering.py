"""The first batches of the next epoch are gathered at the end of an epoch, whatever the consumer then asks for."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import AugConfig, DataConfig
from helpers.damage import DAMAGE, damage
from helpers.loaders import NO_AUG, assert_same, copies, data_of, evaluation, train
from pipelines import build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.epoch_iterator import Loader
from pipelines.loader.train_loader import TrainLoader

FLIP = AugConfig(flip=0.5)
WAIT_S = 20.0


def gather_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("gather", "prepare")}


class Fills:
    """Record the samples that a loader's source gathers, one list per group."""

    def __init__(self, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[int]] = []
        fill = loader.stage.source.fill

        def recorded(slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> Any:
            self.groups.append(indices.tolist())
            return fill(slot, indices, draws)

        monkeypatch.setattr(loader.stage.source, "fill", recorded)

    def wait_for(self, count: int) -> None:
        """Wait until `count` groups have been gathered."""
        end_s = time.monotonic() + WAIT_S
        while len(self.groups) < count:
            assert time.monotonic() < end_s, f"only {len(self.groups)} groups"
            time.sleep(0.001)


@pytest.fixture
def before() -> set[threading.Thread]:
    """Threads of loaders that earlier tests have left in reference cycles are not counted."""
    gc.collect()
    return gather_threads()


def groups_of(loader: TrainLoader) -> int:
    """Return the number of groups of a first epoch."""
    return len(list(loader.stage.groups(0)))


@pytest.mark.parametrize("threads", [1, 2])
def test_slots_are_filled_with_the_next_epoch(
    threads: int, npy_data: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread]
) -> None:
    loader = train(npy_data, 5, threads=threads)
    fills, slots, first = Fills(loader, monkeypatch), loader.stage.slots, groups_of(loader)
    list(loader)
    fills.wait_for(first + slots)
    ahead = list(itertools.chain(*fills.groups[first:]))
    following = [loader.plan.indices(1, step).tolist() for step in range(len(loader))]
    assert sorted(ahead) == sorted(itertools.chain(*following[: len(ahead) // 5]))
    list(itertools.islice(loader, 1))  # dropped: its threads end before they have filled another slot
    assert gather_threads() <= before
    assert len(fills.groups) <= first + slots + 1


def test_threads_are_kept_for_the_next_epoch_until_the_loader_is_dropped(
    npy_data: Path, before: set[threading.Thread]
) -> None:
    loader = train(npy_data, 50, threads=2)
    list(loader)
    kept = gather_threads() - before
    assert len([thread for thread in kept if thread.name == "gather"]) == 2
    for _ in range(3):
        list(loader)
        assert gather_threads() - before == kept
    del loader
    assert gather_threads() <= before


def test_nothing_is_gathered_after_the_last_epoch(
    npy_data: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread]
) -> None:
    loader = build_train_loader(data_of(npy_data, 50), NO_AUG, seed=3, device="cpu", epochs=2)
    fills = Fills(loader, monkeypatch)
    list(loader)
    assert gather_threads() - before
    list(loader)
    assert gather_threads() <= before
    assert len(list(itertools.chain(*fills.groups))) == 2 * loader.plan.samples
    assert_same(copies(loader), copies(_at(train(npy_data, 50), Position(2))))  # further epochs are not forbidden


def test_evaluation_is_not_gathered_ahead(npy_data: Path, before: set[threading.Thread]) -> None:
    loader = evaluation(npy_data, 10)
    list(loader)
    assert gather_threads() <= before


def _at(loader: TrainLoader, position: Position) -> TrainLoader:
    loader.position = position
    return loader


@pytest.mark.parametrize("aug", [NO_AUG, FLIP], ids=["stored pixels", "graph"])
def test_any_position_after_an_epoch_gives_its_own_batches(aug: AugConfig, npy_data: Path) -> None:
    loader = train(npy_data, 50, aug)
    for position in (Position(0), Position(1), Position(1, 13), Position(7), Position(7), Position(2, 4), Position(0)):
        loader.position = position
        expected = _at(train(npy_data, 50, aug), position)
        assert_same(copies(loader), copies(expected))
        assert loader.position == Position(position.epoch + 1)


def test_iterator_left_early_in_a_gathered_epoch_continues(npy_data: Path, before: set[threading.Thread]) -> None:
    loader = train(npy_data, 50)
    list(loader)
    seen = [*copies(itertools.islice(loader, 3)), *copies(itertools.islice(loader, 1))]
    assert gather_threads() <= before
    assert_same([*seen, *copies(loader)], copies(_at(train(npy_data, 50), Position(1))))


def test_iterator_that_has_finished_does_not_end_the_next_epoch(npy_data: Path) -> None:
    loader = train(npy_data, 50)
    finished = iter(loader)
    list(finished)
    following = iter(loader)
    seen = copies(itertools.islice(following, 2))
    finished.close()
    assert list(finished) == []
    assert_same([*seen, *copies(following)], copies(_at(train(npy_data, 50), Position(1))))


def test_stage_change_after_a_gathered_epoch_gives_the_new_sizes(npy_data: Path) -> None:
    stages = [{"epoch": 2, "image_size": 24}, {"epoch": 3, "batch_size": 16}]
    data = DataConfig(path=str(npy_data), batch_size=50, stages=stages, threads=1)  # type: ignore[arg-type]
    loader = build_train_loader(data, FLIP, seed=3, device="cpu")
    for epoch in range(5):
        expected = _at(build_train_loader(data, FLIP, seed=3, device="cpu"), Position(epoch))
        assert_same(copies(loader), copies(expected))


# Two loaders of one stage


def test_loader_of_the_same_stage_takes_over_its_slots(npy_data: Path, before: set[threading.Thread]) -> None:
    loader = train(npy_data, 50)
    list(loader)
    other = loader.single_stage(loader.stage.select(np.arange(100)))
    assert loader.split.labels is not None
    assert [batch.labels.tolist() for batch in other] == loader.split.labels[:100].reshape(2, 50).tolist()
    assert_same(copies(loader), copies(_at(train(npy_data, 50), Position(1))))
    del loader, other
    assert gather_threads() <= before


def test_iterator_raises_after_another_loader_took_its_slots(npy_data: Path) -> None:
    loader = train(npy_data, 50)
    first = iter(loader)
    next(first)
    next(iter(loader.single_stage()))
    with pytest.raises(RuntimeError, match="one iterator at a time"):
        next(first)
    assert loader.position == Position(0, 1)
    assert_same(copies(loader), copies(_at(train(npy_data, 50), Position(0, 1))))


# Errors


@pytest.mark.parametrize("failing", [0, 1])
def test_error_in_a_gathered_epoch_is_raised_at_its_batch(
    failing: int, npy_data: Path, monkeypatch: pytest.MonkeyPatch, before: set[threading.Thread]
) -> None:
    loader = train(npy_data, 50)
    fill, bad = loader.stage.source.fill, loader.plan.indices(1, failing * 8)  # groups of the next epoch have 8 batches

    def breaking(slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> Any:
        if np.array_equal(indices[: len(bad)], bad):
            raise OSError("the disk is gone")
        return fill(slot, indices, draws)

    with monkeypatch.context() as patch:
        patch.setattr(loader.stage.source, "fill", breaking)
        assert len(list(loader)) == len(loader)  # the epoch before it is whole
        batches = iter(loader)
        for _ in range(failing * 8):
            next(batches)
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
        assert gather_threads() <= before
    assert loader.position == Position(1, failing * 8)
    expected = _at(train(npy_data, 50), loader.position)
    assert_same(copies(loader), copies(expected))


def test_bad_sample_found_ahead_is_replaced_as_without(
    jpeg_copy: Path,
) -> None:
    damage(jpeg_copy, 333, DAMAGE["emptied"])
    options: dict[str, Any] = {"image_size": 24, "on_bad_sample": "skip", "max_bad_samples": 1}
    loader = train(jpeg_copy, 100, **options)
    for epoch in range(3):
        assert_same(copies(loader), copies(_at(train(jpeg_copy, 100, **options), Position(epoch))))
    assert [bad for bad, _ in loader.bad.found] == [333]
