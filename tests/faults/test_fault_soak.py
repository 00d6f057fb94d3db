"""Memory, threads and file descriptors do not grow over epochs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.faults import command_with, run_to_its_end
from helpers.training import DIGITS, ROOT, strict_lines
from tools import convert

EPOCHS, MORE = 10, 1.05  # limit of memory after the last epoch, relative to the second
LENET = ROOT / "configs" / "cifar10_lenet.yaml"


def soak(config: Path, data: Path, output: Path, *opts: str) -> None:
    census = output / "census.jsonl"
    output.mkdir()
    command = [
        "--cfg",
        config,
        "--data-path",
        data,
        "--output",
        output,
        "--opts",
        f"train.epochs={EPOCHS}",
        "train.warmup_epochs=0",
        "name=run",
        *opts,
    ]
    done = run_to_its_end(command_with({"census": str(census)}, command), timeout_s=3600)
    assert done.returncode == 0, done.stderr
    lines = strict_lines(census)
    print(*lines, sep="\n")  # shown when the test fails
    assert len(lines) == EPOCHS
    second, last = lines[1], lines[-1]
    assert last["memory_mib"] <= MORE * second["memory_mib"]
    assert last["descriptors"] == second["descriptors"]
    assert last["threads"] <= second["threads"]  # those of the loader end with the last epoch


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_ten_epochs_on_digits_use_no_more_than_two(encoding: str, tmp_path: Path) -> None:
    assert convert.main(["digits", "--out", str(tmp_path / "data"), "--workers", "1", "--encoding", encoding]) == 0
    soak(DIGITS, tmp_path / "data", tmp_path / "output", "train.save_every_steps=7")


@pytest.mark.campaign
@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_ten_epochs_on_cifar10_use_no_more_than_two(encoding: str, shared_data: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, shared_data / "unpack.py", tmp_path, "--only", "cifar10"], check=True)
    command = ["cifar10", "--source", str(tmp_path), "--out", str(tmp_path / "data"), "--encoding", encoding]
    assert convert.main(command) == 0
    soak(LENET, tmp_path / "data", tmp_path / "output")
