"""Sweeps over the digits config, by command."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from helpers.training import CLEAN, DIGITS, ROOT, restore_signal_handlers


def sweep_command(data: Path, out: Path, *more: str, epochs: int) -> list[str]:
    """Return the command of a sweep whose runs often save."""
    steps = [f"train.epochs={epochs}", "train.warmup_epochs=0", "data.batch_size=32", "train.save_every_steps=10"]
    opts = ["--opts", f"data.path={data}", "eval.batch_size=64", *steps]
    return [
        sys.executable,
        str(ROOT / "tools" / "sweep.py"),
        "--cfg",
        str(DIGITS),
        "--out",
        str(out),
        *more,
        *opts,
    ]


def start_sweep(words: list[str]) -> subprocess.Popen[str]:
    """Start a sweep that Ctrl-C interrupts."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN,
        cwd=ROOT,
        preexec_fn=restore_signal_handlers,
    )


def call_sweep(words: list[str]) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of a sweep."""
    process = start_sweep(words)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def table_rows(out: Path, *without: str) -> list[dict[str, str]]:
    """Return the rows of sweep.csv, without some columns."""
    with (out / "sweep.csv").open() as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


def trainers(folder: Path) -> list[int]:
    """Return the processes that train a run in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode()
        except OSError:
            continue
        if "ddp.py" in text and str(folder) in text:
            found.append(int(path.parent.name))
    return found
