"""Read CIFAR-10 and CIFAR-100 as published: pickled batches in a folder or in the .tar.gz archive.

If the source is a folder, each worker process reads the batches that it needs. An archive can only be read
sequentially, so the main process reads all pixels (184 MB) once and sends them to the workers. The archive is not
unpacked to disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from pipelines.convert.source import Source, SplitSource
from tools.sources.safe_unpickler import load_pickle
from tools.sources.tar_gz import read_members

SIZE = 32  # pixels
ROW_BYTES = 3 * SIZE * SIZE
MAX_FILE_BYTES = 512 << 20  # the largest official file has 155 MB
MAX_ARCHIVE_BYTES = 1 << 30  # uncompressed size; the official archives have 186 MB


@dataclass(frozen=True)
class CifarEdition:
    """File names and pickle keys of CIFAR-10 or CIFAR-100."""

    kind: str
    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


EDITIONS = {
    "cifar10": CifarEdition(
        kind="cifar10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        names="label_names",
    ),
    "cifar100": CifarEdition(
        kind="cifar100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("train",),
        test="test",
        meta="meta",
        labels="fine_labels",
        names="fine_label_names",
    ),
}


class CifarSplit:
    """One split, which consists of the rows of its batches in order."""

    def __init__(
        self,
        edition: CifarEdition,
        path: Path,
        labels: dict[str, np.ndarray],  # of each batch, by file name
        loaded: dict[str, np.ndarray],
        labelled: bool = True,
    ) -> None:
        self._edition, self._path = edition, path
        self._batches = {file: len(numbers) for file, numbers in labels.items()}  # file name -> number of rows
        self._loaded = loaded  # file name -> pixels, uint8 [rows, 3072]
        self.labels = np.concatenate([*labels.values()]) if labelled else None
        self.bytes_per_row = ROW_BYTES

    def __len__(self) -> int:
        return sum(self._batches.values())

    def __getstate__(self) -> dict[str, object]:
        if self._path.is_file():  # sending pixels once is cheaper than reading the archive in each worker
            return self.__dict__
        return {**self.__dict__, "_loaded": {}}

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Yield the images from `start` up to `stop` (exclusive), uint8 [32, 32, 3].

        Batches stay in memory after they are read (154 MB for train).

        Raises:
            UserError: A batch is missing or invalid, or its number of rows has changed since the source was opened.
        """
        first = 0
        for file, rows in self._batches.items():
            if start < first + rows and first < stop:
                for row in self._pixels(file)[max(start - first, 0) : stop - first]:
                    yield np.ascontiguousarray(row.reshape(3, SIZE, SIZE).transpose(1, 2, 0))
            first += rows

    def describe(self, row: int) -> str:
        for file, rows in self._batches.items():
            if row < rows:
                return f"{file}[{row}]"
            row -= rows
        raise IndexError(row)

    def _pixels(self, file: str) -> np.ndarray:
        if file not in self._loaded:
            for name, content in _read_files(self._path, (file,)):
                self._loaded[name], _ = _parse_batch(self._edition, content, f"{self._path}: {name}")
        if file not in self._loaded or len(self._loaded[file]) != self._batches[file]:
            raise UserError(f"{self._path}: {file} changed while it was converted; start the conversion again")
        return self._loaded[file]


def open_cifar(kind: str, source: Path) -> Source:
    """Open CIFAR-10 or CIFAR-100. The test batch becomes the val split and, without its labels, the test split.

    All files are read completely to get the labels and the fingerprint, and to verify the checksum of an archive.

    Args:
        kind: Key of `EDITIONS`.
        source: The official folder, the official .tar.gz archive, or a folder that contains either.

    Raises:
        UserError: The source is missing, unreadable, incomplete or damaged.
    """
    edition = EDITIONS[kind]
    path = _locate(edition, source)
    labels: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    loaded: dict[str, np.ndarray] = {}
    for file, content in _read_files(path, edition.files):
        digests[file] = hashlib.sha256(content).hexdigest()
        if file == edition.meta:
            classes = _parse_classes(edition, content, f"{path}: {file}")
        else:
            pixels, labels[file] = _parse_batch(edition, content, f"{path}: {file}")
            if path.is_file():
                loaded[file] = pixels
    missing = [file for file in edition.files if file not in digests]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; a {kind} source contains {', '.join(edition.files)}")
    for file, numbers in labels.items():
        if numbers.max() >= len(classes):
            raise UserError(
                f"{path}: {file} has labels up to {numbers.max()}, but {edition.meta} names {len(classes)} classes "
                f"(0 to {len(classes) - 1}); fetch the files again"
            )
    train = {file: labels[file] for file in edition.train}
    test = {edition.test: labels[edition.test]}
    splits: dict[str, SplitSource] = {
        "train": CifarSplit(edition, path, train, loaded),
        "val": CifarSplit(edition, path, test, loaded),
        "test": CifarSplit(edition, path, test, loaded, labelled=False),
    }
    fingerprint = hashlib.sha256("\n".join(f"{file} {digests[file]}" for file in edition.files).encode()).hexdigest()
    return Source(kind=kind, name=path.name, classes=classes, fingerprint=fingerprint, splits=splits)


def find_folder(kind: str, source: Path) -> Path | None:
    """Return `source` or the official folder in it, whichever contains files of this data set, otherwise None."""
    edition = EDITIONS[kind]
    folders = (source, source / edition.folder)
    return next((folder for folder in folders if any((folder / file).is_file() for file in edition.files)), None)


def _locate(edition: CifarEdition, source: Path) -> Path:
    if source.is_file():
        return source
    if (folder := find_folder(edition.kind, source)) is not None:
        return folder
    if (source / edition.archive).is_file():
        return source / edition.archive
    raise UserError(
        f"no {edition.kind} at {str(source)!r}: pass the folder {edition.folder}, which contains "
        f"{', '.join(edition.files)}, or {edition.archive}, or the folder above either, as --source, or fetch it with "
        "--download"
    )


def _read_files(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each existing file among `names`. An archive is read to its end.

    Raises UserError if a file cannot be read, is too large, or is a link that leads out of the folder.
    """
    if path.is_file():
        yield from read_members(path, names, _check_file_size, MAX_ARCHIVE_BYTES)
        return
    for name in names:
        file = path / name
        try:
            if file.is_file():
                if not file.resolve().is_relative_to(path.resolve()):
                    raise UserError(f"{file} is a symbolic link that leads out of its folder; copy the file into it")
                _check_file_size(file.stat().st_size, str(file))
                yield name, file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None


def _check_file_size(size: int, file: str) -> None:
    if size > MAX_FILE_BYTES:
        raise UserError(f"{file} has {size:,} bytes, but no CIFAR file exceeds {MAX_FILE_BYTES:,}; fetch it again")


def _parse_batch(edition: CifarEdition, content: bytes, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels, uint8 [rows, 3072], and the labels, int64 [rows], of a batch.

    Raises UserError if the batch is invalid.
    """
    batch = load_pickle(content, file)
    missing = [key for key in ("data", edition.labels) if key not in batch]
    if missing:
        raise UserError(
            f"{file} lacks {' and '.join(missing)} (it has {', '.join(batch)[:200]}); is it another edition's?"
        )
    pixels = batch["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (ROW_BYTES,):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise UserError(f"{file}: data is {found}; CIFAR's is uint8 (rows, {ROW_BYTES})")
    labels = batch[edition.labels]
    if isinstance(labels, np.ndarray) and labels.ndim == 1:  # more axes: perhaps a huge shape without elements
        labels = labels.tolist()
    if not isinstance(labels, list) or len(labels) != len(pixels) or not labels:
        raise UserError(f"{file}: {edition.labels} must be one number for each of the {len(pixels)} images of data")
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in labels):
        raise UserError(f"{file}: {edition.labels} contains values that are not class numbers; fetch the file again")
    return pixels, np.array(labels, np.int64)


def _parse_classes(edition: CifarEdition, content: bytes, file: str) -> tuple[str, ...]:
    names = load_pickle(content, file).get(edition.names)
    if not isinstance(names, list) or not names or not all(isinstance(name, (bytes, str)) for name in names):
        raise UserError(f"{file} contains no list {edition.names!r} of class names; fetch the file again")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)
