"""Interface between readers of sources (`tools/sources`) and the shard writer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.convert.encode import Encoding


class SplitSource(Protocol):
    """One split of a source. Picklable, since worker processes read it."""

    labels: np.ndarray | None  # int64 [rows]; None for a split without labels
    bytes_per_row: int  # average bytes read per row

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield rows start..stop in source order: uint8 [H, W, 3], or the bytes of an image file (b'' if empty)."""
        ...

    def describe(self, row: int) -> str:
        """Return the name of a row for messages: 'images-train[17]', 'train/cat/001.jpg'."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set to convert."""

    kind: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of the content, or of a cheap part of it
    splits: dict[str, SplitSource]
    # Changes with every modification of the files, which the fingerprint may miss. Only an unfinished conversion stores
    # it, so that its pieces never come from two versions of a source.
    state: str = ""
    unordered: tuple[str, ...] = ()  # splits whose rows are numbered files in another order than their numbers


@dataclass(frozen=True)
class Options:
    """Options of a conversion. Equal options give byte-identical results for the same source."""

    encoding: Encoding
    shard_mib: int = 512
    seed: int = 0
    strict: bool = False  # raise an error instead of quarantining a sample
