"""What the machine can do at most: copies, arithmetic and disk, as streams that take turns like everything else.

Their units are bytes or floating-point operations, so a rate is bytes/s or FLOP/s. A copy of n bytes counts n, though
it reads and writes them: then rate / (bytes of an image) is the images/s at which every image is copied once.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import ModelConfig, TrainConfig
from models import build_from_config
from pipelines.cpu import batch
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement
from tools.benchmarks.engine.results import Row, skipped_row
from tools.common.model_costs import count_costs

MEMORY = "memory copy"
PINNED = "copy from pinned memory to the GPU"
DEVICE_MEMORY = "copy within GPU memory"
ARITHMETIC = "matrix multiplication"
DISK = "disk read"
UNITS = {MEMORY: "GB/s", PINNED: "GB/s", DEVICE_MEMORY: "GB/s", DISK: "GB/s", ARITHMETIC: "TFLOP/s"}
PER_UNIT = {"GB/s": 1e9, "TFLOP/s": 1e12}
Limits = dict[str, float]  # bytes/s, FLOP/s

COPIED_BYTES = 2**28
OUT_OF_CACHE_BYTES = 2**28
MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (2048, torch.float32)}  # side of the square matrices, and their type
DISK_FILE_BYTES = 2**28
DISK_BLOCK_BYTES = 2**24


@contextmanager
def limit_workloads(device: str, scratch: Path) -> Iterator[dict[str, Workload]]:
    """The streams of all limits of this machine; scratch: a folder on the disk that holds the data."""
    workloads = {MEMORY: Workload(batch_copies(COPIED_BYTES, 2, torch.get_num_threads()), COPIED_BYTES)}
    if device == "cuda":
        pinned = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        workloads[PINNED] = Workload(_copies(pinned, torch.empty_like(pinned, device=device)), COPIED_BYTES)
        source = torch.empty(4 * COPIED_BYTES, dtype=torch.uint8, device=device)
        workloads[DEVICE_MEMORY] = Workload(_copies(source, torch.empty_like(source)), source.numel())
    workloads[ARITHMETIC] = _arithmetic(device)
    file = scratch / "disk-read"
    with file.open("wb") as written:
        for _ in range(DISK_FILE_BYTES // DISK_BLOCK_BYTES):
            written.write(os.urandom(DISK_BLOCK_BYTES))  # zeros might be compressed, or not stored at all
        os.fsync(written.fileno())
    workloads[DISK] = Workload(_disk_reads(file), DISK_BLOCK_BYTES)
    yield workloads
    file.unlink()


@contextmanager
def arithmetic(device: str) -> Iterator[dict[str, Workload]]:
    """That limit alone."""
    yield {ARITHMETIC: _arithmetic(device)}


def _arithmetic(device: str) -> Workload:
    size, dtype = MATMUL[device]
    return Workload(_products(size, dtype, device), 2 * size**3)


@contextmanager
def one_copy(batch_bytes: int, images: int) -> Iterator[dict[str, Workload]]:
    """What handing out a batch of so many bytes costs at the very least: one copy of them from memory."""
    workloads: dict[str, Workload] = {}
    sources = max(2, OUT_OF_CACHE_BYTES // batch_bytes)
    for threads in sorted({1, torch.get_num_threads()}):  # of which one may be faster where the cores are busy
        name = f"{threads} threads" if threads > 1 else "1 thread"
        workloads[name] = Workload(batch_copies(batch_bytes, sources, threads), images)
        workloads[f"{name}, streaming"] = Workload(streaming_copies(batch_bytes, sources, threads), images)
    yield workloads


@contextmanager
def pinned_copy(batch_bytes: int, images: int) -> Iterator[dict[str, Workload]]:
    """Copies of a batch from pinned memory to the GPU, which a loader that reads from the host cannot outrun."""
    pinned = torch.empty(batch_bytes, dtype=torch.uint8, pin_memory=True)
    yield {"": Workload(_copies(pinned, torch.empty_like(pinned, device="cuda")), images)}


def batch_copies(size: int, sources: int, threads: int) -> Iterator[torch.Tensor]:
    """Copies of `size` bytes; many sources lie outside of the processor's cache, as samples at random do."""
    content = [torch.zeros(size, dtype=torch.uint8) for _ in range(sources)]
    targets = [torch.zeros(size, dtype=torch.uint8) for _ in range(min(4, sources))]
    for number in itertools.count():
        torch.set_num_threads(threads)
        yield targets[number % len(targets)].copy_(content[number % sources])


def streaming_copies(size: int, sources: int, threads: int) -> Iterator[None]:
    """The same past the processor's cache, which spares reading what is overwritten; front to back, unlike samples."""
    page = mmap.PAGESIZE
    pages = -(-size // page)
    content = np.zeros(sources * pages * page, np.uint8)
    targets = [torch.zeros((pages, page), dtype=torch.uint8).numpy() for _ in range(min(4, sources))]
    bounds = np.linspace(0, pages, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        for number in itertools.count():
            begin, target = number % sources * pages * page, targets[number % len(targets)]
            copies = [
                pool.submit(batch.copy, content, begin + np.arange(first, last) * page, target[first:last])
                for first, last in itertools.pairwise(bounds)
            ]
            wait(copies)
            yield


def _copies(source: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield target.copy_(source, non_blocking=True)


def _products(size: int, dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """Of random numbers: zeros would need less power, and so show a clock that no training reaches."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    while True:
        yield torch.matmul(left, right, out=result)


def _disk_reads(file: Path) -> Iterator[int]:
    """Blocks from front to back past the page cache; where the file system cannot, after dropping them from it."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
    buffer = mmap.mmap(-1, DISK_BLOCK_BYTES)  # aligned to pages, as O_DIRECT wants
    try:
        for number in itertools.count():
            start = number * DISK_BLOCK_BYTES % DISK_FILE_BYTES
            os.posix_fadvise(descriptor, start, DISK_BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
            yield os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)


def limits_from(measurements: list[Measurement]) -> Limits:
    """The medians by name; a limit that could not be measured is left out."""
    return {
        measurement.workload: measurement.rate
        for measurement in measurements
        if measurement.error is None and measurement.rates
    }


def training_flops(model: ModelConfig, classes: int, image_size: int) -> float:
    """Floating-point operations of forward and backward per image, 2 per multiply-add."""
    network = build_from_config(model, classes, image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    shape: dict[str, Any] = {"batch_size": 2, "image_size": image_size, "device": torch.device("cpu"), "amp": None}
    return count_costs(network, TrainConfig(), **shape).training_flops / 2  # batch norm refuses one value


def loading_bounds(found: Limits, *, placement: str, device: str, stored_bytes: float, output_bytes: float) -> Limits:
    """images/s at which each limit would be reached by a loader: bytes of one image, as stored and as handed out."""
    if device != "cuda":
        return {MEMORY: found.get(MEMORY, 0) / output_bytes}
    if placement == "device":
        return {DEVICE_MEMORY: found.get(DEVICE_MEMORY, 0) / output_bytes}
    return {PINNED: found.get(PINNED, 0) / stored_bytes, MEMORY: found.get(MEMORY, 0) / stored_bytes}


def disk_bound(found: Limits, stored_bytes: float, split_bytes: float) -> Limits:
    """Of a split that is larger than the memory which could cache it; else nothing, since it is read once only."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {DISK: found.get(DISK, 0) / stored_bytes} if split_bytes > memory else {}


def limit_rows(measurements: list[Measurement]) -> list[Row]:
    """The limits themselves as rows, in the units that people know."""
    rows = []
    for measurement in measurements:
        unit = UNITS.get(measurement.workload, "")
        name, error = measurement.workload or measurement.candidate, measurement.error
        each: Row = skipped_row(name) if error == OUT_OF_TIME else {"name": name, "ours": False, "error": error}
        if error is None and measurement.rates:
            each["value"] = float(f"{measurement.rate / PER_UNIT[unit]:.4g}")
        rows.append(each | {"ours": False, "unit": unit})
    return rows


def limits_in(rows: list[Row]) -> Limits:
    """The limits that `limit_rows` wrote down."""
    return {row["name"]: row["value"] * PER_UNIT[row["unit"]] for row in rows if "value" in row}
