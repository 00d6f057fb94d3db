"""An HDF5 file read in place gives bitwise the batches of its conversion, for every layout and storage."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from configs.schema import AugConfig, AutoAugmentConfig, EraseConfig
from configs.utils.errors import UserError
from helpers.hdf5_files import Storage, converted, random_images, write_hdf5
from helpers.loaders import NO_AUG, assert_same, copies, evaluation, train
from pipelines.hdf5 import chunks, statistics
from pipelines.interfaces import Position
from pipelines.loader.buffers import load_resident
from pipelines.open import load_dataset, open_split, verify
from pipelines.storage.index import rows_per_shard

CROP_FLIP = AugConfig(crop="pad", flip=0.5)
MANY = AugConfig(
    crop="random-resized",
    flip=0.5,
    auto=AutoAugmentConfig(policy="rand-m9-mstd0.5"),
    erase=EraseConfig(probability=0.5),
)
STORAGES: dict[str, Storage] = {
    "contiguous": {},
    "chunks of rows": {"chunks": True},
    "parts of rows": {"parts": True},
    "gzip": {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": True},
    "gzip of parts": {"compression": "gzip", "parts": True},
    "lzf": {"compression": "lzf", "fletcher32": True, "chunks": True},
}
LAYOUTS = ("channels first", "channels last", "greyscale")


def storage_of(name: str, layout: str) -> Storage:
    options = dict(STORAGES[name])
    row = {"channels first": (3, 32, 32), "channels last": (32, 32, 3), "greyscale": (32, 32)}[layout]
    if options.pop("parts", False):
        return {**options, "chunks": (7, *(max(1, side - 13) for side in row))}
    return {**options, "chunks": (7, *row)} if "chunks" in options else options


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def conversion(layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(write_hdf5(tmp_path_factory.mktemp("conversion") / "x.hdf5", layout))


@pytest.fixture(params=STORAGES)
def file(request: pytest.FixtureRequest, layout: str, tmp_path: Path) -> Path:
    return write_hdf5(tmp_path / "x.hdf5", layout, storage_of(request.param, layout))


@pytest.mark.parametrize("placement", ["host", "device"])
def test_batches_are_bitwise_those_of_the_conversion(file: Path, conversion: Path, placement: str) -> None:
    for aug in (NO_AUG, CROP_FLIP, MANY):
        ours, theirs = (copies(train(path, aug=aug, placement=placement)) for path in (file, conversion))
        assert len(ours) == 8
        assert_same(ours, theirs)
    for split in ("val", "test"):
        ours, theirs = (copies(evaluation(path, split=split, placement=placement)) for path in (file, conversion))
        assert_same(ours, theirs)


def test_description_equals_that_of_the_conversion(file: Path, conversion: Path) -> None:
    ours, theirs = load_dataset(file), load_dataset(conversion)
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)
    for name in ("name", "classes", "encoding", "image_shape"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.splits.keys() == theirs.splits.keys()
    for name, split in ours.splits.items():
        other = theirs.splits[name]
        assert [shard.samples for shard in split.shards] == [shard.samples for shard in other.shards]
        assert (split.samples, split.labelled, split.shuffled) == (other.samples, other.labelled, other.shuffled)
        opened, shards = open_split(file, name), open_split(conversion, name)
        assert np.array_equal(opened.source_rows(), shards.source_rows())
        assert np.array_equal(opened.keys(), shards.keys())
        assert np.array_equal(opened.shard, shards.shard)
        assert opened.image_bytes(3).tobytes() == shards.image_bytes(3)[-3072:].tobytes()
        row = opened.source_rows()[3]
        assert opened.describe(3) == f"sample 3 of split '{name}' (x.hdf5, images-{name}[{row}])"


@pytest.mark.parametrize("storage", ["contiguous", "gzip of parts"])
@pytest.mark.parametrize("order", ["random", "sequential-window"])
def test_two_ranks_and_a_resume_give_the_same_batches(
    storage: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=storage_of(storage, "channels first"), rows=(450, 60, 30))
    monkeypatch.setattr("pipelines.hdf5.dataset.rows_per_shard", partial(rows_per_shard, shard_mib=1))
    folder = converted(path, "--shard-mib", "1")
    assert open_split(path, "train").shard.max() == 2
    for options in ({}, {"limit": 150}):
        for rank in range(2):
            ours, theirs, again = (
                train(at, 12, CROP_FLIP, rank, 2, order=order, window_shards=2, **options)
                for at in (path, folder, path)
            )
            batches = copies(ours)
            assert_same(batches, copies(theirs))
            again.position = Position(0, 2)
            assert_same(copies(again), batches[2:])


@pytest.mark.parametrize("storage", ["contiguous", "gzip"])
def test_views_are_those_of_the_conversion(storage: str, tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=storage_of(storage, "channels first"))
    options = {"views": 2, "placement": "host"}
    ours, theirs = (copies(train(at, aug=CROP_FLIP, **options)) for at in (path, converted(path)))
    assert ours[0].images.shape == (24, 2, 3, 32, 32)
    assert_same(ours, theirs)


def test_resident_pixels_are_those_of_the_conversion(file: Path, conversion: Path) -> None:
    ours, theirs = (load_resident(open_split(path, "train"), torch.device("cpu")) for path in (file, conversion))
    assert torch.equal(ours, theirs)


def test_mean_and_std_are_computed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage={"compression": "gzip"})
    computed = []
    original = statistics.channel_sums
    monkeypatch.setattr(statistics, "channel_sums", lambda *given: computed.append(1) or original(*given))
    dataset = load_dataset(path)
    open_split(path, "train")
    copies(evaluation(path))
    assert computed == []  # not before they are needed
    pixels = random_images(200) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), atol=1e-6)
    assert load_dataset(path).std == dataset.std
    assert computed == [1]
    with h5py.File(path, "r+") as file:
        file["images-train"][0] = 255
    assert load_dataset(path).mean != dataset.mean
    assert computed == [1, 1]


def test_a_chunk_is_decompressed_once_per_epoch_of_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage={"compression": "gzip", "chunks": (20, 3, 32, 32)})
    loaded = []
    original = chunks.ChunkCache._load
    monkeypatch.setattr(
        chunks.ChunkCache, "_load", lambda cache, number: loaded.append(number) or original(cache, number)
    )
    monkeypatch.setattr(chunks, "CACHE_BYTES", 1)  # one chunk
    split = open_split(path, "train")
    out = np.empty((200, 32, 32, 3), np.uint8)
    split.read_pixels(np.random.default_rng(0).permutation(200), out)
    assert sorted(loaded) == list(range(10))


def test_note_says_how_much_faster_shards_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(write_hdf5(tmp_path / "contiguous.hdf5"), placement="host")
    assert "random images per second" not in capsys.readouterr().err
    path = write_hdf5(tmp_path / "x.hdf5", storage={"compression": "gzip"})
    train(path, placement="host")
    printed = capsys.readouterr().err
    assert "random images per second" in printed
    assert f"convert it: zhu convert hdf5 --source {path} --out data/x" in printed


def test_classes_come_from_a_file(tmp_path: Path) -> None:
    path, names = write_hdf5(tmp_path / "x.hdf5"), tmp_path / "classes.txt"
    names.write_text("ant\nbee\ncat\ndog\neel\n")
    assert load_dataset(path, names).classes == ("ant", "bee", "cat", "dog", "eel")
    assert open_split(path, "val", classes=names).classes[4] == "eel"
    assert verify(path, names) == []
    names.write_text("ant\n")
    with pytest.raises(UserError, match=r"labels-train\[1\] is 3; labels must be whole numbers within 0 to 0"):
        load_dataset(path, names)


def test_class_names_for_shards_are_refused(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"data.classes=names.txt names the classes of an HDF5 file"):
        load_dataset(npy_data, "names.txt")


def test_a_file_is_recognized_by_its_content(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5").rename(tmp_path / "images")
    assert load_dataset(path).splits["train"].samples == 200
