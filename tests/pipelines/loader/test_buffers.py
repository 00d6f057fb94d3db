"""Which splits stay in device memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.loader.buffers import resident_fits
from pipelines.storage.open import open_split


def test_memory_cached_by_torch_is_freed_before_it_is_counted(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, device = open_split(npy_data, "train"), torch.device("cuda", 0)
    free = [2 * len(split) * 32 * 32 * 3 - 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert not resident_fits(split, device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 2))
    assert resident_fits(split, device)
