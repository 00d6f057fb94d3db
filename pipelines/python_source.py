"""Write a data set from Python: (image, label) pairs from lists, other iterables with a length, or torch Datasets."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from operator import index
from pathlib import Path
from typing import Literal, Protocol, TypeGuard

import numpy as np
from PIL import Image

from configs.utils.console import progress_bar
from configs.utils.errors import UserError, readable
from configs.utils.warnings import warn
from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.storage.dataset import SPLIT_NAMES, DatasetInfo

IMAGES = (
    "a PIL image, a NumPy array uint8 [H, W], [H, W, 1] or [H, W, 3], a torch tensor uint8 [H, W], [1, H, W] or "
    "[3, H, W], or the path of an image file"
)


class Indexed(Protocol):
    """Items with a length that can be read in any order, such as a list or a torch Dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> object: ...


class Sized(Protocol):
    """Items with a length that can be iterated over, several times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


Items = Indexed | Sized  # of (image, label)


def write_dataset(
    out: str | Path,
    splits: Mapping[str, Items],
    *,
    classes: Sequence[str] | None = None,
    encoding: Literal["jpeg", "npy"] = "jpeg",
    size: int | None = None,
    workers: int = 1,
) -> DatasetInfo:
    """Write (image, label) pairs as a data set that `data.path` can name, showing progress on stderr.

    Items are read one by one, twice: first to check them, then to write them. They must be the same each time. After an
    interruption, the same call finishes the data set.

    Args:
        out: New or empty folder. Its name becomes the name of the data set.
        splits: Items of each split by name; training needs train and val. An item is a pair (image, label). An image is
            a PIL image, a NumPy array uint8 [H, W], [H, W, 1] or [H, W, 3], a torch tensor uint8 [H, W], [1, H, W] or
            [3, H, W], or the path of an image file. JPEG files are stored as they are. A label is an integer from 0.
        classes: Name of each class. If None, the names are the numbers from 0 to the largest label.
        encoding: jpeg stores images of any size; npy stores the pixels of images of one size without loss.
        size: Shorter side in pixels to resize to, or None. With npy, images are also cropped to the central square.
        workers: Number of processes. More than one requires that items can be indexed and pickled, and that a script
            calls this function below `if __name__ == "__main__":`.

    Returns:
        The content of dataset.json.

    Raises:
        UserError: An item is invalid; see also `pipelines.convert.writer.convert_source`.
        OSError: A file cannot be read or written.
    """
    out = Path(out)
    _check_splits(splits)
    rows = {name: PythonSplit(name, items) for name, items in splits.items()}
    if workers > 1 and not all(_is_indexed(items) for items in splits.values()):
        raise UserError(f"workers={workers} needs items that can be indexed, items[0]; use workers=1")
    digest, known = hashlib.sha256(), None if classes is None else len(classes)
    count = max((split.check(digest.update, known) for split in rows.values()), default=0)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.absolute().name).lstrip("._-")[:100] or "dataset"
    source = Source(
        kind="python",
        name=name,
        classes=tuple(str(number) for number in range(count)) if classes is None else tuple(classes),
        fingerprint=digest.hexdigest(),
        splits=dict(rows),
    )
    return convert_source(source, out, Options(Encoding(encoding, size=size)), workers, name)


def _check_splits(splits: object) -> None:
    """Raise UserError unless `splits` is a dict with usual names. Warn if a split that training needs is missing."""
    if not isinstance(splits, Mapping):
        raise UserError(
            f"splits is a {type(splits).__name__}, but must be a dict of the items of each split, e.g. "
            '{"train": train_items, "val": val_items}'
        )
    for name in splits:
        if not isinstance(name, str):
            raise UserError(f"splits has the key {name!r}, but its keys must be names such as 'train' and 'val'")
        usual = SPLIT_NAMES.get(name.lower(), name)
        if usual != name:
            raise UserError(f"splits has {name!r}; name this split {usual!r}")
    if missing := [repr(name) for name in ("train", "val") if name not in splits]:
        warn(f"splits has no {' and no '.join(missing)}; training needs train and val")


class PythonSplit:
    """One split of items from Python, as a `SplitSource`."""

    def __init__(self, name: str, items: Items) -> None:
        if not hasattr(items, "__len__"):
            raise UserError(
                f"splits[{name!r}] is a {type(items).__name__} without a length; use a list, or a class with __len__ "
                "and __getitem__ or __iter__"
            )
        self._name, self._items = name, items
        self.labels: np.ndarray | None = None  # read by `check`
        self.bytes_per_row = 0
        self._iterator: Iterator[object] | None = None  # of items that cannot be indexed
        self._position = 0  # of the iterator

    def __len__(self) -> int:
        return len(self._items)

    def describe(self, row: int) -> str:
        return f"splits[{self._name!r}][{row}]"

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the images from `start` up to `stop` (exclusive): uint8 [H, W, 3], or the bytes of an image file."""
        for row, item in enumerate(self._read_items(start, stop), start):
            yield _pixels(self._pair(row, item)[0], self.describe(row))

    def check(self, update: Callable[[bytes], object], classes: int | None) -> int:
        """Check all items, read their labels, and return the largest label plus 1.

        Args:
            update: Called with all labels and images.
            classes: Number of classes, or None if unknown.

        Raises:
            UserError: An item is invalid, or there are fewer or more than the length says.
        """
        labels, size, row = np.empty(len(self), np.int64), 0, -1
        with progress_bar(desc=f"{self._name}: check", total=len(self), unit=" images") as bar:
            for row, item in enumerate(self._read_items(0, len(self))):
                image, label = self._pair(row, item)
                labels[row] = _label(label, self.describe(row), classes)
                image = _pixels(image, self.describe(row))
                update(f"{self._name} {row} {labels[row]} {np.shape(image)} {len(image)} ".encode())
                update(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes())
                size += len(image) if isinstance(image, bytes) else image.nbytes
                bar.update()
        if row + 1 != len(self):
            raise UserError(f"splits[{self._name!r}] ended after {row + 1} items, but its length is {len(self)}")
        self.labels, self.bytes_per_row = labels, size // max(1, len(self))
        return int(labels.max(initial=-1)) + 1

    def _read_items(self, start: int, stop: int) -> Iterator[object]:
        """Yield the items from `start` up to `stop` (exclusive), or fewer if they end earlier."""
        if _is_indexed(self._items):
            for row in range(start, stop):
                try:
                    item = self._items[row]
                except IndexError:
                    return
                yield item
            return
        if self._iterator is None or start < self._position:
            self._iterator, self._position = iter(self._items), 0
        for _ in islice(self._iterator, start - self._position):
            pass
        self._position = start
        for item in islice(self._iterator, stop - start):
            self._position += 1
            yield item

    def _pair(self, row: int, item: object) -> tuple[object, object]:
        """Return an item as (image, label). Raises UserError if it is not a pair."""
        if not isinstance(item, tuple | list) or len(item) != 2:
            found = f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__
            raise UserError(f"{self.describe(row)} is a {found}, but must be a pair (image, label)")
        return item[0], item[1]


class PythonImages(PythonSplit):
    """Images from Python without labels, as a `SplitSource`. They need no `check`."""

    def __init__(self, images: Sequence[object]) -> None:
        super().__init__("images", images)
        self._images = images

    def describe(self, row: int) -> str:
        image = self._images[row]
        return str(image) if isinstance(image, str | Path) else f"images[{row}]"

    def _pair(self, row: int, item: object) -> tuple[object, object]:
        del row
        return item, None


def _is_indexed(items: Items) -> TypeGuard[Indexed]:
    return hasattr(items, "__getitem__")


def _label(label: object, place: str, classes: int | None) -> int:
    """Return a label as an integer. `place` names the item, and `classes` is None if unknown."""
    try:
        number = -1 if isinstance(label, bool) else index(label)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0 or (classes is not None and number >= classes):
        allowed = "an integer from 0" if classes is None else f"an integer from 0 to {classes - 1}, one per class"
        raise UserError(f"the label of {place} is {label!r:.60} ({type(label).__name__}), but must be {allowed}")
    return number


def _pixels(image: object, place: str) -> np.ndarray | bytes:
    """Return an image as uint8 [H, W, 3], or the content of its file. `place` names the item.

    Raises:
        UserError: The image has another type, shape or dtype, or the file cannot be read.
    """
    if isinstance(image, str | Path):
        with readable(Path(image)):
            return Path(image).read_bytes()
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{place} is a PIL image of mode {image.mode!r}, whose range is unknown; make it RGB or L")
        return np.asarray(image.convert("RGB"))
    kind, pixels = "an array", image
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        kind, pixels = "a tensor", image.detach().cpu().numpy()
        if pixels.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
    if not isinstance(pixels, np.ndarray):
        raise UserError(f"the image of {place} is a {type(image).__name__}, but must be {IMAGES}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        shape = list(image.shape)  # type: ignore[attr-defined]
        raise UserError(f"the image of {place} is {kind} {pixels.dtype} {shape}, but must be {IMAGES}{_advice(pixels)}")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _advice(pixels: np.ndarray) -> str:
    if pixels.dtype.kind == "f":
        return "; floats from 0 to 1 become uint8 by (255 * image).round()"
    if pixels.ndim == 3 and 3 in (pixels.shape[0], pixels.shape[1]):
        return "; arrays have the channels last, and tensors first"
    return ""
