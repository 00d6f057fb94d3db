"""Where the bytes of a batch come from: mapped files, or the whole split in memory. Knows indices, not order or draws.

Each source fills one of a few slots, buffers that are reused: fresh memory for every batch would cost more in page
faults than the copy itself. `fill` runs in the loader's background thread.
"""

from __future__ import annotations

import io
import math
import mmap
import sys
from collections import deque
from contextlib import suppress
from itertools import pairwise
from threading import Lock
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from PIL import Image

from configs.errors import UserError
from pipelines import kernels
from pipelines.cpu_graph import CpuGraph, Images
from pipelines.shards import RECONVERT, Split
from pipelines.watch import Watch

HUGE_PAGE = 2**21
RESIDENT_BYTES_ON_CPU = 2**29  # a larger split stays in the page cache, which ranks share


class Source(Protocol):
    """Fills a slot with the samples of a batch."""

    watch: Watch | None = None  # over the files that are read for every batch; None: all was read at the start

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor | list[np.ndarray]:
        """The samples at `indices` (int64 [B]); what is returned is overwritten by the next fill of the same slot."""
        ...

    def defects(self, indices: np.ndarray) -> list[str]:
        """Names those of the samples that cannot be decoded, where decoding is left to DALI."""
        return []

    def look(self) -> None:
        """Raise a UserError if a file that was read is known to have changed; cheap enough for every batch."""
        if self.watch is not None:
            self.watch.look()

    def check_unchanged(self) -> None:
        """The same, of all files as they are now."""
        if self.watch is not None:
            self.watch.check()


def filled(
    source: Source, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]
) -> torch.Tensor | list[np.ndarray]:
    """What `source.fill` gives, if its files are still what they were."""
    try:
        images = source.fill(slot, indices, draws)
    except Exception:
        source.check_unchanged()  # a file that was changed says more than the sample that could not be used
        raise
    source.look()
    return images


class Slots:
    """Buffers in host memory: uint8 [batch_size, H, W, 3] each.

    pinned: a GPU can copy from them. handed_out: batches go to the user as they are, so a slot that the user still
    holds is replaced instead of overwritten, by one that was replaced earlier and is free again, or a new one.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        shape: tuple[int, int, int],
        *,
        pinned: bool = False,
        handed_out: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self._shape, self._pinned, self._handed_out = (batch_size, *shape), pinned, handed_out
        self._slots = [self._new() for _ in range(count)]
        self._replaced: list[np.ndarray] = []
        self._lock = Lock()
        self._references_when_idle = self._references(self._slots, 0)

    def __call__(self, slot: int, size: int) -> np.ndarray:
        """uint8 [size, H, W, 3], to be written."""
        if self._handed_out and self._references(self._slots, slot) > self._references_when_idle:
            with self._lock:
                replaced = range(len(self._replaced))
                free = [i for i in replaced if self._references(self._replaced, i) <= self._references_when_idle]
                other = self._replaced.pop(free[0]) if free else self._new()
                self._replaced = [*self._replaced, self._slots[slot]][-len(self._slots) :]
                self._slots[slot] = other
        return self._slots[slot][:size]

    def _references(self, arrays: list[np.ndarray], number: int) -> int:
        """Every tensor that shares a slot's memory keeps a reference to its NumPy array."""
        return sys.getrefcount(arrays[number])

    def _new(self) -> np.ndarray:
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True).numpy()
        slot = _on_huge_pages(*self._shape)
        slot.fill(0)  # touched now, so that no batch pays for the page faults
        return slot


class HostPixels(Source):
    """Raw images in host memory: resident, or the map of all npy shards. A batch is one call of a kernel.

    content: uint8 [bytes]; begins: int64 [samples], where each sample's pixels start; graph: what is done to them on
    the way, None: they are copied.
    """

    def __init__(
        self,
        content: np.ndarray,
        begins: np.ndarray,
        shape: tuple[int, int, int],
        slots: Slots,
        graph: CpuGraph | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._content, self._begins, self._slots, self._graph, self.watch = content, begins, slots, graph, watch
        self._heights, self._widths = (np.full(slots.batch_size, side) for side in shape[:2])

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3]"""
        count = len(indices)
        out = self._slots(slot, count)
        if self._graph is None:
            kernels.copy(self._content, self._begins[indices], out)
        else:
            sides = self._heights[:count], self._widths[:count]
            self._graph(Images(self._content, self._begins[indices], *sides), draws, out)
        return torch.from_numpy(out)


class HostJpegs(Source):
    """jpeg shards, decoded on the CPU into memory that stays in the cache, and from there through a graph."""

    CHUNK = 2**20  # bytes of decoded pixels

    def __init__(self, split: Split, slots: Slots, graph: CpuGraph | None = None) -> None:
        self._split, self._slots, self._graph, self.watch = split, slots, graph, split.watch
        self._pixels = split.heights.astype(np.int64) * split.widths * 3
        self._scratch: deque[np.ndarray] = deque()

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3]"""
        out = self._slots(slot, len(indices))
        sizes = self._pixels[indices]
        if self._graph is None:
            self._decode(indices, sizes, out.reshape(-1))
            return torch.from_numpy(out)
        piece = (np.cumsum(sizes) - 1) // self.CHUNK  # samples of one piece are decoded together
        bounds = [*np.flatnonzero(np.diff(piece, prepend=-1)), len(indices)]
        scratch = self._taken(int(max(sizes[start:stop].sum() for start, stop in pairwise(bounds))))
        for start, stop in pairwise(bounds):
            some = indices[start:stop]
            begins = self._decode(some, sizes[start:stop], scratch)
            shapes = self._split.heights[some].astype(np.int64), self._split.widths[some].astype(np.int64)
            drawn = {name: values[start:stop] for name, values in draws.items()}
            self._graph(Images(scratch, begins, *shapes), drawn, out[start:stop])
        self._scratch.append(scratch)
        return torch.from_numpy(out)

    def _taken(self, size: int) -> np.ndarray:
        """Memory of at least `size` bytes that no other thread uses."""
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = np.empty(0, np.uint8)
        return scratch if len(scratch) >= size else np.empty(max(size, 2 * self.CHUNK), np.uint8)

    def _decode(self, indices: np.ndarray, sizes: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """Write the images one after another into pixels (uint8, flat); returns where each begins.

        sizes: of the decoded images, bytes. The decoder is libjpeg-turbo, as in DALI, and gives the same pixels.
        """
        split, content, decode = self._split, self._split.content, simplejpeg.decode_jpeg
        begins = np.cumsum(sizes) - sizes
        columns = indices, split.address[indices], split.size[indices], begins, sizes
        shapes = zip(split.heights[indices].tolist(), split.widths[indices].tolist(), strict=True)
        rows = zip(*(column.tolist() for column in columns), shapes, strict=True)
        for index, address, length, begin, size, (height, width) in rows:  # small images feel every operation here
            target = pixels[begin : begin + size]
            try:
                decoded = decode(content[address : address + length], buffer=target)
            except ValueError:  # also for a warning; Pillow, slower, tells those from an image that is cut short
                decoded = self._decoded_by_pillow(index)
                if decoded.size == size:
                    target[:] = decoded.reshape(-1)
            if decoded.shape[:2] != (height, width):
                raise UserError(
                    f"{split.describe(index)} has {decoded.shape[0]} x {decoded.shape[1]} pixels where the index says "
                    f"{height} x {width}; {RECONVERT}"
                )
        return begins

    def _decoded_by_pillow(self, index: int) -> np.ndarray:
        split = self._split
        begin, length = int(split.address[index]), int(split.size[index])
        try:
            with Image.open(io.BytesIO(split.content[begin : begin + length].tobytes())) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError):
            raise UserError(undecodable([split.describe(index)])) from None


def undecodable(samples: list[str]) -> str:
    """What is wrong and how to mend it, for samples that a decoder refused."""
    return (
        f"{', '.join(samples)} cannot be decoded: the data set is damaged; run `tools/convert.py verify` on it and "
        "convert the source again"
    )


class DevicePixels(Source):
    """The whole split in GPU memory: a batch is gathered there and never crosses the bus."""

    def __init__(self, pixels: torch.Tensor, shape: tuple[int, int, int], batch_size: int, slots: int) -> None:
        self._pixels, self._shape = pixels, shape
        self._slots = [pixels.new_empty((batch_size, pixels.shape[1])) for _ in range(slots)]

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3], written on the current stream."""
        out = self._slots[slot][: len(indices)]
        torch.index_select(self._pixels, 0, torch.from_numpy(indices).to(out.device), out=out)
        return out.view(len(indices), *self._shape)


class MappedFiles(Source):
    """jpeg shards: views of the encoded bytes, which the decoder reads straight from the page cache."""

    def __init__(self, split: Split) -> None:
        self._split, self.watch = split, split.watch
        self._content, self._address, self._size = split.content, split.address, split.size

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> list[np.ndarray]:
        """B arrays uint8 [bytes]."""
        begins, sizes = self._address[indices].tolist(), self._size[indices].tolist()
        return [self._content[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]

    def defects(self, indices: np.ndarray) -> list[str]:
        """Pillow decodes them one by one, which only an error that has already happened can afford."""
        names = []
        for index, content in zip(indices.tolist(), self.fill(0, indices, {}), strict=True):
            try:
                with Image.open(io.BytesIO(content.tobytes())) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError):
                names.append(self._split.describe(index))
        return names


def load_resident(split: Split, device: torch.device) -> torch.Tensor:
    """All images of an npy split in the device's memory: uint8 [samples, H * W * 3]."""
    view, rows = split.pixel_rows()
    mapped, order = torch.from_numpy(view), torch.from_numpy(rows)
    pixels = (
        torch.from_numpy(_on_huge_pages(len(rows), view.shape[1]))
        if device.type == "cpu"
        else torch.empty((len(rows), view.shape[1]), dtype=torch.uint8, device=device)
    )
    chunk = max(1, 2**28 // view.shape[1])
    for start in range(0, len(rows), chunk):
        pixels[start : start + chunk].copy_(mapped.index_select(0, order[start : start + chunk]))
    split.check_unchanged()
    return pixels


def _on_huge_pages(*shape: int) -> np.ndarray:
    """uint8 [*shape] on pages of 2 MiB where the system has them: scattered samples miss the TLB less."""
    memory = mmap.mmap(-1, math.prod(shape) + HUGE_PAGE)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return np.ndarray(shape, np.uint8, memory, begin)


def resident_fits(split: Split, device: torch.device) -> bool:
    """Whether placement auto keeps the split in the device's memory: npy, and small beside what is free now."""
    if split.encoding != "npy" or split.image_shape is None:
        return False
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else RESIDENT_BYTES_ON_CPU
    return len(split) * int(np.prod(split.image_shape)) <= limit
