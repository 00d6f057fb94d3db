"""Memory for pixels: the loader's reused slots, and whole splits in device memory."""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from threading import Lock

import numpy as np
import torch

from pipelines.storage.split import Split

HUGE_PAGE = 2**21  # bytes
RESIDENT_BYTES_ON_CPU = 2**29  # a larger split stays in the page cache, which all ranks share


class SlotBuffers:
    """Reused buffers in host memory, uint8 [batch_size, H, W, 3] each.

    Buffers are reused because page faults in fresh memory would cost more than copying a batch.

    Args:
        count: Number of slots.
        batch_size: Images per slot.
        shape: (H, W, 3).
        pinned: Whether to use pinned memory, from which a GPU can copy asynchronously.
        handed_out: Whether batches reach the consumer without a copy. If so, a buffer that the consumer still holds is
            not overwritten. Instead, its slot gets a buffer that was replaced earlier and is free again, or a new one.
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
        """Return a slot's buffer for writing, limited to the first `size` images: uint8 [size, H, W, 3]."""
        if self._handed_out and self._references(self._slots, slot) > self._references_when_idle:
            with self._lock:
                replaced = range(len(self._replaced))
                free = [i for i in replaced if self._references(self._replaced, i) <= self._references_when_idle]
                other = self._replaced.pop(free[0]) if free else self._new()
                self._replaced = [*self._replaced, self._slots[slot]][-len(self._slots) :]
                self._slots[slot] = other
        return self._slots[slot][:size]

    def _references(self, arrays: list[np.ndarray], number: int) -> int:
        """Count the references to an array. Each tensor that shares the array's memory holds one reference."""
        return sys.getrefcount(arrays[number])

    def _new(self) -> np.ndarray:
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True).numpy()
        slot = _on_huge_pages(*self._shape)
        slot.fill(0)  # touch the pages now, so that no batch pays for page faults
        return slot


def load_resident(split: Split, device: torch.device) -> torch.Tensor:
    """Load all images of an npy split into the memory of `device`: uint8 [samples, H * W * 3].

    Raises:
        UserError: A shard has changed since the split was opened.
        ValueError: The split is not stored as npy.
    """
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


def resident_fits(split: Split, device: torch.device) -> bool:
    """Return True if data.placement=auto keeps the split in device memory.

    This requires an npy split whose images all have the same shape. On a GPU, the split may take up to half of the free
    memory, and on the CPU up to RESIDENT_BYTES_ON_CPU.
    """
    if split.encoding != "npy" or split.image_shape is None:
        return False
    limit = RESIDENT_BYTES_ON_CPU
    if device.type == "cuda":
        torch.cuda.empty_cache()  # e.g. the pixels of an earlier loader
        limit = torch.cuda.mem_get_info(device)[0] // 2
    return len(split) * int(np.prod(split.image_shape)) <= limit


def _on_huge_pages(*shape: int) -> np.ndarray:
    """Allocate uint8 [*shape] on 2 MiB pages if available, to reduce TLB misses when samples are scattered."""
    memory = mmap.mmap(-1, math.prod(shape) + HUGE_PAGE)
    with suppress(OSError):  # kernels built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return np.ndarray(shape, np.uint8, memory, start)
