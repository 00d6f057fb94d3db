"""Which splits stay in device memory, and how long buffers do."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from pipelines.loader.buffers import LentBuffers, resident_fits
from pipelines.storage.open import open_split


def test_memory_cached_by_torch_is_freed_before_it_is_counted(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, device = open_split(npy_data, "train"), torch.device("cuda", 0)
    free = [2 * len(split) * 32 * 32 * 3 - 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not resident_fits(split, device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 2))
    assert resident_fits(split, device)


def test_buffer_is_lent_again_after_its_last_view_is_gone() -> None:
    buffers = LentBuffers(1, 4, (8, 8, 3))
    lent = buffers(0, 4)
    place, view = lent.ctypes.data, torch.from_numpy(lent)[1:].numpy()[:, ::2]
    del lent
    others = [buffers(0, 4) for _ in range(5)]  # more than there were
    assert place not in {other.ctypes.data for other in others}
    del view
    assert buffers(0, 4).ctypes.data == place


def test_kept_batch_keeps_only_its_own_buffer() -> None:
    buffers = LentBuffers(1, 4, (8, 8, 3))
    free, kept = weakref.ref(buffers._free), buffers(0, 2)
    del buffers
    assert free() is None
    kept[:] = 7
    assert (kept == 7).all()
