"""Exact sums over the pixels of an HDF5 file, for mean and std. They are computed once and kept in the user's cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice

import numpy as np

from configs.utils.console import progress_bar
from pipelines.cpu import planes
from pipelines.hdf5.dataset import Hdf5Dataset
from pipelines.hdf5.file_record import SUMS, FileRecord
from pipelines.hdf5.split import Hdf5Split, map_split
from pipelines.storage.hash_cache import NOTE_BYTES

BLOCK_BYTES = 2**24  # of pixels that a thread reads at once
MAX_THREADS = 8
AHEAD = 4  # blocks per thread that are submitted ahead of the results


def load_channel_sums(dataset: Hdf5Dataset) -> np.ndarray:
    """Return the per-channel sums of the pixels of train and of their squares, int64 [2, 3].

    One process per machine computes them while other processes wait for the result.

    Raises:
        UserError: The file cannot be read, or is being changed.
    """
    contents = dataset.contents
    record, stamp = FileRecord(contents.path), contents.stamp
    if (found := record.find(SUMS, stamp)) is None:
        with record.exclusive() as heartbeat:
            if (found := record.find(SUMS, stamp)) is None:  # another process may have computed them meanwhile
                split = map_split(dataset, "train")
                found = " ".join(map(str, channel_sums(split, heartbeat).reshape(-1).tolist()))
                split.check_unchanged()
                record.put(SUMS, stamp, found)
    return np.array(found.split(), np.int64).reshape(2, 3)


def channel_sums(split: Hdf5Split, heartbeat: Callable[[], None]) -> np.ndarray:
    """Read all pixels of a split in several threads and return their sums, int64 [2, 3]."""
    total = np.zeros((2, 3), np.int64)
    for pixels in map_blocks(split, f"mean and std of {split.name}", _sums, heartbeat):
        total += pixels
    return total


def map_blocks(
    split: Hdf5Split, title: str, function: Callable[[np.ndarray], np.ndarray], heartbeat: Callable[[], None]
) -> Iterator[np.ndarray]:
    """Yield `function(images)` for all images of a split in blocks, uint8 [B, H, W, 3], in the order of completion.

    The file is read from front to back. Damage raises UserError.
    """
    in_order = split.subset(np.argsort(split.rows))
    shape = split.storage.image_shape
    step = max(1, BLOCK_BYTES // int(np.prod(shape)))
    blocks = iter(range(0, len(split), step))
    size = len(split) * split.storage.row_bytes
    if size >= NOTE_BYTES and not sys.stderr.isatty():  # without a progress bar, announce what takes minutes
        print(f"{title}: reading {size / 2**30:,.0f} GiB once", file=sys.stderr)

    def work(start: int) -> tuple[int, np.ndarray]:
        samples = np.arange(start, min(start + step, len(in_order)))
        images = np.empty((len(samples), *shape), np.uint8)
        in_order.read_pixels(samples, images)
        in_order.monitor.poll()
        return len(samples), function(images)

    threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))
    bar = progress_bar(total=len(split), desc=title, unit="images", delay=1)
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="sums") as pool:
        waiting = {pool.submit(work, start) for start in islice(blocks, AHEAD * threads)}
        try:
            while waiting:
                done = next(as_completed(waiting))
                waiting.remove(done)
                waiting |= {pool.submit(work, start) for start in islice(blocks, 1)}
                heartbeat()
                count, result = done.result()
                bar.update(count)
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def _sums(images: np.ndarray) -> np.ndarray:
    sums = np.zeros((2, 3), np.int64)
    planes.add_channel_sums(images.reshape(-1, 3), sums)
    return sums
