"""Training on an HDF5 file in place gives bitwise the weights of training on its conversion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from configs.utils.errors import UserError
from helpers.hdf5_files import Storage, converted, write_hdf5
from helpers.launches import assert_same_weights
from helpers.training import DIGITS, run_here, run_script
from tools.convert import verify

CHUNKED: Storage = {"compression": "gzip", "chunks": (7, 2, 20, 32)}


def arguments(data: Path, output: Path, *more: str, batch_size: int = 32) -> list[str]:
    options = ["train.epochs=2", "train.warmup_epochs=0", "train.save_every_steps=2", f"data.batch_size={batch_size}"]
    options += ["data.limit=160", "data.placement=host", "aug.flip=0.5", "aug.crop=pad", "model.drop_rate=null"]
    return ["--cfg", str(DIGITS), "--data-path", str(data), "--output", str(output), *more, "--opts", *options]


def run_folder(output: Path) -> Path:
    return output / "digits_lenet"


@pytest.mark.parametrize("storage", [{}, CHUNKED], ids=["contiguous", "gzip of parts"])
def test_weights_are_those_of_the_conversion(storage: Storage, tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", storage=storage)
    for name, data in (("file", path), ("shards", converted(path))):
        run_here(*arguments(data, tmp_path / name))
    assert_same_weights(run_folder(tmp_path / "file"), run_folder(tmp_path / "shards"))


def test_resumed_run_has_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    run_here(*arguments(path, tmp_path / "unbroken"))
    run_here(*arguments(path, tmp_path / "resumed"), stop_at={"epoch": 0, "step": 2})
    os.utime(path)  # the same content
    run_here(*arguments(path, tmp_path / "resumed", "--resume", "auto"))
    assert_same_weights(run_folder(tmp_path / "resumed"), run_folder(tmp_path / "unbroken"))


def test_resume_with_other_pixels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    run_here(*arguments(path, tmp_path / "run"), stop_at={"epoch": 0, "step": 2})
    content = bytearray(path.read_bytes())
    content[300_000] ^= 1  # a pixel of train
    path.write_bytes(content)
    with pytest.raises(UserError, match="data set"):
        run_here(*arguments(path, tmp_path / "run", "--resume", "auto"))
    assert "is intact" in verify(path)


@pytest.mark.slow
def test_two_ranks_get_the_weights_of_the_conversion(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    for name, data in (("file", path), ("shards", converted(path))):
        done = run_script(*arguments(data, tmp_path / name, batch_size=16), processes=2)
        assert done.returncode == 0, done.stderr
    assert_same_weights(run_folder(tmp_path / "file"), run_folder(tmp_path / "shards"))
    one = torch.load(run_folder(tmp_path / "file") / "last.pt", weights_only=True)
    assert one["dataset"]["classes"] == ["0", "1", "2", "3"]
