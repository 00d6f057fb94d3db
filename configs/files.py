"""Opening files that may be a stranger's: no pipe or device is waited for, and nothing larger than expected is read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_RECORD_BYTES = 2**26  # of what a run writes of itself as text; a line of metrics has some 500


def open_plain(path: Path) -> BinaryIO:
    """For reading. Raises OSError, also for what is no file: a folder, a pipe, a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number, reason = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "it is no file")
        raise OSError(number, reason, str(path))
    return os.fdopen(descriptor, "rb")


def read_record(path: Path, errors: str = "strict") -> str:
    """The text of a file that a run wrote of itself; errors: of `bytes.decode`. Raises OSError for what is no file or
    too large, ValueError for what is no text."""
    with open_plain(path) as file:
        content = file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_RECORD_BYTES:,} bytes", str(path))
    return content.decode(errors=errors)
