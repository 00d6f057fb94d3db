"""Expand paths from users, read files of unknown origin, and write files atomically and durably.

Reads never wait for a pipe or device, and reads of text are limited in size. Writes go to a temporary file that is
flushed to disk and then renamed, so the file is complete at every instant, even if the program is killed.
"""

from __future__ import annotations

import errno
import filecmp
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from configs.utils.errors import UserError

_URL = re.compile("^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MAX_TEXT_BYTES = 2**26  # limit for text files written by runs; a line of metrics has about 500 bytes


# Paths


def expand_home(path: str) -> str:
    """Replace a leading `~` or `~user` with the home directory. Raises ValueError if the user does not exist."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("starts with ~, but there is no such user; write ./~ for a file name that starts with ~")
    return expanded


def is_url(path: str | Path) -> bool:
    """Return True if the path of a data set is a URL, such as s3://bucket/set, rather than a folder or file."""
    return _URL.match(str(path)) is not None


def user_cache(name: str) -> Path:
    """Return a folder of this project's user cache: model-zhu/NAME in $XDG_CACHE_HOME or ~/.cache.

    $XDG_CACHE_HOME is used only if it is an absolute path.

    Raises:
        RuntimeError: $XDG_CACHE_HOME is not an absolute path, and the user has no home folder.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "model-zhu" / name


def path_text(text: str) -> str:
    """Expand the home directory in a path from the command line. Raises UserError if the user does not exist."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise UserError(f"{text!r} {error}") from None


def path_argument(text: str) -> Path:
    """Return a Path with the home directory expanded like `path_text`. Raises UserError if the user does not exist."""
    return Path(path_text(text))


# Reading


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError if this fails, or if the path is a directory, pipe or device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, reason = (
            (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "it is not a regular file")
        )
        raise OSError(number, reason, str(path))
    return os.fdopen(descriptor, "rb")


def read_small_text(path: Path, errors: str = "strict", max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file of limited size.

    Args:
        path: The file.
        errors: How to handle invalid UTF-8, see `bytes.decode`.
        max_bytes: Maximum size of the file.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large.
        ValueError: The file is not valid UTF-8 and `errors` is "strict".
    """
    with open_plain(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return content.decode(errors=errors)


# Writing. If `write` fails, existing files stay unchanged.


def atomic_write(path: Path, write: Callable[[BinaryIO], object], *, sync: bool = True, writer: str = "") -> None:
    """Replace the file at `path` with the output of `write`, after the output has been flushed to disk.

    Args:
        path: The file.
        write: Called with the open temporary file, in the same folder as `path`.
        sync: Whether to flush the directory as well. Without this, the new file may be lost in a power failure, but the
            old one is not damaged. To write many files, pass False and call `sync_folder` once.
        writer: Name of the writer, if several processes may write the file at the same time.
    """
    _write_temporary(path, write, writer).rename(path)
    if sync:
        sync_folder(path.parent)


def replace_and_keep(path: Path, previous: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` like `atomic_write`, and keep the existing file as `previous`.

    `path` must exist. On file systems with hard links, `path` always holds a complete file, either the old or the new
    one, and an existing `previous` is not replaced until the new file is in place. Without hard links, `path` is
    missing for an instant and only `previous` exists.
    """
    remove_temporary(previous)
    temporary, kept = _write_temporary(path, write), _temporary(previous)
    try:
        kept.hardlink_to(path)
    except OSError:  # no hard links on this file system; for an instant `previous` is the only complete file
        _rename(path, previous)
        _rename(temporary, path)
        return
    _rename(temporary, path)
    _rename(kept, previous)


def finish_replace(path: Path, previous: Path, is_intact: Callable[[Path], bool]) -> None:
    """Finish the work of a process that was killed in `replace_and_keep`, and remove its temporary files.

    Args:
        path: The file that was replaced.
        previous: The file that keeps the earlier version.
        is_intact: Returns True if a file is complete and undamaged.
    """
    remove_temporary(path)
    kept = _temporary(previous)
    if not kept.exists():
        return
    if is_intact(kept) and not any(
        file.exists() and filecmp.cmp(kept, file, shallow=False) for file in (path, previous)
    ):
        _rename(kept, previous)  # the new file was already in place
    else:  # `kept` is damaged, or a copy of one of the files
        remove_temporary(previous)


def remove_temporary(path: Path) -> None:
    """Remove the temporary file that a killed `atomic_write` left, if there is one."""
    _temporary(path).unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write_temporary(path: Path, write: Callable[[BinaryIO], object], writer: str = "") -> Path:
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a leftover may be a link, which would be followed
        with temporary.open("xb", buffering=2**20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _rename(source: Path, target: Path) -> None:
    """Rename a file, and flush the directory of `target` to disk."""
    source.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a directory to disk, so that renames in it survive a power failure. File contents are not flushed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that cannot fsync directories
            raise
    finally:
        os.close(descriptor)
