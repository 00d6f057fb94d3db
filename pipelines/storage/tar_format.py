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


def _header(extension: str, size: int) -> bytearray:
    """Header of a member whose key is all zeros; the checksum counts as blanks, as it does in its own sum."""
    header = bytearray(BLOCK)
    name = f"{'0' * KEY_DIGITS}.{extension}".encode()
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = f"{size:011o}\0".encode()
    header[136:148] = b"00000000000\0"  # modification time: none, so that equal content gives equal files
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return header


def headers(keys: np.ndarray, extension: str, sizes: np.ndarray) -> np.ndarray:
    """The headers of many members at once: uint8 [N, BLOCK].

    keys: uint8 [N, KEY_DIGITS], ASCII; sizes: int64 [N], bytes of the contents.
    """
    empty = np.frombuffer(bytes(_header(extension, 0)), np.uint8)
    result = np.tile(empty, (len(keys), 1))
    result[:, :KEY_DIGITS] = keys
    result[:, 124:135] = _octal(sizes, 11)
    result[:, 148:154] = _octal(result.sum(axis=1, dtype=np.int64), 6)
    result[:, 154] = 0
    return result


def _octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    """ASCII, uint8 [N, digits], as `f"{number:0{digits}o}"` writes it."""
    return ((numbers[:, None] >> 3 * np.arange(digits - 1, -1, -1)) & 7).astype(np.uint8) + np.uint8(ord("0"))


class MemberWriter:
    """Makes the tar bytes of members that differ in key and content only (one per extension and content size)."""

    def __init__(self, extension: str, size: int) -> None:
        self._header = _header(extension, size)
        self._checksum = sum(self._header) - KEY_DIGITS * ord("0")
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
