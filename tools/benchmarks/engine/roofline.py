"""Machine limits (copies, arithmetic, disk) as workloads, and the bounds that follow from them.

Rates are in bytes/s or FLOP/s. A copy of n bytes counts as n bytes, although it reads n and writes n. Dividing
the rate by the bytes per image then gives the images/s if every image is copied once.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from configs.schema import ModelConfig, TrainConfig
from models import build_from_config
from pipelines.cpu import batch
from tools.benchmarks.engine.candidate import Workload
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement
from tools.benchmarks.engine.results import Row, new_row, rounded
from tools.common.model_costs import count_costs

MEMORY = "memory copy"
PINNED = "copy from pinned memory to the GPU"
DEVICE_MEMORY = "copy within GPU memory"
ARITHMETIC = "matrix multiplication"
DISK = "disk read"
UNITS = {MEMORY: "GB/s", PINNED: "GB/s", DEVICE_MEMORY: "GB/s", DISK: "GB/s", ARITHMETIC: "TFLOP/s"}
UNIT_SIZES = {"GB/s": 1e9, "TFLOP/s": 1e12}
Limits = dict[str, float]  # bytes/s or FLOP/s by name

COPIED_BYTES = 2**28
OUT_OF_CACHE_BYTES = 2**28
MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (2048, torch.float32)}  # rows and columns of the matrices, dtype
DISK_FILE_BYTES = 2**28
DISK_BLOCK_BYTES = 2**24


@contextmanager
def limit_workloads(device: str, scratch: Path) -> Iterator[dict[str, Workload]]:
    """Build the workloads that measure the machine limits. `scratch` is a folder on the disk to measure."""
    workloads = {MEMORY: Workload(batch_copies(COPIED_BYTES, 2, torch.get_num_threads()), COPIED_BYTES)}
    if device == "cuda":
        pinned = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        workloads[PINNED] = Workload(_copies(pinned, torch.empty_like(pinned, device=device)), COPIED_BYTES)
        source = torch.empty(4 * COPIED_BYTES, dtype=torch.uint8, device=device)
        workloads[DEVICE_MEMORY] = Workload(_copies(source, torch.empty_like(source)), source.numel())
    workloads[ARITHMETIC] = _arithmetic(device)
    file = scratch / "disk-read"
    try:
        with file.open("wb") as output:
            for _ in range(DISK_FILE_BYTES // DISK_BLOCK_BYTES):
                output.write(os.urandom(DISK_BLOCK_BYTES))  # a file system may compress zeros or not store them
            os.fsync(output.fileno())
        workloads[DISK] = Workload(_disk_reads(file), DISK_BLOCK_BYTES)
        yield workloads
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def arithmetic(device: str) -> Iterator[dict[str, Workload]]:
    """Build only the matrix multiplication workload."""
    yield {ARITHMETIC: _arithmetic(device)}


def _arithmetic(device: str) -> Workload:
    size, dtype = MATMUL[device]
    return Workload(_matmuls(size, dtype, device), 2 * size**3)


@contextmanager
def one_copy(batch_bytes: int, images: int) -> Iterator[dict[str, Workload]]:
    """Build workloads that copy one batch in memory, on one or all threads, with or without streaming stores.

    One copy is the minimum work of a loader on the CPU.
    """
    workloads: dict[str, Workload] = {}
    sources = max(2, OUT_OF_CACHE_BYTES // batch_bytes)
    for threads in sorted({1, torch.get_num_threads()}):  # one thread may be faster when the cores are busy
        name = f"{threads} threads" if threads > 1 else "1 thread"
        workloads[name] = Workload(batch_copies(batch_bytes, sources, threads), images)
        workloads[f"{name}, streaming"] = Workload(streaming_copies(batch_bytes, sources, threads), images)
    yield workloads


@contextmanager
def pinned_copy(batch_bytes: int, images: int) -> Iterator[dict[str, Workload]]:
    """Build a workload that copies a batch from pinned memory to the GPU.

    This is the minimum work of a loader whose data is on the host.
    """
    pinned = torch.empty(batch_bytes, dtype=torch.uint8, pin_memory=True)
    yield {"": Workload(_copies(pinned, torch.empty_like(pinned, device="cuda")), images)}


def batch_copies(size: int, sources: int, threads: int) -> Iterator[torch.Tensor]:
    """Copy `size` bytes per item, cycling through `sources` source buffers.

    With many sources, reads miss the CPU cache, as with samples in random order.
    """
    content = [torch.zeros(size, dtype=torch.uint8) for _ in range(sources)]
    targets = [torch.zeros(size, dtype=torch.uint8) for _ in range(min(4, sources))]
    for number in itertools.count():
        torch.set_num_threads(threads)
        yield targets[number % len(targets)].copy_(content[number % sources])


def streaming_copies(size: int, sources: int, threads: int) -> Iterator[None]:
    """Copy `size` bytes (rounded up to whole pages) per item with streaming stores.

    Streaming stores bypass the cache and do not read the target first.
    """
    page = mmap.PAGESIZE
    pages = -(-size // page)
    content = np.zeros(sources * pages * page, np.uint8)
    targets = [torch.zeros((pages, page), dtype=torch.uint8).numpy() for _ in range(min(4, sources))]
    bounds = np.linspace(0, pages, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        for number in itertools.count():
            start, target = number % sources * pages * page, targets[number % len(targets)]
            copies = [
                pool.submit(batch.copy, content, start + np.arange(first, last) * page, target[first:last])
                for first, last in itertools.pairwise(bounds)
            ]
            wait(copies)
            yield


def _copies(source: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
    while True:
        yield target.copy_(source, non_blocking=True)


def _matmuls(size: int, dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """Multiply random matrices endlessly.

    With matrices of zeros, a GPU would draw less power and run at a higher clock than in training.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    while True:
        yield torch.matmul(left, right, out=result)


def _disk_reads(file: Path) -> Iterator[int]:
    """Read a file block by block, over and over, bypassing the page cache.

    Blocks are also dropped from the page cache before they are read, for file systems without O_DIRECT.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        descriptor = os.open(file, os.O_RDONLY)
    buffer = mmap.mmap(-1, DISK_BLOCK_BYTES)  # aligned to pages, as O_DIRECT requires
    try:
        for number in itertools.count():
            start = number * DISK_BLOCK_BYTES % DISK_FILE_BYTES
            os.posix_fadvise(descriptor, start, DISK_BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
            yield os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)


def limits_from(measurements: list[Measurement]) -> Limits:
    """Return the median rate of each limit that was measured without an error, in bytes/s or FLOP/s."""
    return limits_from_rows(limit_rows(measurements))


def training_flops(model: ModelConfig, classes: int, image_size: int) -> float:
    """Return the FLOPs per image of the forward and backward pass.

    A multiply-add counts as 2 FLOPs.
    """
    network = build_from_config(model, classes, image_size=image_size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    # batch norm needs two samples
    costs = count_costs(
        network, TrainConfig(), batch_size=2, image_size=image_size, device=torch.device("cpu"), amp=None
    )
    return costs.training_flops / 2


def loading_bounds(limits: Limits, *, placement: str, device: str, stored_bytes: float, output_bytes: float) -> Limits:
    """Return the upper bound on a loader's images/s from each limit that applies to it.

    Args:
        limits: Machine limits.
        placement: "device" if raw pixels are in GPU memory. All other values are treated like "host".
        device: "cpu" or "cuda".
        stored_bytes: Bytes per stored image.
        output_bytes: Bytes per image in a batch.
    """
    if device != "cuda":
        return {MEMORY: limits.get(MEMORY, 0) / output_bytes}
    if placement == "device":
        return {DEVICE_MEMORY: limits.get(DEVICE_MEMORY, 0) / output_bytes}
    return {PINNED: limits.get(PINNED, 0) / stored_bytes, MEMORY: limits.get(MEMORY, 0) / stored_bytes}


def disk_bound(limits: Limits, stored_bytes: float, split_bytes: float) -> Limits:
    """Return the bound from disk reads in images/s, if the split is larger than the machine's memory.

    Otherwise, the split can be cached, and the result is empty.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {DISK: limits.get(DISK, 0) / stored_bytes} if split_bytes > memory else {}


def limit_rows(measurements: list[Measurement]) -> list[Row]:
    """Return a row per limit, with its value in GB/s or TFLOP/s."""
    rows = []
    for measurement in measurements:
        name, unit = measurement.workload or measurement.candidate, UNITS.get(measurement.workload, "")
        fields: dict[str, object] = {"note" if measurement.error == OUT_OF_TIME else "error": measurement.error}
        if measurement.error is None and measurement.rates:
            fields = {"value": rounded(measurement.rate / UNIT_SIZES[unit], 4)}
        rows.append(new_row(name, ours=False, unit=unit, **fields))
    return rows


def limits_from_rows(rows: list[Row]) -> Limits:
    """Convert rows from `limit_rows` back to limits in bytes/s or FLOP/s. Rows without a value are skipped."""
    return {row["name"]: row["value"] * UNIT_SIZES[row["unit"]] for row in rows if "value" in row}
