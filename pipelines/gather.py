"""Where the bytes of a batch come from: mapped files, or the whole split in memory. Knows indices, not order or draws.

Each source fills one of a few slots, buffers that are reused: fresh memory for every batch would cost more in page
faults than the copy itself. `fill` runs in the loader's background thread.
"""

from __future__ import annotations

import io
import mmap
import sys
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from pipelines.shards import Split

HUGE_PAGE = 2**21
RESIDENT_BYTES_ON_CPU = 2**29  # a larger split stays in the page cache, which ranks share


class Source(Protocol):
    """Fills a slot with the samples of a batch."""

    def fill(self, slot: int, indices: np.ndarray) -> torch.Tensor | list[np.ndarray]:
        """The samples at `indices` (int64 [B]); what is returned is overwritten by the next fill of the same slot."""
        ...

    def defects(self, indices: np.ndarray) -> list[str]:
        """Names those of the samples that cannot be decoded."""
        ...


class HostPixels:
    """Rows of pixels in host memory (the map of all npy shards): a batch is one index_select.

    pixels: uint8 [rows, H * W * 3]; rows: the row of each sample, None where they are equal; shape: (H, W, 3).
    pinned: slots that a GPU can copy from. handed_out: batches go to the user as they are, so a slot that the user
    still holds is replaced instead of overwritten.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        rows: np.ndarray | None,
        shape: tuple[int, int, int],
        batch_size: int,
        slots: int,
        *,
        pinned: bool = False,
        handed_out: bool = False,
    ) -> None:
        self._pixels, self._rows, self._shape = pixels, rows, shape
        self._batch_size, self._pinned, self._handed_out = batch_size, pinned, handed_out
        self._slots = [self._new_slot() for _ in range(slots)]
        self._references_when_idle = self._references(0)

    def fill(self, slot: int, indices: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3]"""
        if self._handed_out and self._references(slot) > self._references_when_idle:
            self._slots[slot] = self._new_slot()
        out = torch.from_numpy(self._slots[slot])[: len(indices)]
        rows = indices if self._rows is None else self._rows[indices]
        torch.index_select(self._pixels, 0, torch.from_numpy(rows), out=out)
        return out.view(len(indices), *self._shape)

    def _references(self, slot: int) -> int:
        """Every tensor that shares a slot's memory keeps a reference to its NumPy array."""
        return sys.getrefcount(self._slots[slot])

    def defects(self, indices: np.ndarray) -> list[str]:
        return []

    def _new_slot(self) -> np.ndarray:
        shape = (self._batch_size, self._pixels.shape[1])
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
        slot = _on_huge_pages(*shape)
        slot.fill(0)  # touched now, so that no batch pays for the page faults
        return slot


class DevicePixels:
    """The whole split in GPU memory: a batch is gathered there and never crosses the bus."""

    def __init__(self, pixels: torch.Tensor, shape: tuple[int, int, int], batch_size: int, slots: int) -> None:
        self._pixels, self._shape = pixels, shape
        self._slots = [pixels.new_empty((batch_size, pixels.shape[1])) for _ in range(slots)]

    def fill(self, slot: int, indices: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3], written on the current stream."""
        out = self._slots[slot][: len(indices)]
        torch.index_select(self._pixels, 0, torch.from_numpy(indices).to(out.device), out=out)
        return out.view(len(indices), *self._shape)

    def defects(self, indices: np.ndarray) -> list[str]:
        return []


class MappedFiles:
    """jpeg shards: views of the encoded bytes, which the decoder reads straight from the page cache."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._content, self._address, self._size = split.content, split.address, split.size

    def fill(self, slot: int, indices: np.ndarray) -> list[np.ndarray]:
        """B arrays uint8 [bytes]."""
        del slot
        begins, sizes = self._address[indices].tolist(), self._size[indices].tolist()
        return [self._content[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]

    def defects(self, indices: np.ndarray) -> list[str]:
        """Pillow decodes them one by one, which only an error that has already happened can afford."""
        names = []
        for index, content in zip(indices.tolist(), self.fill(0, indices), strict=True):
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
    return pixels


def _on_huge_pages(rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, columns] on pages of 2 MiB where the system has them: scattered samples miss the TLB less."""
    memory = mmap.mmap(-1, rows * columns + HUGE_PAGE)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return np.ndarray((rows, columns), np.uint8, memory, begin)


def resident_fits(split: Split, device: torch.device) -> bool:
    """Whether placement auto keeps the split in the device's memory: npy, and small beside what is free now."""
    if split.encoding != "npy" or split.image_shape is None:
        return False
    limit = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else RESIDENT_BYTES_ON_CPU
    return len(split) * int(np.prod(split.image_shape)) <= limit
