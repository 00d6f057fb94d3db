"""Shards that change during a run: the run names the shard and stops, or continues with the opened bytes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.chance import chance as chance
from helpers.loaders import train
from helpers.shards import converted_digits, shards_of
from helpers.training import CLEAN, DIGITS, command_line, run_here
from pipelines.loader.batches import Batch
from pipelines.loader.epoch_iterator import Loader
from train.checkpoint import store

BOTH = pytest.mark.parametrize("encoding", ["npy", "jpeg"])


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return data sets by encoding; do not modify them."""
    return {one: converted_digits(tmp_path_factory.mktemp(one), one) for one in ("npy", "jpeg")}


def cut(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.choice([0, chance.randrange(file.stat().st_size)]))


def overwrite(file: Path, chance: random.Random) -> None:
    with file.open("r+b") as opened:
        begin = chance.randrange(file.stat().st_size // 2)
        opened.seek(begin)
        opened.write(chance.randbytes(file.stat().st_size - begin))


def copy_over(file: Path, chance: random.Random) -> None:
    """Overwrite like cp: truncate, then write."""
    content = file.read_bytes()
    with file.open("wb") as opened:
        opened.write(chance.randbytes(len(content)))


def replace(file: Path, chance: random.Random) -> None:
    other = file.with_suffix(".other")
    other.write_bytes(chance.randbytes(file.stat().st_size))
    other.rename(file)


def remove(file: Path, chance: random.Random) -> None:
    file.unlink()


ENDS: dict[Any, str] = {cut: "was truncated", overwrite: "was overwritten", copy_over: "was "}
GOES_ON: dict[Any, str] = {replace: "was replaced by another file", remove: "can no longer be found"}
SHORT, LONG = 12, 300  # epochs of runs that complete, and of runs that are stopped early; more would be compiled
OPTS = [
    "data.placement=host",
    "data.threads=1",
    "train.save_every_steps=3",
    "log.every_steps=3",
    "train.warmup_epochs=1",
]


def changed_under_a_run(
    data: Path, output: Path, split: str, change: Any, chance: random.Random
) -> subprocess.CompletedProcess[str]:
    """Run and change a shard at a random time after the first checkpoint; return how the run ended."""
    epochs = SHORT if change in GOES_ON else LONG
    arguments = ["--cfg", DIGITS, "--data-path", data, "--output", output, "--opts", *OPTS, f"train.epochs={epochs}"]
    process = subprocess.Popen(
        command_line(*arguments), env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    last = output / "digits_lenet" / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.3 if change in GOES_ON else 2))
    assert process.poll() is None, process.communicate()
    change(data / f"digits-{split}-000000.tar", chance)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def check_run_under_change(source: Path, tmp_path: Path, split: str, change: Any, chance: random.Random) -> None:
    """Check that the run ends as expected, and that its checkpoint continues like one with unchanged shards."""
    data, output = tmp_path / "digits", tmp_path / "out"
    shutil.copytree(source, data)
    result = changed_under_a_run(data, output, split, change, chance)
    print(split, change.__name__, result.returncode, result.stderr)
    name = f"digits-{split}-000000.tar"
    assert "Traceback" not in result.stderr
    if change in GOES_ON:
        assert result.returncode == 0
        said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert len(said) == 1
        assert f"{name} of split '{split}' {GOES_ON[change]}" in said[0]
        return
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"{name} {ENDS[change]}" in errors[0]
    assert "and resume the run" in errors[0]


def check_that_nothing_changed_was_saved(source: Path, tmp_path: Path) -> None:
    """Check that the last checkpoint equals that of a run on intact shards that stops at the same position."""
    ours = store.load(tmp_path / "out" / "digits_lenet" / "last.pt")
    arguments = ["--cfg", DIGITS, "--data-path", source, "--output", tmp_path / "sound", "--opts", *OPTS]
    run_here(*arguments, f"train.epochs={LONG}", stop_at=ours["position"])
    stopped = [store.load(file) for file in (tmp_path / "sound" / "digits_lenet").glob("*.pt")]
    theirs = next(content for content in stopped if content["position"] == ours["position"])  # last.pt or best.pt
    assert all(torch.equal(values, theirs["model"][name]) for name, values in ours["model"].items())


def test_run_names_its_truncated_shard(digits: dict[str, Path], tmp_path: Path, chance: random.Random) -> None:
    check_run_under_change(digits["npy"], tmp_path, "train", cut, chance)


@pytest.mark.campaign
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", [*ENDS, *GOES_ON])
@BOTH
def test_runs_with_shards_changed_at_random_times(
    encoding: str, change: Any, split: str, digits: dict[str, Path], tmp_path: Path, chance: random.Random
) -> None:
    check_run_under_change(digits[encoding], tmp_path, split, change, chance)
    if change in ENDS and split == "train":
        check_that_nothing_changed_was_saved(digits[encoding], tmp_path)


@BOTH
@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.campaign)])
def test_loader_survives_truncations_at_random_places_and_times(
    count: int, encoding: str, tmp_path: Path, chance: random.Random, request: pytest.FixtureRequest
) -> None:
    """Train in this process, which SIGBUS would end."""
    for number in range(count):
        folder = Path(shutil.copytree(request.getfixturevalue(f"{encoding}_data"), tmp_path / str(number)))
        loader = train(folder, 8, image_size=32, placement="host", threads=2)
        batches = iter(loader)
        for _ in range(chance.randrange(20)):
            next(batches)
        file = chance.choice(shards_of(folder))
        cut(file, chance)
        with pytest.raises(UserError, match=f"{file.name} was truncated"):
            read_on(loader, batches)
        shutil.rmtree(folder)


def read_on(loader: Loader, batches: Iterator[Batch]) -> None:
    for _ in batches:
        pass
    loader.check_unchanged()
