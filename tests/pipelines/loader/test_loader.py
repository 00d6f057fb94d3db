"""The loader: each sample once, exact resume, same pixels at any world size, batches never overwritten."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import AugConfig, AutoAugmentConfig, BlurConfig, ColorJitterConfig, EraseConfig, EvalConfig
from configs.utils.errors import UserError
from helpers.damage import DAMAGE, damage
from helpers.loaders import NO_AUG, assert_same, copies, data_of, evaluation, merged, train
from helpers.memory_source import MemoryRows, jpeg_file, marked_image, memory_source, rows_of, write
from pipelines.interfaces import Position, SampleSource
from pipelines.loader import buffers
from pipelines.loader.backend import Backend, LoaderSpec
from pipelines.loader.bad_samples import for_training
from pipelines.loader.batches import Batch, EvalBatches
from pipelines.loader.epoch_iterator import Loader
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.stage import Stage
from pipelines.loader.train_loader import TrainLoader
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

FLIP = AugConfig(flip=0.5)
ALL_AUG = AugConfig(
    crop="random-resized",
    flip=0.5,
    flip_mode="alternating",
    auto=AutoAugmentConfig(policy="rand-m9-mstd0.5-inc1"),
    color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    grayscale=0.2,
    blur=BlurConfig(probability=0.5),
    erase=EraseConfig(probability=0.5, fill="random"),
    cutout=6,
)
WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3, 8])


# Contents of an epoch


@WORLD_SIZES
@pytest.mark.parametrize("aug", [NO_AUG, FLIP], ids=["stored pixels", "graph"])
@pytest.mark.parametrize("order", ["random", "sequential-window"])
def test_epoch_has_each_sample_once_except_dropped_rest(
    order: str, aug: AugConfig, world_size: int, npy_data: Path
) -> None:
    loaders = [train(npy_data, 11, aug, rank, world_size, order=order, window_shards=2) for rank in range(world_size)]
    orders = []
    for _ in range(2):
        seen = [rows_of(images) for loader in loaders for images, _ in loader]
        assert {len(batch) for batch in seen} == {11}
        flat = list(itertools.chain(*seen))
        assert len(set(flat)) == len(flat) == 700 // (11 * world_size) * 11 * world_size
        assert {len(loader) for loader in loaders} == {700 // (11 * world_size)}
        assert sum(loader.plan.samples for loader in loaders) == len(flat)
        orders.append(flat)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("aug", [NO_AUG, FLIP], ids=["stored pixels", "graph"])
def test_labels_and_pixels_belong_to_same_sample(aug: AugConfig, npy_data: Path) -> None:
    for images, labels in train(npy_data, aug=aug):
        rows = rows_of(images)
        assert labels.tolist() == [row * 7 % 12 for row in rows]
        for image, row in zip(images.permute(0, 2, 3, 1).numpy(), rows, strict=True):
            expected = marked_image(row)
            assert np.array_equal(image, expected) or (aug is FLIP and np.array_equal(image, expected[:, ::-1]))


@pytest.mark.parametrize("aug", [NO_AUG, FLIP, ALL_AUG], ids=["stored pixels", "graph", "all"])
def test_images_are_uint8_nchw_channels_last(aug: AugConfig, npy_data: Path) -> None:
    loaders = [train(npy_data, 24, aug, image_size=size) for size in (None, 20)]
    for loader, size in zip(loaders, (32, 20), strict=True):
        images, labels = next(iter(loader))
        assert images.shape == (24, 3, size, size)
        assert images.dtype == torch.uint8
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (labels.shape, labels.dtype) == ((24,), torch.int64)
        assert loader.image_size == size


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_length_is_a_multiple_of_accumulation_steps(accumulation_steps: int, npy_data: Path) -> None:
    loader = train(npy_data, 50, accumulation_steps=accumulation_steps)
    assert len(loader) == 14 // accumulation_steps * accumulation_steps == len(list(loader))


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("crop_fraction", [1.0, 0.8], ids=["stored pixels", "graph"])
def test_evaluation_has_each_sample_once_in_stored_order(world_size: int, crop_fraction: float, npy_data: Path) -> None:
    config = EvalConfig(batch_size=10, crop_fraction=crop_fraction)
    labels, sizes, seen = [], [], []
    for rank in range(world_size):
        loader = evaluation(npy_data, rank=rank, world_size=world_size, config=config)
        batches = list(loader)
        assert len(batches) == len(loader)
        labels += [label for batch in batches for label in batch.labels.tolist()]
        seen += [rows_of(batch.images) for batch in batches]
        sizes += [len(batch.labels) for batch in batches]
        assert [len(batch.images) for batch in batches] == [len(batch.labels) for batch in batches]
    assert labels == [row * 7 % 12 for row in range(107)]
    assert any(size < 10 for size in sizes)  # partial last batches, not padded ones
    if crop_fraction == 1.0:
        assert list(itertools.chain(*seen)) == list(range(107))


def test_rank_without_samples_evaluates_no_batch(tmp_path: Path) -> None:
    write(memory_source(val=MemoryRows(3)), tmp_path / "out")
    counts = [len(list(evaluation(tmp_path / "out", rank=rank, world_size=8))) for rank in range(8)]
    assert sum(counts) == 3
    assert 0 in counts


def test_evaluation_iterations_start_from_the_beginning(npy_data: Path) -> None:
    loader = evaluation(npy_data)
    first = copies(loader)
    next(iter(loader))
    assert_same(copies(loader), first)


def test_split_without_labels_gives_minus_one(npy_data: Path) -> None:
    for config in (EvalConfig(), EvalConfig(crop_fraction=0.8)):
        batches = list(evaluation(npy_data, split="test", config=config))
        assert torch.equal(torch.cat([labels for _, labels in batches]), torch.full((41,), -1))


def test_sequential_window_reads_as_many_shards_at_a_time(npy_data: Path) -> None:
    split = open_split(npy_data, "train")
    shard_of = dict(zip(rows_of(_stored(split)), split.shard.tolist(), strict=True))
    loader = train(npy_data, 4, order="sequential-window", window_shards=2)
    shards = [shard_of[row] for images, _ in loader for row in rows_of(images)]
    first = set(shards[:100])
    assert len(first) == 2
    boundary = int(np.isin(split.shard, list(first)).sum())
    assert set(shards[:boundary]) == first
    assert set(shards[boundary:]) == set(range(4)) - first


def _stored(split: Any) -> np.ndarray:
    view, rows = split.pixel_rows()
    images: np.ndarray = view[rows].reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    return images


# Pure function of (seed, epoch, step)

CASES = [("npy", NO_AUG, None), ("npy", ALL_AUG, None), ("jpeg", ALL_AUG, 24)]
EVERY_CASE = pytest.mark.parametrize(("encoding", "aug", "image_size"), CASES, ids=["stored pixels", "npy", "jpeg"])


@EVERY_CASE
@pytest.mark.parametrize("others", [{}, {"prefetch": 9}, {"prefetch": 1, "threads": 2}], ids=str)
def test_resumed_run_gives_same_bytes_as_uninterrupted_run(
    encoding: str, aug: AugConfig, image_size: int | None, others: dict[str, int], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{encoding}_data")
    loader = train(folder, 48, aug, image_size=image_size)
    through = [copies(loader) for _ in range(2)]
    for epoch, step in ((0, 1), (1, 0), (1, len(loader) - 1)):
        resumed = train(folder, 48, aug, image_size=image_size, **others)
        resumed.position = Position(epoch, step)
        assert_same(copies(resumed), through[epoch][step:])


@EVERY_CASE
def test_batches_are_same_at_any_world_size_and_restart(
    encoding: str, aug: AugConfig, image_size: int | None, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{encoding}_data")
    whole = copies(train(folder, 48, aug, image_size=image_size))
    for world_size in (2, 3, 8):
        local = 48 // world_size
        loaders = [train(folder, local, aug, rank, world_size, image_size=image_size) for rank in range(world_size)]
        for loader in loaders:
            loader.position = Position(0, 4)
        assert_same(merged([copies(loader) for loader in loaders]), whole[4:])


def test_pixels_differ_between_seeds_and_epochs(npy_data: Path) -> None:
    loader = train(npy_data, 700, ALL_AUG)
    first, second = copies(loader)[0], copies(loader)[0]
    other = copies(train(npy_data, 700, ALL_AUG, seed=4))[0]
    for batch in (second, other):
        assert not torch.equal(batch.labels, first.labels)
        assert (batch.images != first.images).float().mean() > 0.5


def test_position_counts_consumed_batches(npy_data: Path) -> None:
    loader = train(npy_data, 100)
    assert loader.position == Position(0)
    for step, _ in enumerate(loader, 1):
        assert loader.position == (Position(0, step) if step < 7 else Position(1))
    for _ in zip(range(3), loader, strict=False):
        pass
    assert loader.position == Position(1, 3)


@pytest.mark.parametrize(("epoch", "step"), [(0, 7), (-1, 0), (0, -1)])
def test_position_outside_of_epoch_is_rejected(epoch: int, step: int, npy_data: Path) -> None:
    loader = train(npy_data, 100)
    with pytest.raises(ValueError, match="7 steps"):
        loader.position = Position(epoch, step)


@pytest.mark.parametrize("aug", [NO_AUG, ALL_AUG], ids=["stored pixels", "graph"])
def test_iteration_left_early_continues_with_next_batch(aug: AugConfig, npy_data: Path) -> None:
    expected = copies(train(npy_data, 50, aug))
    loader = train(npy_data, 50, aug)
    seen: list[Batch] = []
    for stop in (1, 4, 3, 99):
        for images, labels in loader:
            seen.append(Batch(images.clone(), labels.clone()))
            if (stop := stop - 1) == 0:
                break
    assert_same(seen, expected)
    assert loader.position == Position(1)


EVERY_WAY = pytest.mark.parametrize(
    "loader_of",
    [
        lambda npy, jpeg: train(npy, 50),
        lambda npy, jpeg: train(npy, 50, ALL_AUG),
        lambda npy, jpeg: train(jpeg, 50, ALL_AUG, image_size=24),
        lambda npy, jpeg: evaluation(npy, 24),
    ],
    ids=["stored pixels", "graph", "jpeg", "evaluation"],
)
LoaderOf = Callable[[Path, Path], Loader]


@EVERY_WAY
def test_replaced_iterator_raises_when_used(loader_of: LoaderOf, npy_data: Path, jpeg_data: Path) -> None:
    expected = copies(loader_of(npy_data, jpeg_data))
    loader = loader_of(npy_data, jpeg_data)
    first = iter(loader)
    seen = copies(itertools.islice(first, 2))
    second = iter(loader)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="one iterator at a time"):
            next(first)
    if isinstance(loader, EvalLoader):  # each iteration of an evaluation starts from the beginning
        seen = []
    assert_same(seen + copies(second), expected)


@EVERY_WAY
def test_nested_loops_and_zip_raise(loader_of: LoaderOf, npy_data: Path, jpeg_data: Path) -> None:
    loader = loader_of(npy_data, jpeg_data)
    for use in (lambda: [next(iter(loader)) for _ in loader], lambda: list(zip(loader, loader, strict=False))):
        with pytest.raises(RuntimeError, match="one iterator at a time"):
            use()


def test_finished_iterator_stays_finished(npy_data: Path) -> None:
    loader = train(npy_data, 50)
    exhausted, at_its_end = iter(loader), None
    list(exhausted)
    at_its_end = iter(loader)
    for _ in range(len(loader)):
        next(at_its_end)
    after = iter(loader)
    next(after)
    for finished in (exhausted, at_its_end):
        assert list(finished) == []
    next(after)


def test_iterator_raises_after_position_was_set(npy_data: Path) -> None:
    expected = copies(train(npy_data, 50))
    loader = train(npy_data, 50)
    first = iter(loader)
    loader.position = Position(0, 3)  # an iterator that has not started starts there
    assert_same(copies(itertools.islice(first, 1)), expected[3:4])
    loader.position = Position(0, 5)
    with pytest.raises(RuntimeError, match="setting the loader's position"):
        next(first)
    assert_same(copies(loader), expected[5:])


# Memory


@EVERY_CASE
@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_kept_by_user_are_not_overwritten(
    encoding: str, aug: AugConfig, image_size: int | None, prefetch: int, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{encoding}_data")
    expected = copies(train(folder, 10, aug, image_size=image_size))
    assert_same(list(train(folder, 10, aug, image_size=image_size, prefetch=prefetch)), expected)
    evaluated = copies(evaluation(folder, 10, image_size=image_size))
    assert_same(list(evaluation(folder, 10, image_size=image_size, prefetch=prefetch)), evaluated)


def test_views_kept_by_user_are_not_overwritten(npy_data: Path) -> None:
    expected = [images[3, 0].clone() for images, _ in train(npy_data, 10)]
    kept = [images[3, 0].numpy() for images, _ in train(npy_data, 10)]  # the batches themselves are freed
    assert all(np.array_equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_batches_outlive_their_loader(npy_data: Path) -> None:
    for aug in (NO_AUG, ALL_AUG):
        expected = copies(train(npy_data, 50, aug))
        batches = list(itertools.islice(train(npy_data, 50, aug), 3))
        assert_same(batches, expected[:3])


def test_writing_to_a_batch_does_not_change_data(npy_data: Path) -> None:
    loader = evaluation(npy_data)
    expected = copies(loader)
    for images, labels in loader:
        images.zero_()
        labels.zero_()
    assert_same(copies(loader), expected)


@pytest.mark.parametrize("aug", [NO_AUG, ALL_AUG], ids=["stored pixels", "graph"])
def test_placements_give_same_bytes(aug: AugConfig, npy_data: Path) -> None:
    host = train(npy_data, 24, aug, placement="host")
    device = train(npy_data, 24, aug, placement="device")
    assert_same(copies(device), copies(host))
    assert_same(copies(evaluation(npy_data, placement="device")), copies(evaluation(npy_data, placement="host")))


def test_device_placement_works_without_huge_pages(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = copies(train(npy_data, placement="device"))
    monkeypatch.setattr(buffers.mmap, "MADV_HUGEPAGE", 9999)  # no kernel knows this advice
    assert_same(copies(train(npy_data, placement="device")), expected)


def threads_of_a_new_thread() -> int:
    """Return the number of threads torch would use in a new thread, as autograd does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_loader_leaves_no_threads_behind(npy_data: Path) -> None:
    torch.set_num_threads(2)
    try:
        before = set(threading.enumerate())
        loader = train(npy_data, 50, ALL_AUG)
        next(iter(loader))
        assert set(threading.enumerate()) <= before
        list(loader)
        del loader
        assert set(threading.enumerate()) <= before
        assert (threads_of_a_new_thread(), torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(1)


def test_wait_time_of_consumer_is_counted(npy_data: Path) -> None:
    loader = train(npy_data, 50, ALL_AUG)
    waited = []
    for _ in loader:
        waited.append(loader.wait_s)
    assert waited == sorted(set(waited))
    assert waited[0] > 0


class Recorder(Backend, SampleSource):
    """Backend, source and runner of a simulated GPU; fails if a slot is filled before the GPU has read it."""

    image_shape = (1, 1, 3)

    def __init__(self, split: Split, threads: int) -> None:
        super().__init__(LoaderSpec(split, data_of(Path("x")), 2, 1, torch.device("cpu"), threads, None, NO_AUG))
        self.threads = threads
        self.reading: set[int] = set()
        self.under_way: deque[tuple[torch.Tensor, torch.Tensor]] = deque()

    def source(self, slots: int, slot_size: int) -> Recorder:
        return self

    def runner(self) -> Recorder:
        return self

    def restart(self) -> None:
        raise NotImplementedError

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        assert slot not in self.reading, f"slot {slot} is overwritten while it is read"
        return torch.full((len(indices), 1, 1, 3), slot)

    def defect(self, sample: int) -> str | None:
        return None

    def submit(self, images: torch.Tensor, labels: np.ndarray, draws: dict[str, np.ndarray]) -> None:
        self.reading.add(int(images[0, 0, 0, 0]))
        self.under_way.append((images, torch.from_numpy(labels)))

    def result(self) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        images, labels = self.under_way.popleft()
        return images, labels, lambda: self.reading.discard(int(images[0, 0, 0, 0]))


@pytest.mark.parametrize("threads", [1, 2])
def test_slot_is_refilled_only_after_its_reader_finished(threads: int, npy_data: Path) -> None:
    split = open_split(npy_data, "train")
    split = replace(split, labels=np.arange(len(split)))
    bad = for_training(split, data_of(npy_data))
    loader = TrainLoader([Stage(EvalBatches(0, 60, 2), Recorder(split, threads), bad)])
    seen = []
    for count in (1, 5, 99, 2, 99, 99):
        for _, labels in itertools.islice(loader, count):
            seen.append(int(labels[0]) // 2)
    assert seen == [*range(30)] * 3


# Errors


def test_too_large_batch_size_names_the_maximum(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"data.batch_size=94 exceeds the 87 samples per rank .*; use at most 87"):
        train(npy_data, 94, world_size=8)
    assert len(train(npy_data, 87, world_size=8)) == 1
    with pytest.raises(UserError, match=r"accumulation_steps 2\); use at most 43"):
        train(npy_data, 44, world_size=8, accumulation_steps=2)
    with pytest.raises(UserError, match=r"exceeds the 0 samples per rank .*; use fewer ranks or micro-steps"):
        train(npy_data, 1, world_size=800)


def test_mixed_size_images_need_an_image_size(jpeg_data: Path) -> None:
    for build in (train, evaluation):
        with pytest.raises(UserError, match=r"data.image_size is not set, .* images of several sizes"):
            build(jpeg_data)


def test_non_square_images_need_an_image_size(tmp_path: Path) -> None:
    write(memory_source(train=MemoryRows([marked_image(row, 32, 40) for row in range(9)])), tmp_path / "out")
    with pytest.raises(UserError, match="images of 32 x 40 pixels"):
        train(tmp_path / "out", 3)
    assert next(iter(train(tmp_path / "out", 3, image_size=32))).images.shape == (3, 3, 32, 32)


def test_jpeg_cannot_be_placed_on_device(jpeg_data: Path) -> None:
    with pytest.raises(UserError, match=r"placement=device .* stores jpeg"):
        train(jpeg_data, image_size=24, placement="device")


@pytest.mark.parametrize("aug", [NO_AUG, ALL_AUG], ids=["stored pixels", "graph"])
@pytest.mark.parametrize("failing", [0, 1, 5])
def test_background_error_reaches_the_consumer(
    failing: int, aug: AugConfig, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = train(npy_data, 50, aug)
    before = set(threading.enumerate())
    fill, bad = loader.stage.source.fill, loader.plan.indices(0, failing)

    def breaking(slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> Any:
        if np.isin(bad, indices).all():
            raise OSError("the disk is gone")
        return fill(slot, indices, draws)

    with monkeypatch.context() as patch:
        patch.setattr(loader.stage.source, "fill", breaking)
        with pytest.raises(OSError, match="the disk is gone"):
            list(loader)
    assert set(threading.enumerate()) <= before
    position = loader.position
    assert position.step <= failing
    expected = copies(train(npy_data, 50, aug))
    assert_same(copies(loader), expected[position.step :])  # the loader is still usable


def test_undecodable_image_is_named(jpeg_copy: Path) -> None:
    where = damage(jpeg_copy, 333, DAMAGE["emptied"])
    before = set(threading.enumerate())
    with pytest.raises(UserError) as refusal:
        list(train(jpeg_copy, 16, image_size=24))
    assert where in str(refusal.value)
    assert "verify" in str(refusal.value)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("use", [copies, lambda loader: next(iter(loader))], ids=["run", "first batch"])
def test_split_of_a_single_jpeg_works(use: Callable[[Loader], Any], tmp_path: Path) -> None:
    write(memory_source(train=MemoryRows([jpeg_file(0)])), tmp_path / "out", "jpeg")
    assert use(train(tmp_path / "out", 1, image_size=24))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["CpuBackend", "DaliBackend"])
@pytest.mark.parametrize("aug", ["AugConfig(flip=0)", "AugConfig(crop='random-resized')"], ids=["plain", "graph"])
def test_program_may_end_within_an_epoch(aug: str, backend: str, npy_data: Path) -> None:
    script = f"""
from configs.schema import AugConfig, DataConfig
from pipelines import build, build_train_loader
from pipelines.gpu.dali_backend import DaliBackend
from pipelines.loader.backend import CpuBackend
build.choose_backend = {backend}
loader = build_train_loader(DataConfig(path={str(npy_data)!r}, batch_size=4), {aug}, device="cpu")
batches = iter(loader)
for _ in range(5):  # until there are batches in the graph
    last = next(batches)
print(last.images.shape[0])
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")
