"""Paths as users write them, and opening files of unknown origin.

No pipe or device is waited for, and nothing larger than expected is read.
"""

from __future__ import annotations

import errno
import os
import stat
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
