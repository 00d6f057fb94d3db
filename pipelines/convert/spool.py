"""Read and write the tables of an unfinished conversion."""

from __future__ import annotations

import secrets
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import atomic_write

Table = dict[str, np.ndarray]
# In the names of temporary files: on a cluster, two nodes may work on one task if one of them is thought to be dead.
WRITER = f".{secrets.token_hex(4)}"


def load_table(file: Path) -> Table:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file} cannot be read; {spool_damage_hint(file.parent)}") from None


def write_table(file: Path, table: Table) -> None:
    """Write a .npz file atomically, without flushing its directory."""
    arrays: dict[str, Any] = table  # mypy: np.savez also has a parameter that is not an array
    atomic_write(file, lambda opened: np.savez(opened, **arrays), sync=False, writer=WRITER)


def write_payloads(file: Path, payloads: list[bytes]) -> None:
    """Write samples to a file atomically, without flushing its directory."""
    atomic_write(file, lambda opened: opened.writelines(payloads), sync=False, writer=WRITER)


def spool_damage_hint(spool: Path) -> str:
    """Return the last part of an error message about a damaged spool.

    The hint is to delete the output and convert again. Files are renamed into place only once complete, so a killed
    conversion cannot cause this damage; the disk or another program must have.
    """
    return f"{spool} is damaged: delete {spool.parents[1]} and convert again"
