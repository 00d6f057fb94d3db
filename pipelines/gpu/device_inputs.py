"""Small integer inputs of each batch, copied to the device without blocking the host."""

from __future__ import annotations

import numpy as np
import torch


class DeviceInputs:
    """A host buffer (pinned if the device is a GPU) and a device buffer, int64 [slots, *shape] each."""

    def __init__(self, slots: int, shape: tuple[int, ...], device: torch.device) -> None:
        # Pinned, since a copy from pageable memory blocks the calling thread.
        self._host = torch.empty((slots, *shape), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.empty((slots, *shape), dtype=torch.int64, device=device)
        self._arrays = self._host.numpy()
        self._copied: dict[int, torch.cuda.Event] = {}  # event of each slot's last copy

    def host(self, slot: int) -> np.ndarray:
        """Wait for the slot's last copy, and return the slot's host buffer for writing, int64 [*shape].

        The loader does not wait for the copies of batches that it never submitted to the runner, so this method must
        wait.
        """
        if slot in self._copied:
            self._copied[slot].synchronize()
        array: np.ndarray = self._arrays[slot]
        return array

    def to_device(self, slot: int) -> torch.Tensor:
        """Copy a slot to the device on the current stream.

        Returns:
            A view of the device buffer, int64 [*shape]. It is valid until the slot's next copy.
        """
        on_device = self._device[slot].copy_(self._host[slot], non_blocking=True)
        if on_device.is_cuda:
            self._copied[slot] = blocking_event()
        return on_device


def to_device(arrays: list[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy int64 arrays to the device on the current stream, together in one copy, without waiting for it."""
    flat = arrays[0].reshape(-1) if len(arrays) == 1 else np.concatenate([array.reshape(-1) for array in arrays])
    # torch keeps pinned memory until the copy is done
    on_device = torch.from_numpy(flat).pin_memory().to(device, non_blocking=True)
    parts = on_device.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def blocking_event(stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
    """Record an event on a stream (by default the current one) and return it.

    A thread that waits for the event sleeps instead of spinning on a core.
    """
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
