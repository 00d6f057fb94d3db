"""The images that a tool runs models on: a split of a converted data set, or a folder of anyone's pictures.

Pictures are converted first, each model's as its own data set was, so that both come through the same loader. Knows no
predictions.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.utils.errors import UserError
from pipelines.convert.encode import Encoding
from pipelines.convert.source import Options, Source
from pipelines.convert.writer import write_dataset
from pipelines.storage.split import in_source_order, load_dataset, open_split
from tools.inference.trained_model import TrainedModel, check_same_classes
from tools.sources.imagefolder import open_image_files

PICTURES = "pictures"  # the split that pictures are converted to
MAX_WORKERS = 8  # each imports torch


@dataclass(frozen=True)
class ImageSet:
    """N images in stored order, the same ones for every model."""

    split: str
    folders: tuple[Path, ...]  # the data set that each model reads
    labels: np.ndarray | None  # int64 [N]
    rows: np.ndarray  # int64 [N]: their rows in the source, from 0
    source_rows: int  # N and those that could not be read
    in_source_order: bool
    unreadable: list[dict[str, Any]]  # row, name, reason
    files: tuple[str, ...] | None  # pictures: the path of every source row, within their folder
    is_sorted_by_name: bool = False  # rows are files in the order of their names, of which nothing else is known
    is_unordered: bool = False  # rows are numbered files that come in another order than the numbers

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, sample: int) -> str:
        row = int(self.rows[sample])
        return self.files[row] if self.files else f"row {row} of split {self.split!r}"


def dataset_folder(model: TrainedModel, data_path: str | None) -> Path:
    """The data set that a model reads splits of: the one given, else its own."""
    return Path(data_path or model.config.data.path)


def find_picture_folder(name: str, data: Path) -> Path | None:
    """The folder of pictures that `name` stands for; None where it is a split of the data set, which comes first."""
    folder = Path(name)
    try:
        splits = list(load_dataset(data)["splits"])
    except UserError as error:
        if not folder.is_dir():
            raise UserError(f"{error}, or name it with --data-path") from None
        splits = []
    if name in splits:
        return None
    if (folder / "dataset.json").is_file():
        raise UserError(f"{folder} is a converted data set and no folder of pictures; give --data-path {folder} "
                        f"and one of its splits as --split ({', '.join(load_dataset(folder)['splits'])})")  # fmt: skip
    if not folder.is_dir():
        raise UserError(f"--split {name!r} is neither a split of {data} (it has {', '.join(splits) or 'none'}) "
                        "nor a folder of pictures")  # fmt: skip
    return folder


@contextmanager
def open_images(
    split: str, pictures: Path | None, models: Sequence[TrainedModel], data_path: str | None, scratch: Path
) -> Iterator[ImageSet]:
    """The images of a split, or of a folder of pictures, whose converted form lies in `scratch` while this is open.

    Raises UserError where a data set has other classes than its model, or two data sets hold other images.
    """
    if pictures is None:
        yield load_split(split, models, [dataset_folder(model, data_path) for model in models])
        return
    with tempfile.TemporaryDirectory(prefix=".pictures-", dir=scratch) as temporary:
        source = open_image_files(pictures, PICTURES, models[0].classes)
        folders: dict[Encoding, Path] = {}
        for model in models:
            encoding = picture_encoding(model)
            if encoding not in folders:
                folders[encoding] = Path(temporary) / str(len(folders))
                _convert(source, folders[encoding], Options(encoding))
        rows = source.splits[PICTURES]
        files = tuple(rows.describe(row) for row in range(len(rows)))
        yield load_split(PICTURES, models, [folders[picture_encoding(model)] for model in models], files)


def _convert(source: Source, out: Path, options: Options) -> None:
    try:
        write_dataset(source, out, options, min(MAX_WORKERS, len(os.sched_getaffinity(0))), PICTURES)
    except OSError as error:
        raise UserError(f"cannot convert the pictures in {out.parent.parent}: {error.strerror or error}; "
                        "give another --out") from None  # fmt: skip


def picture_encoding(model: TrainedModel) -> Encoding:
    """How pictures are stored for a model: as its data set was; where that is not known, as they are.

    Raw pixels that came in one size are what pictures are resized to.
    """
    if model.conversion is None:
        return Encoding("jpeg")
    encoding = Encoding(**model.conversion)
    if encoding.name == "jpeg" or encoding.size is not None:
        return encoding
    assert model.stored_shape is not None  # as npy has one shape
    height, width, _ = model.stored_shape
    return Encoding(**{**model.conversion, "size": height}) if height == width else Encoding("jpeg")


def load_split(
    name: str, models: Sequence[TrainedModel], folders: Sequence[Path], files: tuple[str, ...] | None = None
) -> ImageSet:
    """A split, of which each model reads the data set in its folder; files: of pictures, their paths."""
    opened = {folder: open_split(folder, name) for folder in folders}
    rows = {folder: split.source_rows() for folder, split in opened.items()}
    first = opened[folders[0]]
    for model, folder in zip(models, folders, strict=True):
        split = opened[folder]
        check_same_classes(model, split.classes, f"the data set {folder}")
        if not (np.array_equal(rows[folder], rows[folders[0]]) and _same_labels(split.labels, first.labels)):
            raise UserError(f"split {name!r} holds other images in {folder} than in {folders[0]}, so that their "
                            "predictions have no mean; name one data set for all with --data-path")  # fmt: skip
    entry, source = first.dataset["splits"][name], first.dataset.get("source")
    return ImageSet(
        split=name,
        folders=tuple(folders),
        labels=first.labels,
        rows=rows[folders[0]],
        source_rows=entry["source_rows"],
        in_source_order=in_source_order(first.dataset, name),
        unreadable=entry["quarantined"],
        files=files,
        is_unordered=name in first.dataset.get("unordered", ()),
        is_sorted_by_name="unordered" not in first.dataset
        and isinstance(source, dict)
        and source.get("kind") == "imagefolder",
    )


def _same_labels(labels: np.ndarray | None, others: np.ndarray | None) -> bool:
    if labels is None or others is None:
        return labels is others
    return np.array_equal(labels, others)
