"""Interface between the source readers in `tools/sources` and the converter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from pipelines.storage.dataset import MAX_PIXELS, SHARD_MIB, STORING_SEED

if TYPE_CHECKING:
    import numpy as np

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}  # Pillow's numbers


class SplitSource(Protocol):
    """One split of a source. The object is pickled and sent to worker processes, which read the rows."""

    labels: np.ndarray | None  # int64 [rows], or None for a split without labels
    bytes_per_row: int  # average bytes read per row

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the rows from `start` up to `stop` (exclusive) in source order.

        A row is either pixels, uint8 [H, W, 3], or the bytes of an image file (b"" for an empty file).

        Raises:
            UserError: A row cannot be read.
        """
        ...

    def describe(self, row: int) -> str:
        """Return the name of a row for messages, such as 'images-train[17]' or 'train/cat/001.jpg'."""
        ...


@dataclass(frozen=True)
class Source:
    """A data set to convert."""

    kind: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of the content, or of a part that is cheap to read
    splits: dict[str, SplitSource]
    # Changes whenever the files are modified, even if the fingerprint does not. The state is stored until a conversion
    # is finished, so that resuming it never combines two versions of a source.
    state: str = ""
    unordered: tuple[str, ...] = ()  # splits whose numbered files are not in numeric order
    default_encoding: Literal["npy", "jpeg"] = "npy"  # jpeg if the rows are image files, which then can be kept


@dataclass(frozen=True)
class Encoding:
    """Storage format of images."""

    name: Literal["npy", "jpeg"]
    quality: int = 95  # JPEG quality, 1 to 100
    subsampling: str = "4:2:0"  # JPEG chroma subsampling
    size: int | None = None  # shorter side after resizing, pixels; npy also crops to size x size
    max_pixels: int = MAX_PIXELS
    # Whether to rotate image files as their EXIF orientation says. torchvision and timm ignore it too.
    orientation: Literal["apply", "ignore"] = "ignore"


@dataclass(frozen=True)
class Options:
    """Options of a conversion. Two conversions of one source with equal options give byte-identical shards."""

    encoding: Encoding
    shard_mib: int = SHARD_MIB
    seed: int = STORING_SEED
    strict: bool = False  # whether to raise UserError for a defective sample instead of quarantining it
