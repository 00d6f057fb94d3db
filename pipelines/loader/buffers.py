"""Memory for pixels: the loader's reused buffers, and whole splits in device memory."""

from __future__ import annotations

import math
import mmap
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import torch

from pipelines.storage.memory_map import HUGE_PAGE_BYTES
from pipelines.storage.split import Split

CONSUMER_HELD = 2  # buffers that a consumer usually still holds when it requests the next batch
RESIDENT_BYTES_ON_CPU = 2**29  # a larger split stays in the page cache, which all ranks share


class SlotBuffers:
    """One buffer in host memory per slot, uint8 [batch_size, H, W, 3] each, for batches that the device or DALI reads.

    Buffers are reused because page faults in fresh memory would cost more than copying a batch.

    Args:
        count: Number of slots.
        batch_size: Images per slot.
        shape: (H, W, 3).
        pinned: Whether to use pinned memory, from which a GPU can copy asynchronously.
    """

    def __init__(self, count: int, batch_size: int, shape: tuple[int, int, int], *, pinned: bool = False) -> None:
        self.batch_size, self._slots = batch_size, [_slot((batch_size, *shape), pinned) for _ in range(count)]

    def __call__(self, slot: int, size: int) -> np.ndarray:
        """Return a slot's buffer for writing, limited to the first `size` images: uint8 [size, H, W, 3]."""
        return self._slots[slot][:size]


class LentBuffers:
    """Reused buffers in host memory, uint8 [batch_size, H, W, 3] each, for batches that are handed out without a copy.

    A buffer is lent as a new array, which everything that shares its memory keeps alive: the batch's tensors, their
    views, and arrays made from them. The buffer is lent again only after that array has been freed, so a batch that the
    user keeps is never overwritten. If no buffer has returned, a new one is allocated.

    Args:
        slots: Number of slots that are filled ahead of the consumer.
        batch_size: Images per buffer.
        shape: (H, W, 3).
    """

    def __init__(self, slots: int, batch_size: int, shape: tuple[int, int, int]) -> None:
        self.batch_size, self._shape = batch_size, shape
        count = slots + CONSUMER_HELD
        self._free = deque((self._new() for _ in range(count)), maxlen=count)

    def __call__(self, slot: int, size: int) -> np.ndarray:
        """Return a buffer for writing, limited to the first `size` images: uint8 [size, H, W, 3]."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._new()
        # A view of an array refers to the innermost array. This is `lent`, since its memory comes from a memoryview.
        lent = np.ndarray((size, *self._shape), np.uint8, memory)
        weakref.finalize(lent, _give_back, weakref.ref(self._free), memory)
        return lent

    def _new(self) -> memoryview:
        return _slot((self.batch_size, *self._shape)).data


def _give_back(free: weakref.ref[deque[memoryview]], memory: memoryview) -> None:
    """Return a buffer to `free`, unless the loader is gone: a batch that outlives it keeps only its own buffer."""
    if (buffers := free()) is not None:
        buffers.append(memory)


def load_resident(split: Split, device: torch.device) -> torch.Tensor:
    """Load all images of an npy split into the memory of `device`: uint8 [samples, H * W * 3].

    Raises:
        UserError: A shard has changed since the split was opened.
        ValueError: The split is not stored as npy.
    """
    if split.encoding != "npy" or split.image_shape is None:
        raise ValueError(f"split {split.name!r} stores {split.encoding}, not pixels")
    shape = (len(split), math.prod(split.image_shape))
    on_cpu = device.type == "cpu"
    pixels = torch.from_numpy(_on_huge_pages(shape)) if on_cpu else torch.empty(shape, dtype=torch.uint8, device=device)
    is_whole = split.residency is None or not split.residency.evicts
    step = max(1, (2**28 if is_whole else 2**24) // shape[1])
    with split.hold(slice(None if is_whole else 0)):
        for start in range(0, len(split), step):
            samples = np.arange(start, min(start + step, len(split)))
            part = pixels[start : start + step]
            read = part if on_cpu else torch.empty((len(samples), shape[1]), dtype=torch.uint8)
            with split.hold(samples):
                split.read_pixels(samples, read.numpy().reshape(-1, *split.image_shape))
            if not on_cpu:
                part.copy_(read)
    split.check_unchanged()
    return pixels


def resident_fits(split: Split, device: torch.device) -> bool:
    """Return True if data.placement=auto keeps the split in device memory.

    This requires an npy split whose images all have the same shape, and which fits the cache if it is remote. On a
    GPU, the split may take up to half of the free memory, and on the CPU up to RESIDENT_BYTES_ON_CPU.
    """
    if split.encoding != "npy" or split.image_shape is None or (split.residency and split.residency.evicts):
        return False
    limit = RESIDENT_BYTES_ON_CPU
    if device.type == "cuda":
        torch.cuda.empty_cache()  # e.g. the pixels of an earlier loader
        limit = torch.cuda.mem_get_info(device)[0] // 2
    return len(split) * int(np.prod(split.image_shape)) <= limit


def _slot(shape: tuple[int, ...], pinned: bool = False) -> np.ndarray:
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
    slot = _on_huge_pages(shape)
    slot.fill(0)  # touch the pages now, so that no batch pays for page faults
    return slot


def _on_huge_pages(shape: tuple[int, ...]) -> np.ndarray:
    """Allocate uint8 [*shape] on 2 MiB pages if available, to reduce TLB misses when samples are scattered."""
    memory = mmap.mmap(-1, math.prod(shape) + HUGE_PAGE_BYTES)
    with suppress(OSError):  # kernels built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE_BYTES
    return np.ndarray(shape, np.uint8, memory, start)
