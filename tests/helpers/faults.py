"""Run short trainings on the digits with faults, and compare them with an uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from helpers.training import CLEAN, DIGITS, ROOT, restore_signal_handlers, strict_lines
from tools import convert
from train.checkpoint import format

SCRIPT = ROOT / "tests" / "helpers" / "with_faults.py"
EPOCHS, STEPS = 6, 22  # of the digits in global batches of 64
SHORT = [f"train.epochs={EPOCHS}", "train.save_every_steps=10", "log.every_steps=10", "data.batch_size=64"]
RESULTS = ("epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr")


def digits_in(folder: Path) -> Path:
    out = folder / "digits"
    assert convert.main(["digits", "--out", str(out), "--workers", "1"]) == 0
    return out


def run_arguments(data: Path, output: Path, *opts: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--opts", *SHORT, *opts]


def command_with(faults: dict[str, Any], arguments: list[str | Path], processes: int = 0) -> list[str]:
    """Return the command of train/ddp.py with faults, see with_faults.py. processes: run by torchrun; 0: without it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, str(SCRIPT), json.dumps(faults), *map(str, arguments)]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**CLEAN, **environment},
        preexec_fn=restore_signal_handlers,
    )


def run_to_its_end(command: list[str], timeout_s: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**CLEAN, **environment}, timeout=timeout_s
    )


def wait_for(process: subprocess.Popen[str], condition: Any, timeout_s: float = 120) -> None:
    """Wait for `condition()` while the process runs."""
    end = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"nothing happened in {timeout_s} s: {process.communicate()}")
        time.sleep(0.02)


def logged(folder: Path, text: str) -> bool:
    """Return True if the log of the run contains the text."""
    log = folder / "log.txt"
    return log.exists() and text in log.read_text()


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def forged(saved: bytes, epoch: int | None = None, step: int | None = None) -> bytes:
    """Append a valid manifest to the output of torch.save, as an attacker could."""
    return saved + format._manifest(len(saved), hashlib.sha256(saved).hexdigest(), epoch, step)


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Compare weights, optimizer and results of every epoch, bitwise."""
    ours, theirs = content(folder / "last.pt"), content(unbroken / "last.pt")
    for part in ("model", "optimizer", "position", "progress"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    lines = zip(strict_lines(folder / "metrics.jsonl"), strict_lines(unbroken / "metrics.jsonl"), strict=True)
    for line, other in lines:
        assert {key: line[key] for key in RESULTS} == {key: other[key] for key in RESULTS}
