"""Shards that change under a loader: changed bytes are noticed soon and never saved."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.utils import warnings as notes
from configs.utils.errors import UserError
from helpers.backends import use_dali
from helpers.loaders import copies, train
from pipelines.interfaces import Position
from pipelines.loader.train_loader import TrainLoader
from pipelines.storage import monitor
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

BOTH = pytest.mark.parametrize("encoding", ["npy", "jpeg"])
NAME = "tiny-train-000001.tar"


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    notes.warn.cache_clear()


def truncate(file: Path) -> None:
    os.truncate(file, 4096)


def extend(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 512)


def overwrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(100_000)
        opened.write(b"\xff" * 20_000)


def touch(file: Path) -> None:
    os.utime(file)


def rewrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(file.read_bytes())


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(bytes(file.stat().st_size))
    other.rename(file)


def remove(file: Path) -> None:
    file.unlink()


def remove_all(file: Path) -> None:
    shutil.rmtree(file.parent)


ENDS = {truncate: "was truncated", extend: "was extended from", overwrite: "was overwritten with other bytes"}
GOES_ON = {touch: None, rewrite: None, replace: "was replaced by another file", remove: "can no longer be found"}
Change = Callable[[Path], None]


def by_name(changes: dict[Change, str | None]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("change", "says"), changes.items(), ids=[change.__name__ for change in changes])


def loader_of(encoding: str, request: pytest.FixtureRequest) -> tuple[TrainLoader, Path]:
    """Return a loader that reads from the mapping, and its second shard."""
    folder: Path = request.getfixturevalue(f"{encoding}_copy")
    return train(folder, 16, image_size=32, placement="host"), folder / NAME


@BOTH
@by_name(ENDS)
def test_loader_stops_and_names_the_changed_shard(
    change: Change, says: str, encoding: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(monitor, "MAX_SHARE", math.inf)
    loader, file = loader_of(encoding, request)
    batches = iter(loader)
    next(batches)
    change(file)
    with pytest.raises(UserError, match=rf"{NAME} {says}"):
        copies(batches)
    with pytest.raises(UserError, match=rf"{NAME} {says}"):  # the error persists
        loader.check_unchanged()


@BOTH
@by_name(GOES_ON)
def test_loader_continues_with_the_opened_bytes(
    change: Change,
    says: str | None,
    encoding: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(monitor, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(monitor, "MAX_SHARE", math.inf)
    loader, file = loader_of(encoding, request)
    expected = [batch.images.sum() for batch in copies(loader)]
    loader.position = Position(0)
    time.sleep(0.02)
    change(file)
    assert [batch.images.sum() for batch in copies(loader)] == expected
    loader.check_unchanged()
    said = capsys.readouterr().err.splitlines()
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == (says is not None)
    assert says is None or f"{NAME} of split 'train' {says}" in warnings[0]


@pytest.mark.parametrize("way", ["kernels", "DALI"])
@BOTH
def test_truncated_shard_is_noticed_by_first_batch_reading_it(
    encoding: str, way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "POLL_INTERVAL_S", math.inf)
    if way == "DALI":
        use_dali(monkeypatch)
    loader, file = loader_of(encoding, request)
    truncate(file)
    with pytest.raises(UserError, match=rf"{NAME} was truncated to 4,096 of [\d,]+ bytes while it was in use"):
        copies(loader)


def test_removed_data_set_is_read_to_the_end(jpeg_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = train(jpeg_copy, 16, image_size=32)
    remove_all(jpeg_copy / NAME)
    assert len(copies(loader)) == len(loader)
    loader.check_unchanged()
    assert "can no longer be found (No such file or directory)" in capsys.readouterr().err


def test_restored_file_counts_as_replaced(npy_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = open_split(npy_copy, "train")
    content = split.files[1].read_bytes()
    split.files[1].unlink()
    split.check_unchanged()
    split.files[1].write_bytes(content)
    split.check_unchanged()
    split.check_unchanged()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert ["no longer" in line for line in said] == [True, False]
    assert "was replaced" in said[1]


def test_monitor_polls_at_most_every_interval(npy_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    stat, now = Path.stat, [1000.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    split = open_split(npy_copy, "train")
    monkeypatch.setattr(Path, "stat", lambda path, **options: (looked.append(path), stat(path, **options))[1])
    for now[0], looks in ((1000.4, 0), (1000.6, 1), (1001.0, 1), (1001.2, 2)):
        for _ in range(10):
            split.monitor.poll()
        assert looked == looks * list(split.files)
    split.check_unchanged()
    assert looked == 3 * list(split.files)


def test_resident_split_ignores_later_changes(npy_copy: Path) -> None:
    loader = train(npy_copy, 16, placement="device")
    expected = copies(loader)
    truncate(npy_copy / NAME)
    loader.position = Position(0)
    assert all((a.images == b.images).all() for a, b in zip(copies(loader), expected, strict=True))
    loader.check_unchanged()


def test_split_that_changes_while_loading_into_memory_is_refused(
    npy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_pixels = Split.read_pixels

    def changed(split: Split, samples: np.ndarray, out: np.ndarray) -> None:
        truncate(npy_copy / NAME)
        read_pixels(split, samples, out)

    monkeypatch.setattr(Split, "read_pixels", changed)
    with pytest.raises(UserError, match=rf"{NAME} was truncated"):
        train(npy_copy, 16, placement="device")


def test_shard_changed_between_verifying_and_mapping_is_refused(
    npy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.storage import open as opening

    map_files = opening.map_files

    def changed(*arguments: object) -> object:
        replace(npy_copy / NAME)
        return map_files(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(opening, "map_files", changed)
    with pytest.raises(UserError, match=rf"{NAME} was changed while it was being opened"):
        open_split(npy_copy, "train")
