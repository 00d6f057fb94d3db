"""Helpers for tests of sources."""

from __future__ import annotations

import numpy as np

from pipelines.convert.source import Source


def labels_of(source: Source, split: str) -> list[int]:
    labels = source.splits[split].labels
    assert labels is not None
    assert labels.dtype == np.int64
    result: list[int] = labels.tolist()
    return result
