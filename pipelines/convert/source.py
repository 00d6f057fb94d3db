"""Interface between the source readers in `tools/sources` and the converter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.convert.encode import Encoding


class SplitSource(Protocol):
    """One split of a source. It is pickled for worker processes, which read it."""

    labels: np.ndarray | None  # int64 [rows]; None for a split without labels
    bytes_per_row: int  # average bytes read per row

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield rows start..stop in source order: uint8 [H, W, 3], or the bytes of an image file (b'' if empty)."""
        ...

    def describe(self, row: int) -> str:
        """Return the name of a row for messages, e.g. 'images-train[17]', 'train/cat/001.jpg'."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set to convert."""

    kind: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of the content or of a cheap part of it
    splits: dict[str, SplitSource]
    # Changes with every modification of the files, some of which the fingerprint misses. Stored only by an unfinished
    # conversion, so that its pieces never come from two versions of a source.
    state: str = ""
    unordered: tuple[str, ...] = ()  # splits with numbered files in another order than their numbers


@dataclass(frozen=True)
class Options:
    """Options of a conversion. The same options and source give byte-identical results."""

    encoding: Encoding
    shard_mib: int = 512
    seed: int = 0
    strict: bool = False  # raise UserError for a defective sample instead of quarantining it
