"""Undecodable JPEGs: with any reader, batches with substitutes equal those of intact data."""

from __future__ import annotations

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageFile

from configs.schema import AugConfig, ColorJitterConfig, MixConfig
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.backends import use_dali
from helpers.damage import (
    DAMAGE,
    broken_in_the_middle,
    claiming,
    damage,
    damage_in_turn,
    stray_bytes,
    substituted,
    substitutes,
)
from helpers.loaders import assert_same, copies, data_of, evaluation, merged, train
from pipelines import build_eval_loader, build_train_loader
from pipelines.gpu.dali_runner import DaliRunner
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch, MixedBatch
from pipelines.loader.buffers import SlotBuffers
from pipelines.loader.jpeg_sources import HostJpegs, MappedFiles, header_error
from pipelines.loader.train_loader import TrainLoader
from pipelines.storage.open import open_split

BAD = (17, 18, 19, 250, 519)  # three in a row, and the last sample, whose substitute is the first
AUG = AugConfig(crop="random-resized", flip=0.5, color_jitter=ColorJitterConfig(brightness=0.4))
SKIP = {"image_size": 24, "on_bad_sample": "skip"}
READ = pytest.mark.parametrize(
    "others",
    [{}, {"threads": 2, "prefetch": 9}, {"order": "sequential-window", "window_shards": 1}],
    ids=["", "threads", "window"],
)


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


@pytest.fixture(scope="module")
def damaged(jpeg_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return jpeg_data with BAD samples, each damaged differently; read-only."""
    folder = Path(shutil.copytree(jpeg_data, tmp_path_factory.mktemp("damaged") / "tiny"))
    damage_in_turn(folder, BAD)
    return folder


def expected_of(folder: Path, *arguments: Any, **options: Any) -> TrainLoader:
    """Return a loader of intact data with substitutes."""
    return substituted(train(folder, *arguments, image_size=24, **options), open_split(folder, "train"), BAD)


@pytest.fixture(params=["kernels", "DALI"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the backend of the loader."""
    if request.param == "DALI":
        use_dali(monkeypatch)
    return str(request.param)


@READ
def test_substitutes_keep_their_own_labels_and_draws(
    others: dict[str, Any], way: str, damaged: Path, jpeg_data: Path
) -> None:
    loader = train(damaged, 48, AUG, **SKIP, **others)
    expected = expected_of(jpeg_data, 48, AUG, **others)
    for _ in range(2):
        assert_same(copies(loader), copies(expected))
    places = substitutes(520, BAD)
    assert sorted(loader.bad.found) == [(sample, places[sample]) for sample in BAD]


def test_substitutes_are_same_at_any_world_size_and_restart(way: str, damaged: Path, jpeg_data: Path) -> None:
    expected = copies(expected_of(jpeg_data, 48, AUG))
    for world_size in (2, 3):
        parts = []
        for rank in range(world_size):
            loader = train(damaged, 48 // world_size, AUG, rank, world_size, **SKIP)
            loader.position = Position(0, 4)
            parts.append(copies(loader))
        assert_same(merged(parts), expected[4:])


def test_substitutes_do_not_change_mixing(damaged: Path, jpeg_data: Path) -> None:
    aug = AugConfig(crop="random-resized", mix=MixConfig(mixup=0.8, cutmix=1.0))
    seen = [
        (one.images.clone(), one.labels.clone(), one.mix.clone()) for one in _mixed(train(damaged, 20, aug, **SKIP))
    ]
    expected = [
        (one.images.clone(), one.labels.clone(), one.mix.clone()) for one in _mixed(expected_of(jpeg_data, 20, aug))
    ]
    assert len(seen) == len(expected)
    for ours, theirs in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _mixed(loader: TrainLoader) -> Any:
    for batch in loader:
        assert isinstance(batch, MixedBatch)
        yield batch


def test_stages_share_their_bad_samples(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(damaged, 40, **SKIP, stages=[{"epoch": 1, "image_size": 32}])
    loader = build_train_loader(data, device="cpu", seed=3)
    assert len({id(stage.bad) for stage in (*loader.stages, loader)}) == 1
    assert [len(copies(iter(loader))) for _ in range(2)] == [13, 13]
    assert len(loader.bad.found) == len(BAD)
    assert len(capsys.readouterr().err.splitlines()) == len(BAD)


def test_exceeding_the_budget_ends_the_epoch(way: str, damaged: Path) -> None:
    assert len(copies(train(damaged, 48, AUG, **SKIP, max_bad_samples=5))) == 10
    with pytest.raises(UserError, match=r"5 samples of split 'train' .* data\.max_bad_samples=4"):
        copies(train(damaged, 48, AUG, **SKIP, max_bad_samples=4))


@pytest.mark.parametrize("threads", [1, 2])
def test_error_names_first_bad_sample_of_the_stream(threads: int, way: str, damaged: Path) -> None:
    loader = train(damaged, 16, AUG, image_size=24, threads=threads)
    stream = np.concatenate([loader.plan.indices(0, step) for step in range(len(loader))])
    first = next(sample for sample in stream if sample in BAD)
    with pytest.raises(UserError) as error:
        copies(loader)
    assert str(error.value).startswith(loader.split.describe(first))


@pytest.mark.parametrize(("kind", "choice"), [*((kind, "skip") for kind in DAMAGE), ("zeroed scan", "stop")])
def test_evaluation_stops_at_bad_sample_despite_skip(kind: str, choice: str, way: str, jpeg_copy: Path) -> None:
    where = damage(jpeg_copy, 30, DAMAGE[kind], "val")
    with pytest.raises(UserError) as error:
        copies(evaluation(jpeg_copy, image_size=24, on_bad_sample=choice))
    assert str(error.value).startswith(where)
    assert ("an evaluation needs every sample" in str(error.value)) == (choice == "skip")


def test_wrong_header_size_is_rejected_before_decoding(jpeg_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: (loaded.append(image.size), load(image))[1])
    decoded: list[np.ndarray] = []
    split = open_split(jpeg_copy, "train")
    sides = int(split.heights[7]), int(split.widths[7])
    for claimed in ((65_000, 65_000), (sides[1], sides[0]), (sides[0], sides[1] - 1), (20_000, 3)):
        damage(jpeg_copy, 7, claiming(*claimed))
        on_cpu = HostJpegs(split, SlotBuffers(1, 1, (24, 24, 3)))
        for_dali = MappedFiles(split, lambda file: bool(decoded.append(file)))
        wrong = f"has {claimed[0]:,} x {claimed[1]:,} pixels where the index says {sides[0]} x {sides[1]}"
        assert on_cpu.defect(7) == for_dali.defect(7) == wrong
    assert loaded == decoded == []


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_dali_is_never_fed_a_wrong_header(choice: Any, damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding the file in a batch may crash the process."""
    use_dali(monkeypatch)
    loader, split = train(damaged, 48, AUG, **{**SKIP, "on_bad_sample": choice}), open_split(damaged, "train")
    sides = set(zip(split.heights.tolist(), split.widths.tolist(), strict=True))
    submit = DaliRunner.submit

    def checked(self: DaliRunner, images: Any, *rest: Any) -> None:
        assert all(any(header_error(file, one) is None for one in sides) for file in images)
        submit(self, images, *rest)

    monkeypatch.setattr(DaliRunner, "submit", checked)
    with pytest.raises(UserError) if choice == "stop" else nullcontext():
        assert len(copies(loader)) == 10


@pytest.mark.parametrize("batch_size", [520, 40])
def test_file_only_dali_decodes_is_not_replaced(
    batch_size: int, jpeg_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the result would depend on the other samples of the batch."""
    use_dali(monkeypatch)
    damage(jpeg_copy, 5, broken_in_the_middle)
    expected = labels_of(copies(train(jpeg_copy, batch_size, AUG, **SKIP)))
    damage(jpeg_copy, 9, DAMAGE["zeroed scan"])
    loader = train(jpeg_copy, batch_size, AUG, **SKIP)
    labels = labels_of(copies(loader))
    assert loader.bad.found == [(9, 10)]
    assert loader.stage.source.defect(5) is None
    stream = np.concatenate([loader.plan.indices(0, step) for step in range(len(loader))])
    assert [place for place, _ in enumerate(stream) if labels[place] != expected[place]] == np.flatnonzero(
        stream == 9
    ).tolist()


def test_file_only_pillow_decodes_is_bad_for_dali(jpeg_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = damage(jpeg_copy, 5, stray_bytes)
    assert len(copies(train(jpeg_copy, 40, AUG, image_size=24))) == 13  # with the CPU kernels
    use_dali(monkeypatch)
    for read in (train(jpeg_copy, 40, AUG, image_size=24), evaluation(jpeg_copy, 40, split="train", image_size=24)):
        with pytest.raises(UserError, match=re.escape(f"{where} cannot be decoded: the data set is damaged")):
            copies(read)
    loader = train(jpeg_copy, 40, AUG, **SKIP)
    assert len(copies(loader)) == 13
    assert loader.bad.found == [(5, 6)]


def labels_of(batches: list[Batch]) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]


def test_dali_error_without_bad_sample_is_raised(jpeg_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_dali(monkeypatch)
    loader = train(jpeg_data, 48, **SKIP)

    def fail() -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loader.stage.runner, "result", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        copies(loader)


def test_failed_graph_gives_no_batch_of_an_earlier_iteration(jpeg_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_dali(monkeypatch)
    bad = train(jpeg_copy, 20, image_size=24).plan.indices(0, 4)[3]
    damage(jpeg_copy, int(bad), DAMAGE["zeroed scan"])  # fails in the graph, unlike most damage
    loader = train(jpeg_copy, 20, image_size=24)
    for _ in range(3):
        with pytest.raises(UserError, match="cannot be decoded"):
            copies(loader)
        assert loader.position == Position(0, 4)


def test_held_batches_outlive_a_failed_graph(damaged: Path, jpeg_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_dali(monkeypatch)
    assert_same(list(train(damaged, 26, AUG, **SKIP)), copies(expected_of(jpeg_data, 26, AUG)))


def test_images_for_display_may_have_substitutes(way: str, damaged: Path, jpeg_data: Path) -> None:
    data = data_of(damaged, 40, **SKIP)
    seen = copies(build_eval_loader(data, split="train", device="cpu", replace_bad_samples=True))
    sound = copies(
        substituted(evaluation(jpeg_data, 40, split="train", image_size=24), open_split(jpeg_data, "train"), BAD)
    )
    assert_same(seen, sound)
