"""A tiny source of samples in memory. Imports neither torch nor DALI, so that subprocesses start fast.

`python tests/helpers/memory_source.py OUT ENCODING WORKERS [KILL_AT [URL]]` converts it. With KILL_AT n > 0, the
process is killed at its n-th flush, rename or removal of a file. With URL, OUT is the folder of the unfinished
conversion.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.convert import writer
from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.remote.upload import Uploads
from pipelines.storage.dataset import DatasetInfo

CLASSES = tuple(f"class {number}" for number in range(12))  # two digits in a .cls member
SIDE = 32


def marked_image(row: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Return noise with the row encoded in the corners, legible after a flip: uint8 [H, W, 3]."""
    image = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[[0, 0, -1, -1], [0, -1, 0, -1]] = row >> 8, row & 255, 17
    return image


def rows_of(images: Any) -> list[int]:
    """Return the rows that `marked_image` encoded in pixels [B, 3, H, W]."""
    return [int(high) * 256 + int(low) for high, low in np.asarray(images)[:, :2, 0, 0]]


def jpeg_file(row: int) -> bytes:
    """Return a JPEG whose size and quality depend on the row, smooth with some noise like a photo."""
    random = np.random.default_rng(row)
    height, width = random.integers(40, 90, 2)
    y, x = np.mgrid[:height, :width] / 20
    planes = [np.sin(x * a + b) + np.cos(y * b + a) for a, b in random.uniform(0.3, 2, (3, 2))]
    pixels = 128 + 50 * np.stack(planes, axis=2) + random.normal(0, 8, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(random.integers(70, 96)))
    return buffer.getvalue()


@dataclass
class MemoryRows:
    """One split; `content` is a list of images or files, or the number of rows to generate."""

    content: list[np.ndarray | bytes] | int
    labelled: bool = True
    files: bool = False
    bytes_per_row: int = SIDE * SIDE * 3
    labels: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.arange(len(self), dtype=np.int64) * 7 % len(CLASSES) if self.labelled else None

    def __len__(self) -> int:
        return self.content if isinstance(self.content, int) else len(self.content)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        for row in range(start, stop):
            if isinstance(self.content, int):
                yield jpeg_file(row) if self.files else marked_image(row)
            else:
                yield self.content[row]

    def describe(self, row: int) -> str:
        return f"row[{row}]"


def memory_source(**splits: MemoryRows) -> Source:
    return Source("memory", "tests", CLASSES, "0" * 64, dict(splits))


def tiny_source(encoding: str) -> Source:
    """Return a source with several shards of train (1 MiB), 107 samples of val, and test without labels."""
    if encoding == "npy":
        return memory_source(train=MemoryRows(700), val=MemoryRows(107), test=MemoryRows(41, labelled=False))
    train, val, test = (
        MemoryRows(520, files=True),
        MemoryRows(53, files=True),
        MemoryRows(9, labelled=False, files=True),
    )
    return memory_source(train=train, val=val, test=test)


def write(
    source: Source,
    out: Path,
    encoding: str | Encoding = "npy",
    workers: int = 1,
    uploads: Uploads | None = None,
    **options: Any,
) -> DatasetInfo:
    """Convert a source with shards of 1 MiB."""
    chosen = Encoding(encoding) if isinstance(encoding, str) else encoding  # type: ignore[arg-type]
    return convert_source(source, out, Options(chosen, **{"shard_mib": 1, **options}), workers, "tiny", uploads=uploads)


def kill_at(count: int) -> None:
    """Make this process exit before its `count`-th flush, rename or removal of a file."""
    calls = 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, counted)

    wrap(os, "fsync")
    wrap(Path, "rename")
    wrap(Path, "unlink")


if __name__ == "__main__":
    out, encoding, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    writer.SMALL_SOURCE = 0  # use all workers, although one would be faster
    if len(sys.argv) > 4 and int(sys.argv[4]) > 0:
        kill_at(int(sys.argv[4]))
    write(tiny_source(encoding), out, encoding, workers, Uploads(sys.argv[5]) if len(sys.argv) > 5 else None)
