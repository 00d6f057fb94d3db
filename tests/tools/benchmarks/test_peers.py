"""tools/benchmarks/peers: every peer does the same work as our loader."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import AugConfig, Config, DataConfig, ModelConfig
from helpers import memory_source
from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.storage.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine.datasets import make_variant
from tools.benchmarks.peers import PeerTask, torch_loader, training_loops

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


@pytest.fixture(autouse=True)
def _few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_loader, "HOMEWORK_WORKERS", 1)


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
    batches = batches_of(name, PeerTask(folders[encoding], tmp_path, BATCH, 1, size, aug))
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


@pytest.mark.parametrize("name", peers.LOADERS)
def test_reading_alone_yields_the_stored_images(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    batches = batches_of(name, PeerTask(folders["npy"], tmp_path, BATCH, 1, SIZE))
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
    source = PeerTask(folders["npy"], tmp_path, BATCH, 1, SIZE, PAD)
    with training_loops.training(peers.LOOPS[name], source, config) as workloads:
        assert workloads[""].units_per_item == BATCH
        values = [float(value) for value in islice(workloads[""].items, SAMPLES // BATCH + 2)]
    assert np.isfinite(values).all()


def test_peer_without_its_library_is_reported_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_installed", lambda library: library != "ffcv")
    assert "FFCV" not in peers.available(peers.LOADERS, "npy")
    assert peers.all_missing() == ["FFCV"]


def test_variant_repeats_samples_at_the_requested_size(folders: dict[str, Path], tmp_path: Path) -> None:
    split = open_split(make_variant(folders["npy"], tmp_path / "large", size=48, samples=2 * SAMPLES), "train")
    assert split.image_shape == (48, 48, 3)
    assert split.labels is not None
    assert np.bincount(split.labels).tolist() == [2] * SAMPLES
