"""Shards damaged before a run starts are refused by name. See `test_fault_changes` for changes during a run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.schema import OnBadSample
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.chance import chance as chance
from helpers.edits import flip_byte
from helpers.memory_source import MemoryRows, marked_image, memory_source, write
from helpers.shards import converted_digits, shards_of
from helpers.training import DIGITS, run_script
from pipelines.storage.open import open_split
from pipelines.storage.verify import verify

QUICK, MANY = 8, 100
BOTH = pytest.mark.parametrize("encoding", ["npy", "jpeg"])
COUNTS = pytest.mark.parametrize("count", [QUICK, pytest.param(MANY, marks=pytest.mark.campaign)])
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set that tests do not modify."""
    return converted_digits(tmp_path_factory.mktemp("npy"), "npy")


@pytest.fixture
def folder(encoding: str, request: pytest.FixtureRequest) -> Path:
    """Return a data set to damage, with several shards of train."""
    copied: Path = request.getfixturevalue(f"{encoding}_copy")
    return copied


@contextmanager
def restored(file: Path) -> Iterator[bytearray]:
    """Yield the content of a file, and restore the file at the end."""
    content = file.read_bytes()
    yield bytearray(content)
    file.write_bytes(content)


def assert_refused(folder: Path, *names: str) -> str:
    """Check that opening (with and without skipping of damaged images) and verify refuse it; return the error."""
    with pytest.raises(UserError) as first:
        open_split(folder, "train")
    with pytest.raises(UserError) as second:
        open_split(folder, "train", on_bad_sample=OnBadSample.SKIP)
    for error in (first, second):
        assert any(name in str(error.value) for name in names), error.value
        assert "\n" not in str(error.value)
    return str(first.value)


@BOTH
@COUNTS
def test_shard_truncated_anywhere_is_refused_by_name(count: int, folder: Path, chance: random.Random) -> None:
    for _ in range(count):
        file = chance.choice(shards_of(folder))
        with restored(file) as content:
            os.truncate(file, chance.randrange(len(content)))
            assert file.name in assert_refused(folder, file.name)


@BOTH
@COUNTS
def test_flipped_bit_of_a_tar_header_is_refused_by_sample(count: int, folder: Path, chance: random.Random) -> None:
    split = open_split(folder, "train")
    for _ in range(count):
        sample = chance.randrange(len(split))
        begin = int(split.address[sample]) - 512
        if chance.random() < 0.5:  # the header of its label
            begin += 512 + -(-int(split.size[sample]) // 512) * 512
        number, begin = divmod(begin, split.slot_bytes)
        file = split.files[number]
        with restored(file) as content:
            content[begin + chance.randrange(512)] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
            text = assert_refused(folder, file.name)
            assert f"sample {sample} of split 'train'" in text


@BOTH
@COUNTS
def test_any_flipped_bit_of_the_index_is_refused(count: int, folder: Path, chance: random.Random) -> None:
    file = folder / "train.index.npz"
    for _ in range(count):
        with restored(file) as content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
            assert_refused(folder, file.name)


@BOTH
@COUNTS
def test_verify_and_start_find_any_flipped_bit_of_an_image(count: int, folder: Path, chance: random.Random) -> None:
    split = open_split(folder, "train")
    for _ in range(count):
        sample = chance.randrange(len(split))
        number, begin = divmod(int(split.address[sample]), split.slot_bytes)
        file = split.files[number]
        with restored(file) as content:
            content[begin + chance.randrange(int(split.size[sample]))] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
            (problem,) = verify(folder)
            assert problem.startswith(f"{file.name} does not have the sha256")
            with pytest.raises(UserError, match=rf"{file.name} does not have the sha256"):
                open_split(folder, "train")


def swapped(first: Path, second: Path) -> None:
    other = first.with_suffix(".other")
    first.rename(other)
    second.rename(first)
    other.rename(second)


@BOTH
def test_swapped_shards_are_refused_by_name(encoding: str, folder: Path) -> None:
    files = shards_of(folder)
    for number in range(len(files) - 1):
        for other in files[number + 1 :]:
            swapped(files[number], other)
            text = assert_refused(folder, files[number].name, other.name)
            if encoding == "npy" and other != files[-1]:  # all but the last have the same size
                assert f"it has the content of {other.name} of split 'train'" in text
            swapped(files[number], other)
    open_split(folder, "train")


@pytest.mark.parametrize("labelled", [True, False])
def test_shard_of_another_data_set_is_refused_by_name(labelled: bool, tmp_path: Path) -> None:
    for name, first in (("ours", 0), ("theirs", 5000)):
        rows = MemoryRows([marked_image(row) for row in range(first, first + 700)], labelled=labelled)
        write(memory_source(train=rows), tmp_path / name)
    for ours, theirs in zip(shards_of(tmp_path / "ours"), shards_of(tmp_path / "theirs"), strict=True):
        assert ours.stat().st_size == theirs.stat().st_size
        with restored(ours):
            shutil.copy2(theirs, ours)  # with its times
            assert_refused(tmp_path / "ours", ours.name)


def test_training_refuses_each_damage_before_writing_anything(digits: Path, tmp_path: Path, call: Call) -> None:
    data = Path(shutil.copytree(digits, tmp_path / "digits"))
    train, val = "digits-train-000000.tar", "digits-val-000000.tar"
    for name, damage in ((train, "header"), (val, "cut"), ("train.index.npz", "bit"), (train, "pixel")):
        file = data / name
        with restored(file) as content:
            if damage == "cut":
                os.truncate(file, len(content) // 2)
            else:
                content[{"header": 7, "bit": len(content) // 2, "pixel": 2000}[damage]] ^= 1
                file.write_bytes(content)
            code, _, err = call("--cfg", DIGITS, "--data-path", data, "--output", tmp_path / "out")
        assert code == 2
        assert err.startswith(f"error: {file} ")
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.campaign
@pytest.mark.parametrize("damage", ["cut", "header", "swapped"])
def test_script_refuses_damage(damage: str, digits: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(digits, tmp_path / "digits"))
    file = data / "digits-train-000000.tar"
    if damage == "cut":
        os.truncate(file, 10_000)
    elif damage == "header":
        flip_byte(file, 100)
    else:
        swapped(file, data / "digits-val-000000.tar")
    done = run_script("--cfg", DIGITS, "--data-path", data, "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    named = data / "digits-val-000000.tar" if damage == "swapped" else file  # the first that is opened
    assert done.stderr.startswith(f"error: {named} ")
    assert done.stderr.count("\n") == 1
