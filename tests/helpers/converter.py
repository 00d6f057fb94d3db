"""Convert sources that are large enough for several worker processes, by command."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "tools" / "convert.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ROWS = {"train": 4000, "val": 300, "test": 60}  # above writer.SMALL_SOURCE, so that workers are used
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Conversion:
    """A source and its conversion options."""

    source: Path
    arguments: tuple[str, ...]

    def command(self, out: Path, workers: int | None = 3, *more: str) -> list[str]:
        return [
            *SCRIPT,
            *self.arguments,
            "--source",
            str(self.source),
            "--out",
            str(out),
            "--name",
            "x",
            "--shard-mib",
            "1",
            *([] if workers is None else ["--workers", str(workers)]),
            *more,
        ]


def contents(folder: Path) -> Contents:
    """Return the contents of all files of a folder, including hidden ones."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def block_count(out: Path) -> int:
    """Return how many blocks of train an unfinished conversion has encoded."""
    return len(list((out / ".spool" / "train").glob("block-*.npz")))


def write_hdf5(path: Path) -> Path:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, rows in ROWS.items():
            file[f"images-{split}"] = random.integers(0, 256, (rows, 3, 16, 16), np.uint8)
            if split != "test":
                file[f"labels-{split}"] = random.integers(0, 7, rows)
    return path


def write_photos(root: Path) -> Path:
    """Write JPEG files of several sizes: the same forty under many names, one in 500 damaged."""
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 256, (*random.integers(16, 32, 2), 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{number}.jpg").write_bytes(buffer.getvalue()[: 100 if number == 7 else None])
    for split, rows in ROWS.items():
        for row in range(rows):
            folder = root / split / ("" if split == "test" else f"class{row % 7}")
            folder.mkdir(parents=True, exist_ok=True)
            os.link(root / f"{7 if row % 500 == 3 else row % 7 + 10}.jpg", folder / f"{row:05d}.jpg")
    for file in root.glob("*.jpg"):
        file.unlink()
    return root


def conversions(folder: Path) -> dict[str, Conversion]:
    return {
        "npy": Conversion(write_hdf5(folder / "x.hdf5"), ("hdf5",)),
        "jpeg": Conversion(write_photos(folder / "photos"), ("imagefolder",)),
    }


def start(command: Sequence[str], **options: Callable[[], None]) -> subprocess.Popen[str]:
    """Start a conversion in a new process group, like a shell."""
    return subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def run(command: Sequence[str], **options: Callable[[], None]) -> tuple[int, str]:
    """Return the exit code, and stderr without progress bars."""
    process = start(command, **options)
    error = process.communicate(timeout=300)[1]
    return process.returncode, said(error)


def said(error: str) -> str:
    """Return stderr without progress bars, which contain a bar and end in a carriage return."""
    lines = [line for text in error.split("\n") if (line := text.split("\r")[-1]) and "images/s]" not in line]
    return "\n".join(lines)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until the condition is true or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Return the ids of the worker processes, without multiprocessing's resource tracker."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def is_gone(group: int) -> bool:
    """Return True if all processes of the group end within some seconds."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
