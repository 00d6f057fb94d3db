"""Whole runs on damaged JPEGs: they stop and name the sample, or complete with reproducible results."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils import warnings
from helpers.chance import seeded
from helpers.damage import damage_in_turn
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.training import CLEAN, DIGITS, command_line, run_here, run_script, strict_lines
from pipelines.storage.open import open_split
from train.checkpoint import store

BAD = (7, 8, 60, 200)
EPOCHS, STEPS = 4, 15  # 240 samples in global batches of 16
OPTS = [
    f"train.epochs={EPOCHS}", "train.warmup_epochs=0", "train.lr=3e-3", "train.save_every_steps=1",
    "data.batch_size=16", "data.image_size=32", "data.threads=1", "aug.crop=random-resized", "aug.flip=0.5",
]  # fmt: skip
SKIP = "data.on_bad_sample=skip"
RESULTS = ("train_loss", "train_top1", "val_loss", "val_top1")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 240 train images of several sizes, BAD of them damaged differently, and 53 of val; read only."""
    folder = tmp_path_factory.mktemp("damaged") / "tiny"
    write(memory_source(train=MemoryRows(240, files=True), val=MemoryRows(53, files=True)), folder, "jpeg")
    damage_in_turn(folder, BAD)
    return folder


@pytest.fixture(scope="module")
def unbroken(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with skip; read only."""
    output = tmp_path_factory.mktemp("unbroken")
    run_here(*arguments(damaged, output, SKIP))
    return output / "digits_lenet"


def arguments(data: Path, output: Path, *opts: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--opts", *OPTS, *opts]


def curve(folder: Path) -> list[list[float]]:
    return [[line[name] for name in RESULTS] for line in strict_lines(folder / "metrics.jsonl") if "val_loss" in line]


def model(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = store.load(folder / "last.pt")["model"]
    return weights


def assert_same_run(folder: Path, expected: Path) -> None:
    assert len(curve(expected)) == EPOCHS
    assert curve(folder) == curve(expected)
    theirs = model(expected)
    assert all(torch.equal(values, theirs[name]) for name, values in model(folder).items())


def test_stop_ends_run_naming_first_bad_sample(damaged: Path, tmp_path: Path, call: Call) -> None:
    code, _, err = call(*arguments(damaged, tmp_path))
    split = open_split(damaged, "train")
    assert code == 2
    named = re.findall(r"^error: sample (\d+) of split 'train' ", err, re.MULTILINE)
    assert len(named) == 1
    assert int(named[0]) in BAD
    assert split.describe(int(named[0])) in err
    assert "Traceback" not in err


def test_skip_completes_and_reports_bad_samples_per_epoch(unbroken: Path, damaged: Path) -> None:
    log = (unbroken / "log.txt").read_text()
    reports = re.findall(r"bad samples so far: (\d+) of at most 16, .*: ([\d, ]+)\)", log)
    assert len(reports) == EPOCHS
    assert reports[-1] == ("4", "7, 8, 60, 200")
    assert [line["epoch"] for line in strict_lines(unbroken / "metrics.jsonl") if "val_loss" in line] == [
        *range(EPOCHS)
    ]
    assert store.load(unbroken / "last.pt")["position"] == {"epoch": EPOCHS, "step": 0}


@pytest.mark.parametrize("others", [["data.threads=2"], ["data.threads=2", "data.prefetch=12"]], ids=str)
def test_threads_and_prefetch_change_no_result(
    others: list[str], unbroken: Path, damaged: Path, tmp_path: Path
) -> None:
    run_here(*arguments(damaged, tmp_path, SKIP, *others))
    assert_same_run(tmp_path / "digits_lenet", unbroken)


def test_run_exceeding_its_budget_ends(damaged: Path, tmp_path: Path, call: Call) -> None:
    code, _, err = call(*arguments(damaged, tmp_path, SKIP, "data.max_bad_samples=3"))
    assert code == 2
    assert "error: 4 samples of split 'train' cannot be decoded, more than data.max_bad_samples=3" in err


def test_bad_validation_sample_ends_run_despite_skip(damaged: Path, tmp_path: Path, call: Call) -> None:
    swapped = ["data.train_split=val", "data.val_split=train"]
    code, _, err = call(*arguments(damaged, tmp_path, SKIP, *swapped))
    assert code == 2
    assert f"error: {open_split(damaged, 'train').describe(7)} cannot be decoded" in err
    assert "an evaluation needs every sample" in err


def killed_and_resumed(damaged: Path, unbroken: Path, tmp_path: Path, kills: int) -> None:
    """Kill each attempt but the last after a random checkpoint; then compare with the unbroken run."""
    generator = seeded()
    last = tmp_path / "digits_lenet" / "last.pt"
    command = arguments(damaged, tmp_path, SKIP)
    landed = 0
    for life in range(kills):
        process = subprocess.Popen(
            command_line(*command, *(["--resume", "auto"] if life else [])),
            env=CLEAN,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(generator.randint(1, max(1, EPOCHS * STEPS // (4 * kills)))):
            before = changed(last)
            while process.poll() is None and changed(last) == before:
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
    assert landed >= max(1, kills // 2)
    result = run_script(*command, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert_same_run(last.parent, unbroken)


def changed(path: Path) -> Any:
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.slow
def test_killed_run_finds_same_bad_samples_again(damaged: Path, unbroken: Path, tmp_path: Path) -> None:
    killed_and_resumed(damaged, unbroken, tmp_path, kills=1)


@pytest.mark.campaign
def test_many_kills_lose_no_substitute(damaged: Path, unbroken: Path, tmp_path: Path) -> None:
    killed_and_resumed(damaged, unbroken, tmp_path, kills=8)


@pytest.mark.campaign
def test_two_ranks_train_on_same_samples(damaged: Path, unbroken: Path, tmp_path: Path) -> None:
    """Compares losses, since sums over ranks round in another order. The loader's tests compare pixels."""
    result = run_script(*arguments(damaged, tmp_path, SKIP, "data.batch_size=8"), processes=2)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "digits_lenet"
    assert "bad samples so far: 4 of at most 16" in (folder / "log.txt").read_text()
    for ours, theirs in zip(curve(folder), curve(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
