"""Read dataset.json, which describes a converted data set, and check all entries that other modules rely on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from configs.utils.errors import UserError, printable, readable

FORMAT, VERSION = "model-zhu-shards", 1
EXTENSIONS = {"npy": "npy", "jpeg": "jpg"}
RECONVERT = "the data set is damaged: run `zhu convert verify` on it and convert the source again"
MAX_BYTES = 2**25  # maximum size of dataset.json, for about 200,000 shards; parsed JSON takes up to 20 times as much
MAX_SIDE = 2**16  # pixels
MAX_COUNT = 2**46  # bytes or samples; half of the address space of a process
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; a JPEG of 4 KB can claim 65,535 x 65,535
HDF5_SUFFIXES = (".hdf5", ".h5")
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")  # the usual ones
MAX_LOOKED_AT = 100  # files per folder whose names are examined for a hint
SPLIT_NAMES = {  # usual names of splits
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SHARD_MIB = 512  # default size of a shard
STORING_SEED = 0  # default seed of the order in which a train split is stored
# Name of a data set in the configs, and also the command that converts it -> options of the command.
DEFAULT_SOURCES: dict[str, list[str]] = {"digits": [], "cifar10": ["--download"], "cifar100": ["--download"]}
CIFAR = {"cifar10": "cifar-10", "cifar100": "cifar-100"}  # command -> prefix of the official file names

T = TypeVar("T")
JsonObject = dict[str, Any]
ChannelValues = tuple[float, float, float]  # one value per color channel


def refuse_external_link(file: Path) -> None:
    """Raise UserError if a file of a data set is a link to a target outside the data set's folder."""
    real = Path(os.path.realpath(file))  # unlike Path.resolve, does not raise on a cycle of links
    if not real.is_relative_to(os.path.realpath(file.parent)):
        raise UserError(
            f"{file} is a link to {real}, outside of the data set; copy the file itself there, or link the whole folder"
        )


@dataclass(frozen=True)
class FileInfo:
    """A file of a data set, as recorded in dataset.json."""

    file: str  # name in the folder of the data set
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """A shard of a split, as recorded in dataset.json."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class QuarantinedSample:
    """A sample of the source that the conversion could not use."""

    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class SplitInfo:
    """The entry of a split in dataset.json."""

    samples: int
    labelled: bool
    source_rows: int  # `samples` plus the quarantined samples
    shuffled: bool  # False: stored in the order of the source's rows, which predictions for a contest need
    quarantined: tuple[QuarantinedSample, ...]
    index: FileInfo
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class SourceInfo:
    """The source that a data set was converted from."""

    kind: str
    name: str
    fingerprint: str


@dataclass(frozen=True)
class ModelDataset:
    """What a model needs to know about its data set. Checkpoints store this as well."""

    name: str
    classes: tuple[str, ...]
    mean: ChannelValues  # for pixels scaled to 0..1
    std: ChannelValues


@dataclass(frozen=True)
class DatasetInfo(ModelDataset):
    """The content of dataset.json. Attributes have the names of the JSON keys; see docs/data-format.md."""

    encoding: str
    image_shape: tuple[int, int, int] | None
    splits: dict[str, SplitInfo]
    options: dict[str, object]  # options of the conversion
    source: SourceInfo
    unordered: tuple[str, ...] | None  # None in older data sets, which do not record it
    reencoded: dict[str, dict[str, int]]  # split -> reason -> number of images; empty in npy and older data sets
    content: JsonObject = field(repr=False)  # the JSON object, with fields unknown to this version

    def identity(self) -> JsonObject:
        """Return the entries that describe the samples: classes, encoding, image shape and splits."""
        return {key: self.content[key] for key in ("classes", "encoding", "image_shape", "splits")}


def load_dataset(folder: str | Path) -> DatasetInfo:
    """Load and check dataset.json.

    Raises:
        UserError: dataset.json is missing, unreadable or invalid, has an unsupported format version, or is a link to a
            file outside the data set. The message says how to fix this.
    """
    path = Path(folder) / "dataset.json"
    return parse_content(_read(path), path)


def parse_content(content: bytes, path: Path | str) -> DatasetInfo:
    """Parse and check the content of dataset.json. `path` is its path or URL for messages.

    Raises:
        UserError: See `load_dataset`.
    """
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        dataset = json.loads(content)
        if dataset["format"] != FORMAT:
            raise ValueError(f"format {_format_value(dataset['format'])}")
        if (version := dataset["version"]) == VERSION:
            return parse_dataset(dataset)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or from another program ({type(error).__name__}: {error}); "
            "convert the source with zhu convert first"
        ) from None
    raise UserError(
        f"{path} has format version {_format_value(version)}, this program reads {VERSION}; convert the source again"
    )


def _read(path: Path) -> bytes:
    """Return the content of dataset.json, at most MAX_BYTES + 1 bytes of it."""
    folder = path.parent
    with readable(path):
        if not folder.exists():
            place = "" if folder.is_absolute() else f" (relative to {Path.cwd()})"
            raise UserError(f"data set folder {str(folder)!r} does not exist{place}; {convert_hint(folder)}")
        if not path.is_file():
            reason = "it contains no dataset.json" if folder.is_dir() else "it is a file, not a folder"
            raise UserError(f"{str(folder)!r} is not a converted data set ({reason}); {convert_hint(folder)}")
        refuse_external_link(path)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)


def fingerprint(dataset: DatasetInfo) -> str:
    """Return the sha256 of a data set's identity. Data sets with equal fingerprints give the same batches."""
    return hashlib.sha256(json.dumps(dataset.identity(), sort_keys=True).encode()).hexdigest()


def safe_name(stem: str) -> str:
    """Return the name of a data set that was read from a file called `stem`: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100]


def is_hdf5(path: Path) -> bool:
    """Return True if a path names an HDF5 file, by its suffix or its content."""
    if path.is_dir():
        return False
    if path.suffix.lower() in HDF5_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE
    except OSError:
        return False


def parse_dataset(content: JsonObject) -> DatasetInfo:
    """Check the entries of dataset.json that other modules rely on.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: An entry is missing or invalid.
    """
    name, classes = _get(content, "name", str), _text_list(content, "classes")
    encoding, splits = _get(content, "encoding", str), _get(content, "splits", dict)
    for text in (name, *classes, *splits):
        if printable(text) != text:
            raise ValueError(f"{_format_value(text)} contains control characters")
    image_shape = _image_shape(content["image_shape"])
    if encoding not in EXTENSIONS or (encoding == "npy" and image_shape is None):
        raise ValueError(f"encoding {_format_value(encoding)} with image shape {_format_value(content['image_shape'])}")
    mean, std = _channel_values(content, "mean"), _channel_values(content, "std")
    if min(std) == 0:
        raise ValueError("std is 0, but pixels are divided by it")
    source = content.get("source", {})
    dataset = DatasetInfo(
        name=name,
        classes=classes,
        mean=mean,
        std=std,
        encoding=encoding,
        image_shape=image_shape,
        splits={split: _split(split, entry) for split, entry in splits.items()},
        options=_get({"options": {}, **content}, "options", dict),
        source=SourceInfo(*(str(source.get(key, "")) for key in ("kind", "name", "fingerprint"))),
        unordered=_text_list(content, "unordered") if "unordered" in content else None,
        reencoded={
            split: {reason: _get(counts, reason, int) for reason in counts}
            for split, counts in content.get("reencoded", {}).items()
        },
        content=content,
    )
    files = [split.index.file for split in dataset.splits.values()]
    files += [shard.file for split in dataset.splits.values() for shard in split.shards]
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise ValueError(f"{_format_value(repeated[0])} is listed twice")
    return dataset


def _image_shape(shape: object) -> tuple[int, int, int] | None:
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 3 and all(type(side) is int for side in shape):
        height, width, channels = shape
        if 0 < height < MAX_SIDE and 0 < width < MAX_SIDE and channels == 3:
            return height, width, channels
    raise ValueError(f"image_shape is {_format_value(shape)}")


def _channel_values(content: JsonObject, name: str) -> ChannelValues:
    values = _get(content, name, list)
    if len(values) != 3 or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
        raise ValueError(f"{name} is {_format_value(values)}, not three numbers from 0 to 1")
    red, green, blue = values
    return red, green, blue


def _split(name: str, entry: JsonObject) -> SplitInfo:
    samples, source_rows = _get(entry, "samples", int), _get(entry, "source_rows", int)
    shards = tuple(_shard(shard) for shard in _get(entry, "shards", list))
    in_shards = sum(shard.samples for shard in shards)
    if in_shards != samples:
        raise ValueError(f"split {_format_value(name)} has {samples} samples, but its shards {in_shards}")
    quarantined = _get(entry, "quarantined", list)
    if samples + len(quarantined) != source_rows:
        raise ValueError(
            f"split {_format_value(name)}: {samples} samples and {len(quarantined)} quarantined ones "
            f"do not add up to the {source_rows} rows of the source"
        )
    return SplitInfo(
        samples=samples,
        labelled=_get(entry, "labelled", bool),
        source_rows=source_rows,
        # Older data sets do not record whether a split is shuffled; in those, only the train split is.
        shuffled=_get({"shuffled": name == "train", **entry}, "shuffled", bool),
        quarantined=tuple(
            QuarantinedSample(_get(sample, "row", int), _get(sample, "name", str), _get(sample, "reason", str))
            for sample in quarantined
        ),
        index=_file(_get(entry, "index", dict)),
        shards=shards,
    )


def _shard(entry: JsonObject) -> ShardInfo:
    file = _file(entry)
    return ShardInfo(file.file, _get(entry, "samples", int), file.bytes, file.sha256)


def _file(entry: JsonObject) -> FileInfo:
    file = _get(entry, "file", str)
    if Path(file).name != file or file in ("", "..") or "\0" in file:
        raise ValueError(f"{_format_value(file)} is not a plain file name")
    return FileInfo(file, _get(entry, "bytes", int), _get(entry, "sha256", str))


def _text_list(entry: JsonObject, name: str) -> tuple[str, ...]:
    values = _get(entry, name, list)
    if not all(type(value) is str for value in values):
        raise TypeError(f"{name} are not all text" if name == "classes" else f"{name} is {_format_value(values)}")
    return tuple(values)


def _get(entry: JsonObject, name: str, kind: type[T]) -> T:
    value = entry[name]
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value <= MAX_COUNT):
        raise TypeError(f"{name} is {_format_value(value)}")
    return value


def _format_value(value: object) -> str:
    """Return a representation of a JSON value with at most 80 characters, for an error message."""
    if isinstance(value, int) and value.bit_length() > 200:  # converting a huge number to decimal would be slow
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def convert_hint(folder: str | Path) -> str:
    """Return the end of an error message: how to convert `folder` with tools/convert.py.

    Only file names are examined. `tools/sources` checks the content of a source.

    Args:
        folder: A source, or a data set that does not exist yet.
    """
    path = Path(folder)
    command, source, out = _command(path)
    if not command:
        return "convert the source with zhu convert first"
    words = ["zhu", "convert", command, *source, "--out", str(out)]
    use = "" if out == path else f", and give {out} as the data set"
    if known_conversion(path) and not path.exists():
        use = ", or start training with --prepare, which does this first"
    in_place = f"name the HDF5 file itself as the data set (data.path={source[1]}), or " if command == "hdf5" else ""
    return f"{in_place}convert it first: {shlex.join(words)}{use}"


def _command(path: Path) -> tuple[str, list[str], Path]:
    """Guess how to convert `path` with tools/convert.py.

    Returns:
        The subcommand ("" if unknown), its source options, and the value for --out.
    """
    try:
        if not path.exists():
            return _for_missing(path)
        files = [path] if path.is_file() else sorted(path.iterdir())
        inner = [file for folder in files if folder.is_dir() for file in islice(folder.iterdir(), MAX_LOOKED_AT)]
    except OSError:  # not readable by this user
        return "", [], path
    names = [file.name for file in files]
    for file in files:
        if file.suffix.lower() in HDF5_SUFFIXES:
            return "hdf5", ["--source", str(file)], Path("data") / file.stem
    for command, beginning in CIFAR.items():
        if path.name.startswith(f"{beginning}-") or any(name.startswith(f"{beginning}-") for name in names):
            return command, ["--source", str(path)], Path("data") / command
    # Folder names of the train split, as in tools.sources.imagefolder, which this package must not import.
    if path.is_dir() and not {name.lower() for name in names}.isdisjoint(("train", "training")):
        return "imagefolder", ["--source", str(path)], Path("data") / f"{path.resolve().name}-converted"
    if path.is_dir() and any(file.suffix.lower() in IMAGE_SUFFIXES for file in inner):  # class folders
        options = ["--source", str(path), "--val-fraction", "0.1"]
        return "imagefolder", options, Path("data") / f"{path.resolve().name}-converted"
    return "", [], path


def _for_missing(path: Path) -> tuple[str, list[str], Path]:
    """Do the same as `_command` for a data set that does not exist.

    The source is guessed from the folder's name. The known names are those in the configs of this project and of the
    homework.
    """
    if path.name in DEFAULT_SOURCES:
        return path.name, DEFAULT_SOURCES[path.name], path
    if path.name.startswith("medium-imagenet"):
        return "hdf5", ["--source", "FILE.hdf5"], path
    return "", [], path


def known_conversion(folder: Path) -> list[str] | None:
    """Return the arguments of tools/convert.py that create a data set which needs no file from the user.

    The name of `folder` determines the source. Return None if it is not a name of such a data set.
    """
    options = DEFAULT_SOURCES.get(folder.name)
    return None if options is None else [folder.name, *options, "--out", str(folder)]
