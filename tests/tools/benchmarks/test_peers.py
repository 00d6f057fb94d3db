"""tools/benchmarks/peers: every peer does the same work as our loader."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import AugConfig, Config, DataConfig, EvalConfig, ModelConfig
from helpers import memory_source
from helpers.benchmarks import settings_in
from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.storage.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import candidate
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.engine.datasets import GRAIN, EnlargedRows, make_full_size, make_variant
from tools.benchmarks.engine.results import is_measured
from tools.benchmarks.peers import PeerTask, training_loops
from tools.benchmarks.peers.worker_sweep import close, fastest, worker_counts
from tools.benchmarks.suites.loading import loading_table

SAMPLES, BATCH, SIZE = 96, 12, 32
PAD = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED = AugConfig(crop="random-resized", flip=0.5)
CASES = [(name, encoding) for name, peer in peers.LOADERS.items() for encoding in peer.encodings]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets with a class per sample, so that a label identifies a sample."""
    out = tmp_path_factory.mktemp("peers")
    rows = memory_source.MemoryRows(SAMPLES)
    rows.labels = np.arange(SAMPLES)
    source = Source("memory", "tests", tuple(str(n) for n in range(SAMPLES)), "0" * 64, {"train": rows})
    convert_source(source, out / "npy", Options(Encoding("npy"), shard_mib=1), 1, "tiny")
    return {"npy": out / "npy", "jpeg": make_variant(out / "npy", out / "jpeg", encoding="jpeg")}


def batches_of(name: str, source: PeerTask) -> Any:
    peer = peers.LOADERS[name]
    if name not in peers.available(peers.LOADERS, source.encoding):
        pytest.skip(f"{peer.library} is not installed")
    return peers.load_function(peer)(source)


@pytest.mark.slow
@pytest.mark.parametrize("aug", [PAD, RESIZED], ids=["pad", "random-resized"])
@pytest.mark.parametrize(("name", "encoding"), CASES)
def test_epoch_has_each_sample_at_most_once(
    folders: dict[str, Path], tmp_path: Path, name: str, encoding: str, aug: AugConfig
) -> None:
    size = SIZE if aug.crop == "pad" else 24
    batches = batches_of(name, PeerTask(folders[encoding], tmp_path, BATCH, size, aug))
    seen = []
    for images, labels in islice(batches, SAMPLES // BATCH):
        tensor = torch.as_tensor(images)
        assert sorted(tensor.shape) == sorted((BATCH, 3, size, size))
        assert tensor.dtype == (torch.float32 if name.startswith("homework") else torch.uint8)
        assert tensor.float().std() > 0
        seen += torch.as_tensor(labels).flatten().tolist()
    assert len(seen) == SAMPLES
    if not name.startswith("DALI"):  # its shuffle buffer may contain samples of the next epoch
        assert len(set(seen)) == SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, encoding in CASES if encoding == "jpeg"])
def test_evaluation_yields_center_crops(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    task = PeerTask(folders["jpeg"], tmp_path, BATCH, 24, evaluation=EvalConfig(crop_fraction=0.75))
    images, labels = (torch.as_tensor(one) for one in next(batches_of(name, task)))
    assert sorted(images.shape) == sorted((BATCH, 3, 24, 24))
    planes = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    index = {label: number for number, label in enumerate(task.labels.tolist())}
    for image, label in zip(planes, labels.flatten().tolist(), strict=True):
        expected = torch.from_numpy(task.pixels(index[label])[4:28, 4:28].copy()).float().mean(2)
        pair = torch.stack([image.float().mean(0).flatten(), expected.flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.8  # decoders and FFCV's second encoding differ on noise


@pytest.mark.parametrize("name", peers.LOADERS)
def test_reading_alone_yields_the_stored_images(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    batches = batches_of(name, PeerTask(folders["npy"], tmp_path, BATCH, SIZE))
    split = open_split(folders["npy"], "train")
    view, rows = split.pixel_rows()
    assert split.labels is not None
    sums = view[rows[np.argsort(split.labels)]].astype(int).sum(1)  # by label
    for images, labels in islice(batches, 4):
        flat = torch.as_tensor(images).reshape(BATCH, -1).long().sum(1)
        assert flat.tolist() == sums[torch.as_tensor(labels).flatten().numpy()].tolist()


@pytest.mark.parametrize("name", peers.LOOPS)
def test_training_loop_keeps_a_finite_loss(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    config = Config(
        data=DataConfig(path=str(folders["npy"]), batch_size=BATCH), aug=PAD, model=ModelConfig(name="lenet")
    )
    source = PeerTask(folders["npy"], tmp_path, BATCH, SIZE, PAD)
    with training_loops.training(peers.LOOPS[name], source, config) as workloads:
        assert workloads[""].units_per_item == BATCH
        values = [float(value) for value in islice(workloads[""].items, SAMPLES // BATCH + 2)]
    assert np.isfinite(values).all()


def test_peer_without_its_library_is_a_row_with_the_reason(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_installed", lambda library: library != "ffcv")
    assert "FFCV" not in peers.available(peers.LOADERS, "npy")
    assert peers.all_missing() == ["FFCV"]
    table = loading_table(settings_in(tmp_path), folders["npy"], PAD, size=SIZE, batch_size=BATCH, with_peers=True)
    (row,) = table.entry([], {})["rows"]
    assert (row["name"], row["error"], row["note"]) == ("FFCV", None, "not measured: ffcv is not installed")
    assert not is_measured(row)


def test_library_inside_a_missing_package_is_not_installed() -> None:
    assert not peers._installed("no_such_package.io")
    assert peers._installed("torch.nn")


def test_peer_runs_with_its_fastest_number_of_workers() -> None:
    seconds, built = {1: 0.02, 2: 0.002, 4: 0.01}, []

    def build(workers: int) -> Iterator[int]:
        built.append(workers)
        return iter(lambda: time.sleep(seconds[workers]), 0)

    found = fastest(build, (1, 2, 4), 10, 0.03)
    assert (found.workers, built) == (2, [1, 2, 4, 2])
    assert found.rates.keys() == {"1", "2", "4"}
    assert 250 < found.rates["1"] <= 500
    assert fastest(build, (4,), 10, 0.03).details() == {"workers": 4, "sweep": {}}


def test_numbers_of_workers_follow_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert worker_counts(0) == (0, 2, 4)
    assert worker_counts(1) == (1, 2, 4)
    assert worker_counts(1, exceed_cores=False) == (1, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert worker_counts(0) == (0, 16, 32)


def test_closed_peer_leaves_no_workers(folders: dict[str, Path], tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = batches_of("torchvision v2 + DataLoader", PeerTask(folders["npy"], tmp_path, BATCH, SIZE, workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    close(batches)
    assert not multiprocessing.active_children()
    signal.signal(signal.SIGCHLD, handler)


def test_full_size_images_are_enlarged_with_grain(folders: dict[str, Path], tmp_path: Path) -> None:
    made = make_full_size(folders["npy"], tmp_path / "full", size=(100, 75), samples=SAMPLES // 2)
    split = open_split(made, "train")
    assert (split.encoding, split.image_shape) == ("jpeg", (75, 100, 3))
    assert len(set(np.asarray(split.labels))) == SAMPLES // 2  # every second image
    rows = EnlargedRows(folders["npy"], SAMPLES // 2, None, 0, step=2, size=(100, 75))
    (pixels,) = rows.read(3, 4)
    stored = PeerTask(folders["npy"], tmp_path, BATCH, SIZE).pixels(6)
    smooth = np.asarray(Image.fromarray(stored).resize((100, 75), Image.Resampling.BICUBIC))
    grain = np.asarray(pixels).astype(float) - smooth
    assert 0.5 * GRAIN < grain.std() < 1.2 * GRAIN
    assert abs(grain.mean()) < 1


def test_variant_repeats_samples_at_the_requested_size(folders: dict[str, Path], tmp_path: Path) -> None:
    split = open_split(make_variant(folders["npy"], tmp_path / "large", size=48, samples=2 * SAMPLES), "train")
    assert split.image_shape == (48, 48, 3)
    assert split.labels is not None
    assert np.bincount(split.labels).tolist() == [2] * SAMPLES


def test_rounds_of_workers_take_a_multiple_of_their_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of several workers arrive together, so a shorter round could time only those that are already there."""
    durations = iter([0.0, 0.001, 0.1])  # warm-up, too short, long enough
    monkeypatch.setattr(candidate, "_time_items", lambda items, count: next(durations))
    assert candidate._calibrate(Workload(iter([]), 1, at_once=4), 0.2) == 32
