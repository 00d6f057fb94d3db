"""Files that are whole at any instant, whatever ends the program: written beside, flushed to the disk, then renamed.

Knows no contents. An OSError comes out as it is, and leaves the file of that name as it was.
"""

from __future__ import annotations

import errno
import filecmp
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """The file of this name is the old one until what `fill` wrote is on the disk."""
    _rename(_written_beside(path, fill), path)


def replace_and_keep(path: Path, previous: Path, fill: Callable[[BinaryIO], object]) -> None:
    """`atomic_write`, and the old file, which must be there, is `previous` from then on: it goes only after the new one
    stands, so at every instant there are the old one and the one before it, or the new one and one of them."""
    remove_temporary(previous)
    temporary, kept = _written_beside(path, fill), _beside(previous)
    try:
        kept.hardlink_to(path)
    except OSError:  # a file system without hard links; for an instant `previous` is the only one
        _rename(path, previous)
        _rename(temporary, path)
        return
    _rename(temporary, path)
    _rename(kept, previous)


def finish_replace(path: Path, previous: Path, is_whole: Callable[[Path], bool]) -> None:
    """End what a program that was killed in `replace_and_keep` had begun; afterwards nothing lies beside the two."""
    remove_temporary(path)
    kept = _beside(previous)
    if not kept.exists():
        return
    if is_whole(kept) and not any(
        file.exists() and filecmp.cmp(kept, file, shallow=False) for file in (path, previous)
    ):
        _rename(kept, previous)  # the new one stood already
    else:  # a copy of what is there, or damaged since
        remove_temporary(previous)


def remove_temporary(path: Path) -> None:
    """What a program that was killed in `atomic_write` left beside it."""
    with suppress(FileNotFoundError):
        _beside(path).unlink()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _written_beside(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    remove_temporary(path)  # which may be a link, to be written through
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _rename(source: Path, target: Path) -> None:
    """On the disk when it returns, where the file system can tell."""
    source.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that know no such thing
            raise
    finally:
        os.close(folder)
