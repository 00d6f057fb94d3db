"""Files of an unfinished conversion: written whole or not at all."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from configs.utils.errors import UserError


def load_table(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file} cannot be read; {spool_damage_hint(file.parent)}") from None


def spool_damage_hint(spool: Path) -> str:
    """The end of an error's sentence: what a kill leaves is whole, so a disk or somebody else has changed it."""
    return f"{spool} is damaged: delete {spool.parents[1]} and convert again"


def commit_npz(file: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    commit(file, buffer.getvalue(), file.parent)


def commit(file: Path, content: bytes, spool: Path) -> None:
    commit_pieces(file, [content], spool)


def commit_pieces(file: Path, pieces: list[bytes], spool: Path) -> None:
    """Write to a temporary name, flush to disk, rename: the file is there whole or not at all.

    What a kill leaves of the temporary file lies in the spool, and the next run deletes it.
    """
    temporary = spool / f"{file.name}.{os.getpid()}.tmp"
    with temporary.open("wb", buffering=2**20) as opened:
        for piece in pieces:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(file)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: a rename alone may be undone by a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
