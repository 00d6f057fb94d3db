"""Where the pixels of a batch come from: mapped files, or the whole split in memory. JPEG files are in `jpegs`.

`fill` runs in the loader's background threads. Sources in host memory fill one of a few slots, buffers that are reused:
fresh memory for every batch would cost more in page faults than the copy itself. On a GPU each batch is a new tensor.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from threading import Lock
from typing import Protocol

import numpy as np
import torch

from pipelines.cpu import batch
from pipelines.cpu.graph import CpuGraph, Images
from pipelines.storage.monitor import ShardMonitor
from pipelines.storage.split import Split

HUGE_PAGE = 2**21
RESIDENT_BYTES_ON_CPU = 2**29  # a larger split stays in the page cache, which ranks share


class SampleSource(Protocol):
    """Fills a slot with the samples of a batch."""

    monitor: ShardMonitor | None = None  # over the files that are read for every batch; None: all was read at the start

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor | list[np.ndarray]:
        """The samples at `indices` (int64 [B]). In host memory the next fill of the same slot overwrites them.

        Raises:
            Undecodable: for samples of which it can say so, where decoding is not left to DALI.
        """
        ...

    def defect(self, sample: int) -> str | None:
        """What is wrong with a sample that cannot be decoded, however that comes out; None for one that can."""
        return None

    def look(self) -> None:
        """Raise a UserError if a file that was read is known to have changed; cheap enough for every batch."""
        if self.monitor is not None:
            self.monitor.poll()

    def check_unchanged(self) -> None:
        """The same, of all files as they are now."""
        if self.monitor is not None:
            self.monitor.check()


def fill_checked(
    source: SampleSource, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]
) -> torch.Tensor | list[np.ndarray]:
    """What `source.fill` gives, if its files are still what they were."""
    try:
        images = source.fill(slot, indices, draws)
    except Exception:
        source.check_unchanged()  # a file that was changed says more than the sample that could not be used
        raise
    source.look()
    return images


class SlotBuffers:
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


class HostPixels(SampleSource):
    """Raw images in host memory: resident, or the map of all npy shards. A batch is one call of a kernel.

    content: uint8 [bytes]; offsets: int64 [samples], where each sample's pixels start; graph: what is done to them on
    the way, None: they are copied.
    """

    def __init__(
        self,
        content: np.ndarray,
        offsets: np.ndarray,
        shape: tuple[int, int, int],
        slots: SlotBuffers,
        graph: CpuGraph | None = None,
        monitor: ShardMonitor | None = None,
    ) -> None:
        self._content, self._offsets, self._slots, self._graph, self.monitor = content, offsets, slots, graph, monitor
        self._heights, self._widths = (np.full(slots.batch_size, side) for side in shape[:2])

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3]"""
        count = len(indices)
        out = self._slots(slot, count)
        if self._graph is None:
            batch.copy(self._content, self._offsets[indices], out)
        else:
            sides = self._heights[:count], self._widths[:count]
            self._graph(Images(self._content, self._offsets[indices], *sides), draws, out)
        return torch.from_numpy(out)


class DeviceInputs:
    """Small integers of each batch, copied to the device without blocking the host: int64 [slots, *shape]."""

    def __init__(self, slots: int, shape: tuple[int, ...], device: torch.device) -> None:
        # Pinned: a copy from pageable memory blocks the calling thread.
        self._host = torch.empty((slots, *shape), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.empty((slots, *shape), dtype=torch.int64, device=device)
        self._arrays = self._host.numpy()
        self._copied: dict[int, torch.cuda.Event] = {}  # by slot

    def host(self, slot: int) -> np.ndarray:
        """Return the slot, int64 [*shape], to be written; wait for its last copy.

        The batch of that copy may never have been handed over, so no event of the consumer says that it is done.
        """
        if slot in self._copied:
            self._copied[slot].synchronize()
        array: np.ndarray = self._arrays[slot]
        return array

    def to_device(self, slot: int) -> torch.Tensor:
        """Copy the slot on the current stream: int64 [*shape] on the device, overwritten by the slot's next copy."""
        on_device = self._device[slot].copy_(self._host[slot], non_blocking=True)
        if on_device.is_cuda:
            self._copied[slot] = blocking_event()
        return on_device


def blocking_event(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """Record an event on a stream (None: the current one). Waiting for it sleeps; spinning would take a core."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


class DevicePixels(SampleSource):
    """The whole split in GPU memory: a batch is gathered there and never crosses the bus.

    pixels: uint8 [N, H * W * 3]; shape: (H, W, 3). Each batch is a new tensor, so that it can be handed over without a
    copy: torch's allocator reuses its memory when the streams it was recorded on are done with it.

    waits: block until the gather is done, as DALI needs: it does not wait for any stream before it reads an input that
    it was given with no_copy.
    """

    def __init__(
        self, pixels: torch.Tensor, shape: tuple[int, int, int], batch_size: int, slots: int, *, waits: bool
    ) -> None:
        self._pixels, self._shape, self._waits = pixels, shape, waits and pixels.is_cuda
        self._indices = DeviceInputs(slots, (batch_size,), pixels.device)

    def fill(self, slot: int, indices: np.ndarray, draws: dict[str, np.ndarray]) -> torch.Tensor:
        """uint8 [B, H, W, 3], written on the current stream."""
        samples = len(indices)
        self._indices.host(slot)[:samples] = indices
        rows = self._pixels.index_select(0, self._indices.to_device(slot)[:samples])
        if self._waits:
            blocking_event().synchronize()
        return rows.view(samples, *self._shape)


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
