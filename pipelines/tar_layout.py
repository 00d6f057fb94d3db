"""Bytes of a shard: USTAR headers, `.npy` headers, and DALI's index lines. Knows no data set and no image codec.

A shard follows the WebDataset convention: members KEY.npy or KEY.jpg, then KEY.cls where the split has labels. Keys
are fixed-width decimal numbers, so no name ever holds a second dot, a space or needs a long-name extension.
"""

from __future__ import annotations

import io

import numpy as np

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
KEY_DIGITS = 9
INDEX_VERSION = "v1.2"


def padded(size: int) -> int:
    """Bytes that a member's content of `size` bytes takes in a tar: rounded up to whole 512-byte blocks."""
    return -(-size // BLOCK) * BLOCK


def key_of(row: int) -> str:
    """The key of a sample: its row in the source, so that an order of predictions can be told from the shard alone."""
    return f"{row:0{KEY_DIGITS}d}"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a C-contiguous uint8 `.npy` file (format 1.0, always 128 bytes for an image)."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


class MemberWriter:
    """Makes the tar bytes of members that differ in key and content only (one per extension and content size)."""

    def __init__(self, extension: str, size: int) -> None:
        header = bytearray(BLOCK)
        name = f"{'0' * KEY_DIGITS}.{extension}".encode()
        header[: len(name)] = name
        header[100:108] = b"0000644\0"
        header[108:116] = header[116:124] = b"0000000\0"
        header[124:136] = f"{size:011o}\0".encode()
        header[136:148] = b"00000000000\0"  # modification time: none, so that equal content gives equal files
        header[148:156] = b" " * 8  # the checksum counts as blanks in its own sum
        header[156:157] = b"0"
        header[257:265] = b"ustar\x0000"
        self._header = header
        self._checksum = sum(header) - KEY_DIGITS * ord("0")
        self._padding = bytes(padded(size) - size)

    def member(self, key: str, *content: bytes | memoryview) -> list[bytes | memoryview]:
        """The pieces to write: header, content (`size` bytes in all), padding."""
        name = key.encode()
        header = self._header.copy()
        header[:KEY_DIGITS] = name
        header[148:156] = f"{self._checksum + sum(name):06o}\0 ".encode()
        return [bytes(header), *content, self._padding]


def label_text(label: int, classes: int) -> bytes:
    """Content of a `.cls` member: fixed-width ASCII, which the webdataset library decodes as an int."""
    return f"{label:0{len(str(max(classes - 1, 0)))}d}".encode()


def index_line(key: str, extension: str, offset: int, size: int, label_size: int | None) -> str:
    """One sample's line of DALI's index: `EXT OFFSET SIZE NAME` per component, offsets of contents in bytes."""
    line = f"{extension} {offset} {size} {key}.{extension}"
    if label_size is not None:
        line += f" cls {offset + padded(size) + BLOCK} {label_size} {key}.cls"
    return line + "\n"
