"""Byte format of a shard: USTAR headers, `.npy` headers and the lines of DALI's index.

A shard follows the WebDataset convention. Each sample is a member KEY.npy or KEY.jpg, followed by a member KEY.cls if
the split has labels. Keys are decimal numbers of fixed width, so member names contain a single dot and no spaces, and
need no long-name extension.
"""

from __future__ import annotations

import io

import numpy as np

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
KEY_DIGITS = 9
INDEX_VERSION = "v1.2"


def padded(size: int) -> int:
    """Return the space that `size` bytes of content occupy in a tar: a multiple of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def key_of(row: int) -> str:
    """Return the key of a sample: its source row with leading zeros. Predictions are ordered by key."""
    return f"{row:0{KEY_DIGITS}d}"


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a C-contiguous uint8 `.npy` file in format 1.0. For images, it always has 128 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


def _header(extension: str, size: int) -> bytearray:
    """Return the header of a member of `size` bytes, with a key of zeros and a blank checksum.

    The checksum of a header is defined as the sum of its bytes with a blank checksum field.
    """
    header = bytearray(BLOCK)
    name = f"{'0' * KEY_DIGITS}.{extension}".encode()
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[124:136] = f"{size:011o}\0".encode()
    header[136:148] = b"00000000000\0"  # no modification time, so that equal contents give equal files
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return header


def headers(keys: np.ndarray, extension: str, sizes: np.ndarray) -> np.ndarray:
    """Return the tar headers of many members: uint8 [N, BLOCK].

    Args:
        keys: Keys of the members in ASCII, uint8 [N, KEY_DIGITS].
        extension: Extension of the members' names, without a dot.
        sizes: Sizes of the members' contents in bytes, int64 [N].
    """
    empty = np.frombuffer(bytes(_header(extension, 0)), np.uint8)
    result = np.tile(empty, (len(keys), 1))
    result[:, :KEY_DIGITS] = keys
    result[:, 124:135] = _octal(sizes, 11)
    result[:, 148:154] = _octal(result.sum(axis=1, dtype=np.int64), 6)
    result[:, 154] = 0
    return result


def _octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    """Format each number like `f"{number:0{digits}o}"`, in ASCII: uint8 [N, digits]."""
    return ((numbers[:, None] >> 3 * np.arange(digits - 1, -1, -1)) & 7).astype(np.uint8) + np.uint8(ord("0"))


class MemberWriter:
    """Formatter of tar members that have the same extension and content size (`size`, in bytes)."""

    def __init__(self, extension: str, size: int) -> None:
        self._header = _header(extension, size)
        self._checksum = sum(self._header) - KEY_DIGITS * ord("0")
        self._padding = bytes(padded(size) - size)

    def member(self, key: str, *content: bytes | memoryview) -> list[bytes | memoryview]:
        """Return the pieces of a member to write in order: header, content and padding.

        The pieces of `content` must have `size` bytes in total.
        """
        name = key.encode()
        header = self._header.copy()
        header[:KEY_DIGITS] = name
        header[148:156] = f"{self._checksum + sum(name):06o}\0 ".encode()
        return [bytes(header), *content, self._padding]


def label_text(label: int, classes: int) -> bytes:
    """Return the content of a label's `.cls` member: an ASCII integer of fixed width that webdataset can parse."""
    return f"{label:0{len(str(max(classes - 1, 0)))}d}".encode()


def index_line(key: str, extension: str, offset: int, size: int, label_size: int | None) -> str:
    """Return a sample's line of DALI's index, with `EXT OFFSET SIZE NAME` for each member.

    Args:
        key: Key of the sample.
        extension: Extension of the image member, without a dot.
        offset: Offset of the image in the tar, in bytes.
        size: Size of the image in bytes.
        label_size: Size of the label in bytes, or None if the sample has no label member.
    """
    line = f"{extension} {offset} {size} {key}.{extension}"
    if label_size is not None:
        line += f" cls {offset + padded(size) + BLOCK} {label_size} {key}.cls"
    return line + "\n"
