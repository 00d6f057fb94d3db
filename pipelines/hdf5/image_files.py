"""Read image files stored in an HDF5 file as variable-length bytes.

HDF5's library is used for the references only. The bytes themselves are in global heap collections, which are parsed
here: the library can run forever on a damaged collection, and this is faster. The format is HDF5's file format
specification, sections III.E (global heap) and VIII.A (references).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import open_plain

MAX_COLLECTION_BYTES = 256 << 20  # of a file in the heap, or of several small ones
HEADER_BYTES = 16  # of a collection, and of an object in it
REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])


class Hdf5Files:
    """One split of image files, with the position of each row in the HDF5 file."""

    def __init__(self, path: Path, images: h5py.Dataset, labels: np.ndarray | None) -> None:
        self._path, self._key = path, images.name.lstrip("/")
        self._references = _load_references(path, images, self._key)
        self.labels = labels
        self.bytes_per_row = max(int(self._references["length"].mean()), 1)

    def __len__(self) -> int:
        return len(self._references)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the bytes of the files from `start` up to `stop` (exclusive).

        Raises:
            UserError: The HDF5 file cannot be read or is damaged.
        """
        row = start
        try:
            with open_plain(self._path) as file:
                address, objects = -1, dict[int, memoryview]()
                for row in range(start, stop):
                    length, at, index = self._references[row].tolist()
                    if length and at != address:
                        address, objects = at, _read_collection(file.fileno(), at)
                    if length and (index not in objects or len(objects[index]) < length):
                        raise ValueError(f"the heap at {at} lacks its object {index}")
                    yield bytes(objects[index][:length]) if length else b""
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"cannot read {self._path}: {self._key}[{row}] ({error}); the file is damaged: fetch it again"
            ) from None

    def describe(self, row: int) -> str:
        return f"{self._key}[{row}]"


def _read_collection(descriptor: int, address: int) -> dict[int, memoryview]:
    """Return the objects of the global heap collection at `address`, by index. Raises ValueError if it is damaged."""
    header = os.pread(descriptor, HEADER_BYTES, address)
    size = int.from_bytes(header[8:], "little")
    if header[:5] != b"GCOL\1" or not HEADER_BYTES <= size <= MAX_COLLECTION_BYTES:
        raise ValueError(f"no heap of up to {MAX_COLLECTION_BYTES >> 20} MiB at {address}")
    content = memoryview(os.pread(descriptor, size, address))
    objects: dict[int, memoryview] = {}
    place = HEADER_BYTES
    while place + HEADER_BYTES <= len(content):
        index = int.from_bytes(content[place : place + 2], "little")
        start = place + HEADER_BYTES
        end = start + int.from_bytes(content[place + 8 : start], "little")
        if index == 0:  # the rest is free
            break
        if end > len(content):
            raise ValueError(f"the heap at {address} is incomplete")
        objects[index] = content[start:end]
        place = end + (start - end) % 8
    return objects


def _load_references(path: Path, images: h5py.Dataset, key: str) -> np.ndarray:
    """Return the references to the files of each row, `REFERENCE` [rows].

    Raises:
        UserError: The references are stored in a way that is not supported.
        OSError, ValueError: They cannot be read.
    """
    plan = images.file.id.get_create_plist()
    is_known = plan.get_sizes() == (8, 8) and plan.get_userblock() == 0
    if is_known and images.chunks:
        stored = _read_chunks(images)
    elif is_known and (offset := images.id.get_offset()) is not None:
        with open_plain(path) as file:
            stored = os.pread(file.fileno(), len(images) * REFERENCE.itemsize, offset)
    else:
        stored = None
    if stored is None:
        raise UserError(
            f"{path}: {key} is stored in a way that is not read for image files (compact, with a user block, other "
            "address sizes or LZF); copy it with `h5repack -l CONTI`"
        )
    return np.frombuffer(stored, REFERENCE, len(images))


def _read_chunks(images: h5py.Dataset) -> bytes | None:
    """Return the stored references of a chunked data set, or None if a filter is not supported."""
    plan = images.id.get_create_plist()
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    chunk_rows, size = images.chunks[0], REFERENCE.itemsize
    stored = bytearray(-(-len(images) // chunk_rows) * chunk_rows * size)
    for number in range(images.id.get_num_chunks()):
        first = images.id.get_chunk_info(number).chunk_offset[0]
        mask, chunk = images.id.read_direct_chunk((first,))
        for place in reversed([place for place in range(len(filters)) if not mask >> place & 1]):
            if filters[place] == h5py.h5z.FILTER_DEFLATE:
                chunk = zlib.decompressobj().decompress(chunk, chunk_rows * size)
            elif filters[place] == h5py.h5z.FILTER_SHUFFLE:
                chunk = np.frombuffer(chunk, np.uint8).reshape(size, -1).T.tobytes()
            else:  # LZF; HDF5 allows no checksums here
                return None
        if len(chunk) != chunk_rows * size:
            raise ValueError(f"a chunk has {len(chunk)} bytes instead of {chunk_rows * size}")
        stored[first * size : first * size + len(chunk)] = chunk
    return bytes(stored)
