"""Byte format of a shard: USTAR headers, `.npy` headers and the lines of DALI's index.

A shard follows the WebDataset convention. Each sample is a member KEY.npy or KEY.jpg, followed by a member KEY.cls if
the split has labels. Keys are decimal numbers of fixed width, so member names contain a single dot and no spaces, and
need no long-name extension.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
KEY_DIGITS = 9
INDEX_VERSION = "v1.2"
CHUNK_SAMPLES = 4096  # samples whose headers are in memory at once, 2 MiB
Size = TypeVar("Size", int, np.ndarray)


def padded(size: Size) -> Size:
    """Return the space that `size` bytes of content occupy in a tar: a multiple of 512 bytes."""
    return -(-size // BLOCK) * BLOCK


def sample_bytes(size: Size, label_digits: int | None) -> Size:
    """Return the space that the members of a sample with an image of `size` bytes occupy in a shard.

    `label_digits` is the size of the label, or None if the sample has no label member.
    """
    image = BLOCK + padded(size)
    return image if label_digits is None else image + BLOCK + padded(label_digits)


def count_label_digits(classes: int) -> int:
    """Return the size of a label's `.cls` member: a decimal number of fixed width, which webdataset can parse."""
    return len(str(max(classes - 1, 0)))


def digits(numbers: np.ndarray, count: int, base: int = 10) -> np.ndarray:
    """Return the digits of numbers with leading zeros, in ASCII: uint8 [N, count]."""
    return (numbers[:, None] // base ** np.arange(count - 1, -1, -1) % base + ord("0")).astype(np.uint8)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a C-contiguous uint8 `.npy` file in format 1.0. For images, it always has 128 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


def headers(keys: np.ndarray, extension: str, sizes: np.ndarray) -> np.ndarray:
    """Return the tar headers of many members: uint8 [N, BLOCK].

    Args:
        keys: Keys of the members in ASCII, uint8 [N, KEY_DIGITS].
        extension: Extension of the members' names, without a dot.
        sizes: Sizes of the members' contents in bytes, int64 [N].
    """
    header = bytearray(BLOCK)
    header[KEY_DIGITS : KEY_DIGITS + 1 + len(extension)] = f".{extension}".encode()
    header[100:124] = b"0000644\0" + b"0000000\0" * 2  # mode, owner and group
    header[136:148] = b"00000000000\0"  # no modification time, so that equal contents give equal files
    header[148:156] = b" " * 8  # the checksum is the sum of the bytes with a blank checksum
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    result = np.tile(np.frombuffer(header, np.uint8), (len(keys), 1))
    result[:, :KEY_DIGITS] = keys
    result[:, 124:135] = digits(sizes, 11, base=8)
    result[:, 148:154] = digits(result.sum(axis=1, dtype=np.int64), 6, base=8)
    result[:, 154] = 0
    return result


def shard_pieces(
    rows: np.ndarray, extension: str, head: bytes, payloads: Sequence[memoryview], labels: np.ndarray | None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a shard in pieces.

    Args:
        rows: Source row of each sample, int64 [N].
        extension: Extension of the image members, without a dot.
        head: Bytes before the payload of each image, such as a .npy header.
        payloads: Rest of each image.
        labels: Digits of each label in ASCII, uint8 [N, digits], or None for a split without labels.
    """
    for start in range(0, len(rows), CHUNK_SAMPLES):
        chunk = slice(start, start + CHUNK_SAMPLES)
        keys = digits(rows[chunk], KEY_DIGITS)
        sizes = np.array([len(head) + len(payload) for payload in payloads[chunk]])
        image_headers, label_members = headers(keys, extension, sizes), None
        if labels is not None:
            width = labels.shape[1]
            content = np.pad(labels[chunk], ((0, 0), (0, padded(width) - width)))
            label_members = np.hstack([headers(keys, "cls", np.full(len(keys), width)), content])
        for i, (payload, size) in enumerate(zip(payloads[chunk], sizes.tolist(), strict=True)):
            yield from (image_headers[i].data, head, payload, bytes(padded(size) - size))
            if label_members is not None:
                yield label_members[i].data
    yield END_OF_ARCHIVE


def index_text(
    rows: np.ndarray, extension: str, offsets: np.ndarray, sizes: np.ndarray, label_digits: int | None
) -> str:
    """Return DALI's index of a shard: a line for each sample, with `EXT OFFSET SIZE NAME` for each member.

    Args:
        rows: Source row of each sample, int64 [N].
        extension: Extension of the image members, without a dot.
        offsets: Offset of each image in the tar in bytes, int64 [N].
        sizes: Size of each image in bytes, int64 [N].
        label_digits: Size of a label, or None if there are no label members.
    """
    lines = [f"{INDEX_VERSION} {len(rows)}"]
    for row, offset, size in zip(rows.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
        key = f"{row:0{KEY_DIGITS}d}"
        line = f"{extension} {offset} {size} {key}.{extension}"
        if label_digits is not None:
            line += f" cls {offset + padded(size) + BLOCK} {label_digits} {key}.cls"
        lines.append(line)
    return "\n".join([*lines, ""])
