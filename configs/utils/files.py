"""Paths as users write them, and opening files of unknown origin.

No pipe or device is waited for, and nothing larger than expected is read.
"""

from __future__ import annotations

import errno
import filecmp
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from configs.utils.errors import UserError

MAX_TEXT_BYTES = 2**26  # of what a run writes of itself as text; a line of metrics has some 500


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~user` by the home folder. Raises ValueError where there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("starts with ~, but there is no such user; write ./~ for a file name that starts with ~")
    return expanded


def path_text(text: str) -> str:
    """Expand the home folder in a path of the command line. Raises UserError where there is none."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise UserError(f"{text!r} {error}") from None


def path_argument(text: str) -> Path:
    """Return `path_text` as a Path."""
    return Path(path_text(text))


def open_plain(path: Path) -> BinaryIO:
    """For reading. Raises OSError, also for what is no file: a folder, a pipe, a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, reason = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "it is no file")
        raise OSError(number, reason, str(path))
    return os.fdopen(descriptor, "rb")


def read_small_text(path: Path, errors: str = "strict") -> str:
    """The text of a file that a run wrote of itself; errors: of `bytes.decode`. Raises OSError for what is no file or
    too large, ValueError for what is no text."""
    with open_plain(path) as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_TEXT_BYTES:,} bytes", str(path))
    return content.decode(errors=errors)


# Writing


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
