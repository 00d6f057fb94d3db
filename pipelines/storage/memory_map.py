"""Map the shards of a split into one address range. Reading a truncated file does not crash the process."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.utils.errors import UserError, readable
from pipelines.storage.dataset import MAX_COUNT
from pipelines.storage.hash_cache import FileStamp

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_PROT_READ = 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000

# Size of a huge page of x86-64, and of ARM64 with pages of 4 KiB. The kernel caches what one write adds to a file in
# blocks of at most this size. A file that was written in smaller pieces is read more slowly, by up to a third.
HUGE_PAGE_BYTES = 2 << 20


class MappedShards(NamedTuple):
    """Files that are mapped one after another, in slots of equal size."""

    content: np.ndarray  # uint8 [files * slot]
    files: list[np.ndarray]  # views of `content`: the bytes of each file
    fault_address: np.ndarray  # int64 [files]: address of a failed read in each file, or 0 (see `sigbus`)
    stamps: list[FileStamp | None]  # stamp of each file when it was mapped; None: not mapped, reads as zeros


def map_files(files: tuple[Path, ...], sizes: list[int], slot: int) -> MappedShards:
    """Map files read-only at offsets 0, slot, 2 * slot … of one reserved address range.

    With a single range, one gather can read a batch from any number of shards. Python's mmap module cannot choose
    addresses, so this function calls the C library. The range starts at a huge page, so that files in slots of whole
    huge pages are mapped with them, where the file system supports this (ext4 since Linux 6.16).

    Args:
        files: Files to map.
        sizes: Size of each file in bytes.
        slot: Distance between the starts of consecutive files in bytes, a multiple of the page size.

    Raises:
        UserError: A file cannot be read or mapped, or the range would exceed MAX_COUNT.
        ValueError: Too many files are mapped (see `sigbus.register`).
        OSError: The SIGBUS handler cannot be installed.
    """
    mapped = reserve(files[0].parent, sizes, slot)
    for number, file in enumerate(files):
        mapped.stamps[number] = map_file(mapped, number, file)
    return mapped


def reserve(folder: Path, sizes: list[int], slot: int) -> MappedShards:
    """Reserve the address range of `map_files`, without mapping any file.

    Args:
        folder: Folder of the files, for messages.
        sizes, slot: See `map_files`.

    Raises:
        UserError, ValueError, OSError: See `map_files`.
    """
    from pipelines.storage import sigbus  # deferred: compiles the handler with Numba

    total = slot * len(sizes)
    if total > MAX_COUNT:
        raise UserError(f"cannot map {total:,} bytes of {folder}; at most {MAX_COUNT:,} can be addressed")

    # The gaps between files read as zeros, so that printing the whole array does not crash.
    reserved = _map(folder, None, total + HUGE_PAGE_BYTES, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    base = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    buffer = (ctypes.c_ubyte * total).from_address(base)
    starts = base + np.arange(len(sizes), dtype=np.int64) * slot
    ends = starts - -np.array(sizes, np.int64) // mmap.PAGESIZE * mmap.PAGESIZE
    guarded, fault_address = sigbus.register(np.stack([starts, ends], axis=1))

    def unmap() -> None:
        sigbus.unregister(guarded)
        _libc.munmap(reserved, total + HUGE_PAGE_BYTES)

    # All views of `content` keep `buffer` alive, so the files are unmapped once nothing can read them. There is
    # no other owner: views are passed on. At exit, the files stay mapped, since a loader thread may still read.
    weakref.finalize(buffer, unmap).atexit = False
    content = np.frombuffer(memoryview(buffer), np.uint8)
    views = [content[number * slot : number * slot + size] for number, size in enumerate(sizes)]
    return MappedShards(content, views, fault_address, [None] * len(sizes))


def map_file(mapped: MappedShards, number: int, file: Path) -> FileStamp:
    """Map a file in the place of file `number`, and return its stamp.

    Raises:
        UserError: The file cannot be read or mapped.
    """
    view = mapped.files[number]
    with readable(file), file.open("rb") as opened:
        _map(file.parent, view.ctypes.data, view.size, _MAP_SHARED | _MAP_FIXED, opened.fileno())
        return FileStamp.from_stat(os.fstat(opened.fileno()))


def unmap_file(mapped: MappedShards, number: int, folder: Path) -> None:
    """Unmap file `number`, whose place then reads as zeros, so that its disk space is freed if the file was removed."""
    view = mapped.files[number]
    _map(folder, view.ctypes.data, view.size, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1)


def _map(folder: Path, address: int | None, size: int, flags: int, descriptor: int) -> int:
    """Call mmap(2) for reading. `folder` is named in the error message."""
    result: int | None = _libc.mmap(address, size, _PROT_READ, flags, descriptor, 0)
    if result is None or result == ctypes.c_void_p(-1).value:
        raise UserError(f"cannot map {size:,} bytes of {folder}: {os.strerror(ctypes.get_errno())}")
    return result


def advise(content: np.ndarray, start: int, size: int, advice: int) -> None:
    """Call madvise(2) on `size` bytes of mapped content, starting at `start`. Failures are ignored.

    `advice` is a constant such as mmap.MADV_WILLNEED.
    """
    _libc.madvise(content.ctypes.data + start, size, advice)
