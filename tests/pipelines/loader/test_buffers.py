"""Which splits stay in device memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.loader.buffers import resident_fits
from pipelines.storage.open import open_split


def test_memory_cached_by_torch_counts_as_free(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, device = open_split(npy_data, "train"), torch.device("cuda", 0)
    size = len(split) * 32 * 32 * 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (size, 4 * size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * size)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * size)
    assert resident_fits(split, device)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * size + 2)
    assert not resident_fits(split, device)
