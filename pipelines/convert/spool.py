"""Read and atomically write the files of an unfinished conversion."""

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
    """Return the last part of an error message about a damaged spool.

    The hint is to delete the output and convert again. Files are renamed into place only once complete, so a killed
    conversion cannot cause this damage; the disk or another program must have.
    """
    return f"{spool} is damaged: delete {spool.parents[1]} and convert again"


def commit_npz(file: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    commit(file, buffer.getvalue(), file.parent)


def commit(file: Path, content: bytes, spool: Path) -> None:
    commit_pieces(file, [content], spool)


def commit_pieces(file: Path, pieces: list[bytes], spool: Path) -> None:
    """Write `pieces` to a file atomically.

    The content is written to a temporary file in the spool and flushed to disk, then the file is renamed. The next
    conversion deletes temporary files that a killed conversion left in the spool.
    """
    temporary = spool / f"{file.name}.{os.getpid()}.tmp"
    with temporary.open("wb", buffering=2**20) as opened:
        for piece in pieces:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(file)


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that renames in it survive a power failure. File contents are not flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
