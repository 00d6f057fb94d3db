"""Write CIFAR-10 files in the format of the official archive."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tools.sources.cifar import EDITIONS


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Pickler that writes bytes like the Python 2 strings in the official batches."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_bytes


def official_pickle(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump({key.encode(): value for key, value in content.items()})
    return buffer.getvalue().replace(b"numpy._core", b"numpy.core")


def pixels_of(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 3072), np.uint8)


def write_cifar10(folder: Path, rows: int = 4, dump: Callable[[dict[str, Any]], bytes] = official_pickle) -> Path:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, file in enumerate((*EDITIONS["cifar10"].train, EDITIONS["cifar10"].test)):
        labels = [(number + row) % 10 for row in range(rows)]
        (folder / file).write_bytes(dump({"data": pixels_of(rows, number), "labels": labels}))
    (folder / "batches.meta").write_bytes(dump({"label_names": [f"name{label}".encode() for label in range(10)]}))
    return folder


def write_archive(path: Path, folder: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path
