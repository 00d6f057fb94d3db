"""Open the images to run models on: a split of a converted data set, or pictures: image files and folders of
them.

Pictures are first converted with the settings of each model's data set, so that they are loaded like a split.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import is_url
from pipelines.convert.source import Encoding, Options, Source
from pipelines.convert.writer import convert_source
from pipelines.open import load_dataset, open_split
from pipelines.storage.dataset import QuarantinedSample
from tools.sources.image_files import open_image_files
from train.trained_model import TrainedModel, check_same_classes, picture_encoding

PICTURES = "pictures"  # name of the split that pictures are converted to
MAX_WORKERS = 8  # each imports torch


@dataclass(frozen=True)
class ImageSet:
    """N images in stored order, the same for every model."""

    split: str
    folders: tuple[str | Path, ...]  # the data set that each model reads
    labels: np.ndarray | None  # int64 [N]
    rows: np.ndarray  # int64 [N]: rows in the source, from 0
    source_rows: int  # N plus the images that could not be read
    in_source_order: bool
    unreadable: tuple[QuarantinedSample, ...]
    files: tuple[str, ...] | None  # for pictures, the path of each source row
    is_sorted_by_name: bool = False  # rows are files sorted by name; whether their numbers ascend is not recorded
    is_unordered: bool = False  # rows are numbered files whose numbers do not ascend

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, sample: int) -> str:
        """Return the file name or row of a sample as text for messages."""
        row = int(self.rows[sample])
        return self.files[row] if self.files else f"row {row} of split {self.split!r}"


def dataset_folder(model: TrainedModel, data_path: str | None) -> str | Path:
    """Return the folder or URL of the data set to read splits from: `data_path` if given, else the run's data.path."""
    path = data_path or model.config.data.path
    return path if is_url(path) else Path(path)


def find_picture_folder(name: str, data: str | Path) -> Path | None:
    """Return the folder of pictures called `name`, or None if the data set in `data` has a split of this name.

    Raises UserError if there is neither such a split nor such a folder, or if the folder is a converted data set.
    """
    folder = Path(name)
    try:
        splits = list(load_dataset(data).splits)
    except UserError as error:
        if not folder.is_dir():
            raise UserError(f"give the data set with --data-path: {error}") from None
        splits = []
    if name in splits:
        return None
    if (folder / "dataset.json").is_file():
        raise UserError(
            f"{folder} is a converted data set, not a folder of pictures; give --data-path {folder} and one of its "
            f"splits as --split ({', '.join(load_dataset(folder).splits)})"
        )
    if not folder.is_dir():
        raise UserError(
            f"--split {name!r} is neither a split of {data} (it has {', '.join(splits) or 'none'}) nor a folder of "
            "pictures; give image files before the options, without --split"
        )
    return folder


@contextmanager
def open_images(
    split: str,
    pictures: Sequence[Path],
    models: Sequence[TrainedModel],
    data_path: str | None,
    scratch: Path,
    *,
    follow_links: bool = False,
) -> Iterator[ImageSet]:
    """Open the images of a split, or pictures.

    Args:
        split: Name of the split. Ignored for pictures.
        pictures: Image files and folders of them, or nothing to open the split.
        models: The models that will run on the images.
        data_path: The data set that contains the split, or None for the data set of each model. Ignored for pictures.
        scratch: Folder for the converted pictures. They are deleted when the context ends.
        follow_links: Whether to follow links out of folders of pictures.

    Raises:
        UserError: The images cannot be read or converted, a data set's classes differ from its model's, or the models'
            data sets contain different images.
    """
    if not pictures:
        yield load_split(split, models, [dataset_folder(model, data_path) for model in models])
        return
    with tempfile.TemporaryDirectory(prefix=".pictures-", dir=scratch) as temporary:
        source = open_image_files(pictures, PICTURES, models[0].dataset.classes, follow_links=follow_links)
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
        convert_source(source, out, options, min(MAX_WORKERS, len(os.sched_getaffinity(0))), PICTURES)
    except OSError as error:
        raise UserError(
            f"cannot convert the pictures in {out.parent.parent}: {error.strerror or error}; give another --out"
        ) from None


def load_split(
    name: str, models: Sequence[TrainedModel], folders: Sequence[str | Path], files: tuple[str, ...] | None = None
) -> ImageSet:
    """Open a split as an image set.

    Args:
        name: Name of the split.
        models: The models that will run on the images.
        folders: The data set that each model reads.
        files: For pictures, the path of each source row.

    Raises:
        UserError: A split cannot be opened, a data set's classes differ from its model's, or the data sets contain
            different images.
    """
    for folder in folders:
        if isinstance(folder, Path) and not folder.exists():
            raise UserError(f"give the data set with --data-path: {folder.absolute()} does not exist")
    opened = {
        folder: open_split(
            folder,
            name,
            classes=model.eval_data_config(folder).classes,
            cache=model.config.data.cache,
            cache_gib=model.config.data.cache_gib,
        )
        for model, folder in zip(models, folders, strict=True)
    }
    rows = {folder: split.source_rows() for folder, split in opened.items()}
    first = opened[folders[0]]
    for model, folder in zip(models, folders, strict=True):
        split = opened[folder]
        check_same_classes(model, split.classes, f"the data set {folder}")
        if not (np.array_equal(rows[folder], rows[folders[0]]) and _same_labels(split.labels, first.labels)):
            raise UserError(
                f"split {name!r} of {folder} and of {folders[0]} contain different images, so their predictions cannot "
                "be averaged; give one data set for all checkpoints with --data-path"
            )
    return ImageSet(
        split=name,
        folders=tuple(folders),
        labels=first.labels,
        rows=rows[folders[0]],
        source_rows=first.info.source_rows,
        in_source_order=not first.info.shuffled,
        unreadable=first.info.quarantined,
        files=files,
        is_unordered=name in (first.dataset.unordered or ()),
        is_sorted_by_name=first.dataset.unordered is None and first.dataset.source.kind == "imagefolder",
    )


def _same_labels(labels: np.ndarray | None, others: np.ndarray | None) -> bool:
    if labels is None or others is None:
        return labels is others
    return np.array_equal(labels, others)
