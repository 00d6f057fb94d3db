"""HDF5 files that are damaged, changed during a run, or stored in ways that are not read in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

from configs.utils.errors import UserError
from helpers.hdf5_files import Storage, random_images, write_hdf5
from helpers.loaders import train
from pipelines.cpu import planes
from pipelines.hdf5 import contents
from pipelines.hdf5.split import Hdf5Split
from pipelines.open import load_dataset, open_split, verify
from pipelines.storage.dataset import fingerprint

GZIP: Storage = {"compression": "gzip", "chunks": (7, 3, 32, 32)}


def read_all(split: Hdf5Split) -> np.ndarray:
    out = np.empty((len(split), 32, 32, 3), np.uint8)
    split.read_pixels(np.arange(len(split)), out)
    return out


def opened(path: Path, name: str = "train") -> Hdf5Split:
    split = open_split(path, name)
    assert isinstance(split, Hdf5Split)
    return split


def overwrite(path: Path) -> None:
    """Change a stored byte of train without changing the size."""
    place = pixel_place(path)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def pixel_place(path: Path) -> int:
    """Return an offset within the stored images of train."""
    split = opened(path)
    if split.storage.chunks is None:
        assert split.storage.offset is not None
        return split.storage.offset + 101 * 3072
    return int(split.storage.chunks.offsets[3]) + 100


@pytest.mark.parametrize("storage", [{}, GZIP], ids=["contiguous", "gzip"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 5000), "was truncated (to|from) "),
        (overwrite, "has a new modification time"),
        (lambda path: os.utime(path), "has a new modification time"),
    ],
    ids=["truncate", "overwrite", "touch"],
)
def test_a_change_during_a_run_ends_it(
    storage: Storage, change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=storage)
    loader = train(path, placement="host")
    next(iter(loader))
    change(path)
    with pytest.raises(UserError, match=message):
        loader.check_unchanged()


def test_a_verified_file_can_be_touched_but_not_changed(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    assert verify(path) == []
    split = opened(path)
    os.utime(path)
    split.check_unchanged()
    overwrite(path)
    with pytest.raises(UserError, match="was overwritten with other bytes"):
        split.check_unchanged()


def test_a_replaced_file_is_read_to_the_end_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=GZIP)
    split, expected = opened(path), read_all(opened(path))
    write_hdf5(tmp_path / "y.hdf5", layout="channels last").rename(path)
    split.check_unchanged()
    assert np.array_equal(read_all(split), expected)
    assert "was replaced by another file" in capsys.readouterr().err


def test_fingerprint_changes_with_any_pixel_but_not_with_times(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    before = fingerprint(load_dataset(path))
    os.utime(path)
    assert fingerprint(load_dataset(path)) == before
    overwrite(path)
    assert fingerprint(load_dataset(path)) != before


def test_verify_reports_a_difference_from_the_recorded_hash_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    assert verify(path) == []
    overwrite(path)
    opened(path)
    assert "has changed since `zhu convert verify` recorded its sha256" in capsys.readouterr().err
    [problem] = verify(path)
    assert "when it was verified before" in problem
    assert verify(path) == []


@pytest.mark.parametrize(
    "storage",
    [GZIP, {**GZIP, "fletcher32": True}, {"compression": "lzf", "fletcher32": True, "chunks": (7, 3, 32, 32)}],
    ids=["gzip", "gzip and checksum", "lzf and checksum"],
)
def test_a_damaged_chunk_is_reported_with_its_row(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "SAMPLED_ROWS", 2)  # the first and the last row, when the file is opened
    path = write_hdf5(tmp_path / "x.hdf5", storage=storage)
    place = pixel_place(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\x55" * 40)
    with pytest.raises(UserError, match=r"a chunk of images-train from row 21 on cannot be read"):
        read_all(opened(path))
    assert "from row 21 on" in verify(path)[0]


def test_truncated_file_is_refused_at_the_start(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    os.truncate(path, path.stat().st_size - 4096)
    with pytest.raises(UserError, match="truncated"):
        load_dataset(path)


@pytest.mark.parametrize("number", range(20))
def test_random_damage_gives_an_error_or_the_right_shapes(number: int, tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=[{}, GZIP][number % 2])
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(number)
    for place in random.integers(0, min(len(content), 20_000), 30).tolist():
        content[place] = random.integers(256)
    path.write_bytes(content)
    with suppress(UserError):
        assert read_all(opened(path)).shape[1:] == (32, 32, 3)


def without_train(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["labels-train"] = np.arange(6) % 2
    return path


def test_links_external_and_virtual_storage_are_refused(tmp_path: Path) -> None:
    other = write_hdf5(tmp_path / "other.hdf5")
    images = random_images(6).transpose(0, 3, 1, 2)
    path = without_train(tmp_path / "link.hdf5")
    with h5py.File(path, "a") as file:
        file["images-train"] = h5py.ExternalLink(str(other), "images-train")
    with pytest.raises(UserError, match="images-train is a link"):
        load_dataset(path)
    path = without_train(tmp_path / "external.hdf5")
    with h5py.File(path, "a") as file:
        external = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("images-train", data=images, external=external)
    with pytest.raises(UserError, match="kept in external storage"):
        load_dataset(path)
    path = without_train(tmp_path / "virtual.hdf5")
    with h5py.File(path, "a") as file:
        virtual = h5py.VirtualLayout((6, 3, 32, 32), np.uint8)
        virtual[:] = h5py.VirtualSource(str(other), "images-train", (200, 3, 32, 32))[:6]
        file.create_virtual_dataset("images-train", virtual)
    with pytest.raises(UserError, match="a virtual data set"):
        load_dataset(path)


def test_rows_never_written_are_refused(tmp_path: Path) -> None:
    path = without_train(tmp_path / "x.hdf5")
    with h5py.File(path, "a") as file:
        file.create_dataset("images-train", (6, 3, 32, 32), np.uint8)
    with pytest.raises(UserError, match="never written"):
        load_dataset(path)


def test_what_is_not_read_in_place_is_refused_with_a_command(tmp_path: Path) -> None:
    path = without_train(tmp_path / "files.hdf5")
    with h5py.File(path, "a") as file:
        kept = file.create_dataset("images-train", (6,), h5py.vlen_dtype(np.uint8))
        kept[:] = np.array([np.arange(9, dtype=np.uint8)] * 6, object)
    with pytest.raises(UserError, match=r"image files, which are not read in place; convert it: zhu convert hdf5"):
        load_dataset(path)
    with h5py.File(tmp_path / "user.hdf5", "w", userblock_size=512) as file:
        file["images-train"], file["labels-train"] = random_images(6).transpose(0, 3, 1, 2), np.arange(6) % 2
    with pytest.raises(UserError, match="user block"):
        load_dataset(tmp_path / "user.hdf5")
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)
    path = without_train(tmp_path / "compact.hdf5")
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple((6, 3, 8, 8))
        stored = h5py.h5d.create(file.id, b"images-train", h5py.h5t.NATIVE_UINT8, space, compact)
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones((6, 3, 8, 8), np.uint8))
    with pytest.raises(UserError, match="compact"):
        load_dataset(path)


def test_other_keys_are_refused_with_the_option_of_convert(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["train/images"], file["train/labels"] = random_images(6), np.arange(6) % 2
    with pytest.raises(UserError, match=r"--images-key and --labels-key of `zhu convert hdf5`"):
        load_dataset(tmp_path / "x.hdf5")


def test_missing_file_or_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"HDF5 file '.*x.hdf5' does not exist"):
        load_dataset(tmp_path / "x.hdf5")
    with pytest.raises(UserError, match=r"has no split 'dev'; it has train, val, test"):
        opened(write_hdf5(tmp_path / "x.hdf5"), "dev")


@pytest.mark.parametrize("pixels", [1, 15, 16, 17, 64, 4095, 4096, 4097, 100_000])
def test_channel_sums_are_exact(pixels: int) -> None:
    values = np.full((pixels, 3), 255, np.uint8)
    values[::3] = np.random.default_rng(0).integers(0, 256, values[::3].shape)
    sums = np.zeros((2, 3), np.int64)
    planes.add_channel_sums(values, sums)
    wide = values.astype(np.int64)
    assert np.array_equal(sums, [wide.sum(axis=0), (wide**2).sum(axis=0)])


@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (4, 4), (16, 16), (7, 31), (32, 32)])
def test_planes_are_joined_for_every_size(sides: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, *sides), np.uint8)
    starts, out = np.array([4, 0, 2]) * images[0].size, np.zeros((3, *sides, 3), np.uint8)
    planes.join_planes(images.reshape(-1), starts, sides[0] * sides[1], out)
    assert np.array_equal(out, images[[4, 0, 2]].transpose(0, 2, 3, 1))
    planes.join_planes(images.reshape(-1), starts, 0, out)
    assert np.array_equal(out, np.repeat(images[[4, 0, 2], 0][..., None], 3, axis=3))
