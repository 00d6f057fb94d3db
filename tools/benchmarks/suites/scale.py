"""Measure the loader's cost per sample by data set size, with a generated index and sparse shard files.

Each size runs in a separate process, since memory is measured per process. The same number of samples is timed for
every size in SIZES. These samples are read into the page cache first, so that disk reads are not timed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from configs.schema import DataConfig
from pipelines import build_train_loader, order
from pipelines.augment import geometry
from pipelines.interfaces import Position
from pipelines.open import open_split
from pipelines.storage import tar_format
from pipelines.storage.dataset import FORMAT, VERSION
from pipelines.storage.index import INDEX_COLUMNS, sample_stride
from tools.benchmarks.engine import ours
from tools.benchmarks.engine.interleaved import run_in_subprocess
from tools.benchmarks.engine.measured_tables import RowTable
from tools.benchmarks.engine.results import Row, new_row, rounded
from tools.benchmarks.engine.roofline import Limits

SIZES = (10_000, 100_000, 1_500_000)
SIDE = 96  # pixels, as in MediumImageNet
CLASSES = 200
SHARD_BYTES = 512 * 2**20
BATCH_SIZE = 512
BATCHES = 19  # maximum number of batches per pass, of which the first is not timed; 10,000 samples have 19
PREFETCHED_BATCHES = 20  # maximum number of batches that the loader prepares beyond those


def scale_table(scratch: Path, seconds: float, sizes: tuple[int, ...] = SIZES, side: int = SIDE) -> RowTable:
    """Return a table of the loader on data sets of several sizes, with a row per size.

    Rows contain µs per sample, memory, and the time in seconds from opening the data set to the first batch.
    """

    def rows(limits: Limits) -> Iterator[Row]:
        for samples in sizes:
            name = f"{samples:,} samples"
            try:
                figures = run_in_subprocess(measure_loader, scratch, samples, side, seconds)
                yield new_row(name, samples=samples, **figures)
            except RuntimeError as error:
                yield new_row(name, samples=samples, error=str(error))

    return RowTable(f"Cost per sample by size of the data set, {side}x{side} raw", "scale", None, rows)


def measure_loader(scratch: Path, samples: int, side: int, seconds: float) -> dict[str, float]:
    """Return the costs and the memory of the loader on a data set of `samples` samples."""
    folder = scratch / f"scale-{samples}"
    make_sparse_set(folder, samples, side)
    torch.set_num_threads(1)
    read_into_cache(folder, order.permutation(samples, 0, 0)[: (BATCHES + PREFETCHED_BATCHES) * BATCH_SIZE])
    gc.collect()
    before = private_bytes()
    start = time.perf_counter()
    data = DataConfig(path=str(folder), batch_size=BATCH_SIZE, image_size=side, placement="host", verify="off")
    loader = build_train_loader(data, ours.PLAIN, device="cpu")
    batches = iter(loader)
    next(batches)
    first_batch_s = time.perf_counter() - start
    gc.collect()
    memory = private_bytes() - before
    count = min(BATCHES, len(loader)) - 1

    def take_first() -> None:
        nonlocal batches
        loader.position = Position(0)
        batches = iter(loader)
        next(batches)

    def take_others() -> None:
        for _ in range(count):
            next(batches)

    take_first()
    take_others()  # map the pages
    indices = order.permutation(samples, 0, 0)[:BATCH_SIZE]
    loader_us = _min_us(take_others, seconds, take_first) / (count * BATCH_SIZE)
    order_us = _min_us(lambda: order.permutation(samples, 0, 1), seconds) / samples
    draws_us = _min_us(
        lambda: (geometry.flips(indices, 0, 0, 0.5), geometry.pad_crop_offsets(indices, 0, 0, 4)), seconds
    )
    draws_us /= len(indices)
    figures = {
        "loader_us": loader_us,
        "order_us": order_us,
        "draws_us": draws_us,
        "first_batch_s": first_batch_s,
        "memory_mib": memory / 2**20,
        "memory_bytes_per_sample": memory / samples,
        "total_us": loader_us + order_us + draws_us,
    }
    return {name: rounded(value, 4) for name, value in figures.items()}


def _min_us(work: Callable[[], object], seconds: float, setup: Callable[[], object] = lambda: None) -> float:
    """Time `work`, each time after `setup`, for `seconds`, at least three times. Return the smallest time in µs.

    Noise only ever makes a value larger.
    """
    timer, end = timeit.Timer(work, setup), time.perf_counter() + seconds
    times: list[float] = []
    while time.perf_counter() < end or len(times) < 3:
        times.append(timer.timeit(1))
    return 1e6 * min(times)


def private_bytes() -> int:
    """Return the resident memory of this process in bytes.

    Mapped files are excluded, since all ranks on a machine share their pages.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024


def read_into_cache(folder: Path, samples: np.ndarray) -> None:
    """Read the samples with indices `samples` into the page cache.

    Without MADV_RANDOM, the kernel would load megabytes around each sample.
    """
    split = open_split(folder, "train", verify="off")
    split.advise(np.arange(len(split.files)), mmap.MADV_RANDOM)
    for sample in samples.tolist():
        split.image_bytes(sample).max()


def make_sparse_set(folder: Path, samples: int, side: int) -> None:
    """Write a data set of black images, with a real index and sparse shard files."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (side, side, 3)
    size = len(tar_format.npy_header(shape)) + side * side * 3
    stride = sample_stride(size, True, CLASSES)
    rows = np.arange(samples)
    shard, place = np.divmod(rows, SHARD_BYTES // stride)
    offset = place * stride + tar_format.BLOCK
    columns = {"shard": shard, "offset": offset, "size": size, "label": rows % CLASSES, "height": side, "width": side}
    index = folder / "train.index.npz"
    arrays = {name: np.full(samples, columns[name], dtype) for name, dtype in INDEX_COLUMNS.items()}
    np.savez(index, **arrays)  # type: ignore[arg-type]  # numpy's stubs take them for `allow_pickle`
    shards = []
    for number, count in enumerate(np.bincount(shard).tolist()):
        file = folder / f"scale-{number:06d}.tar"
        length = count * stride + len(tar_format.END_OF_ARCHIVE)
        file.touch()
        os.truncate(file, length)
        shards.append({"file": file.name, "samples": count, "bytes": length, "sha256": "0" * 64})
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    split = {
        "samples": samples,
        "labelled": True,
        "source_rows": samples,
        "quarantined": [],
        "index": {"file": index.name, "bytes": index.stat().st_size, "sha256": digest},
        "shards": shards,
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": "scale",
        "classes": [str(number) for number in range(CLASSES)],
        "encoding": "npy",
        "image_shape": shape,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "splits": {"train": split},
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
