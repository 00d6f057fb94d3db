"""What can be converted: the interface between readers of sources and the shard writer. Knows no files of either."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.convert.encode import Encoding


class SplitSource(Protocol):
    """One split of a source; picklable, since worker processes read it."""

    labels: np.ndarray | None  # int64 [rows]; None for a split without labels
    bytes_per_row: int  # average bytes read per row

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Rows start..stop in source order: uint8 [H, W, 3], or the bytes of an image file (b'' when empty)."""
        ...

    def describe(self, row: int) -> str:
        """Names a row for people: 'images-train[17]', 'train/cat/001.jpg'."""
        ...


@dataclass(frozen=True)
class Source:
    """What is converted."""

    kind: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of the content, as far as it can be had cheaply
    splits: dict[str, SplitSource]
    state: str = ""  # changes with every touch of the files, which the fingerprint may miss; only an interrupted
    # conversion remembers it, so that its pieces never come from two versions of a source
    unordered: tuple[str, ...] = ()  # splits whose rows are numbered files that come in another order than the numbers


@dataclass(frozen=True)
class Options:
    """What the user chose; two conversions of one source with equal options are byte-identical."""

    encoding: Encoding
    shard_mib: int = 512
    seed: int = 0
    strict: bool = False  # a sample that would be quarantined is an error instead
