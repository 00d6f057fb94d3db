"""Read members of a .tar.gz by their bare names, sequentially.

Nothing is unpacked to disk, and paths, links and devices in the archive are ignored. Python's tarfile is not
used, since it treats a damaged header as the end of the archive, and reads an extended header into memory regardless of
the size that it claims. Before Python 3.10.15, 3.11.10 and 3.12.6, it also takes quadratic time for extended headers
(CVE-2024-6232).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from configs.utils.errors import UserError

BLOCK = 512
CHUNK_BYTES = 1 << 20
PLAIN_FILE = (b"0", b"\0")


def read_members(
    path: Path, names: tuple[str, ...], check_size: Callable[[int, str], None], max_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """Yield the bare name and content of each regular file whose bare name is in `names`.

    The archive is read to its end, where gzip verifies the checksum.

    Args:
        path: Path of the archive.
        names: Bare names (without folders) of the members to read.
        check_size: Called with the size in bytes and the name of each member before it is read. The name includes the
            path of the archive. Raises UserError if the size is too large.
        max_bytes: Maximum size of the uncompressed archive in bytes.

    Raises:
        UserError: The archive is unreadable, incomplete, damaged or larger than `max_bytes`, or `check_size` raises.
    """
    try:
        with gzip.open(path) as opened:
            stream = _Bounded(opened, max_bytes)
            while (header := stream.read(BLOCK)) and any(header):
                name, size, kind = _parse(header)
                bare = PurePosixPath(name).name
                if kind in PLAIN_FILE and bare in names:
                    check_size(size, f"{path}: {bare}")
                    yield bare, stream.read_all(size)
                    size = -size % BLOCK  # padding of the member's last block
                else:
                    size += -size % BLOCK
                stream.skip(size)
            while stream.read(CHUNK_BYTES):
                pass
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path} is not a complete .tar.gz archive ({error}); fetch it again, for instance with --download"
        ) from None


class _Bounded:
    """Stream that raises ValueError once more than `max_bytes` have been read."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, max_bytes: int) -> None:
        self._stream, self._max_bytes, self._left = stream, max_bytes, max_bytes

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it inflates to more than {self._max_bytes:,} bytes")
        return content

    def read_all(self, size: int) -> bytes:
        content = self.read(size)
        if len(content) < size:
            raise EOFError("it ends within a file")
        return content

    def skip(self, size: int) -> None:
        while size > 0:
            content = self.read(min(size, CHUNK_BYTES))
            if not content:
                raise EOFError("it ends within a file")
            size -= len(content)


def _parse(header: bytes) -> tuple[str, int, bytes]:
    """Return the name, size in bytes and type of the member that a tar header describes.

    Raises EOFError if the header is incomplete, and ValueError if it is damaged.
    """
    if len(header) < BLOCK:
        raise EOFError("it ends within a header")
    if sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") != _octal(header[148:156]):
        raise ValueError("a header has a wrong checksum")
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "replace"), _octal(header[124:136]), header[156:157]


def _octal(field: bytes) -> int:
    text = field.split(b"\0", 1)[0].strip()
    if text.strip(b"01234567"):
        raise ValueError("a field of a header is not a number")
    return int(text or b"0", 8)
