"""Read dataset.json, which describes a converted data set, and check all entries that other modules rely on."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from configs.utils.errors import UserError, printable, readable

FORMAT, VERSION = "model-zhu-shards", 1
EXTENSIONS = {"npy": "npy", "jpeg": "jpg"}
RECONVERT = "the data set is damaged: run `tools/convert.py verify` on it and convert the source again"
MAX_BYTES = 2**25  # maximum size of dataset.json, for about 200,000 shards; parsed JSON takes up to 20 times as much
MAX_SIDE = 2**16  # pixels
MAX_COUNT = 2**46  # bytes or samples; half of the address space of a process
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; a JPEG of 4 KB can claim 65,535 x 65,535
HDF5_SUFFIXES = (".hdf5", ".h5")
CIFAR = {"cifar10": "cifar-10", "cifar100": "cifar-100"}  # command -> prefix of the official file names


def refuse_external_link(file: Path) -> None:
    """Raise UserError if a file of a data set is a link to a target outside the data set's folder."""
    real = Path(os.path.realpath(file))  # unlike Path.resolve, does not raise on a cycle of links
    if not real.is_relative_to(os.path.realpath(file.parent)):
        raise UserError(
            f"{file} is a link to {real}, outside of the data set; copy the file itself there, or link the whole folder"
        )


def load_dataset(folder: str | Path) -> dict[str, Any]:
    """Load and check dataset.json.

    Raises:
        UserError: dataset.json is missing, unreadable or invalid, has an unsupported format version, or is a link to a
            file outside the data set. The message says how to fix this.
    """
    path = Path(folder) / "dataset.json"
    with readable(path):
        if not path.parent.exists():
            raise UserError(f"data set folder {str(folder)!r} does not exist; {convert_hint(folder)}")
        if not path.is_file():
            reason = "it contains no dataset.json" if path.parent.is_dir() else "it is a file, not a folder"
            raise UserError(f"{str(folder)!r} is not a converted data set ({reason}); {convert_hint(folder)}")
        refuse_external_link(path)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        dataset = json.loads(content)
        if dataset["format"] != FORMAT:
            raise ValueError(f"format {_format_value(dataset['format'])}")
        if (version := dataset["version"]) == VERSION:
            _check(dataset)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or from another program ({type(error).__name__}: {error}); "
            "convert the source with tools/convert.py first"
        ) from None
    if version != VERSION:
        raise UserError(
            f"{path} has format version {_format_value(version)}, this program reads {VERSION}; "
            "convert the source again"
        )
    return dataset  # type: ignore[no-any-return]


def in_source_order(dataset: dict[str, Any], split: str) -> bool:
    """Return True if the samples of a split are stored in the order of the source's rows.

    Predictions for a contest need this order. Older data sets do not record whether a split is shuffled; in those, only
    the train split is.
    """
    return not dataset["splits"][split].get("shuffled", split == "train")


def fingerprint(dataset: dict[str, Any]) -> str:
    """Return the sha256 of the entries that describe the samples: classes, encoding, image shape and splits.

    A run gets the same batches from data sets with equal fingerprints.
    """
    content = {key: dataset[key] for key in ("classes", "encoding", "image_shape", "splits")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_DATASET_FIELDS: dict[str, type] = {
    "name": str,
    "classes": list,
    "encoding": str,
    "mean": list,
    "std": list,
    "splits": dict,
}
_SPLIT_FIELDS: dict[str, type] = {
    "samples": int,
    "labelled": bool,
    "source_rows": int,
    "quarantined": list,
    "index": dict,
    "shards": list,
}
_FILE_FIELDS: dict[str, type] = {"file": str, "bytes": int, "sha256": str}


def _check(dataset: dict[str, Any]) -> None:
    """Check all entries that other modules rely on.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: An entry is missing or invalid.
    """
    _check_fields(dataset, _DATASET_FIELDS)
    if not all(type(name) is str for name in dataset["classes"]):
        raise TypeError("classes are not all text")
    for text in (dataset["name"], *dataset["classes"], *dataset["splits"]):
        if printable(text) != text:
            raise ValueError(f"{_format_value(text)} contains control characters")
    shape = dataset["image_shape"]
    if dataset["encoding"] not in EXTENSIONS or (dataset["encoding"] == "npy" and shape is None):
        raise ValueError(f"encoding {_format_value(dataset['encoding'])} with image shape {_format_value(shape)}")
    if shape is not None and not (
        type(shape) is list
        and all(type(side) is int for side in shape)
        and [0 < side < MAX_SIDE for side in shape[:2]] == [True, True]
        and shape[2:] == [3]
    ):
        raise ValueError(f"image_shape is {_format_value(shape)}")
    for name in ("mean", "std"):
        values = dataset[name]
        if len(values) != 3 or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
            raise ValueError(f"{name} is {_format_value(values)}, not three numbers from 0 to 1")
    if min(dataset["std"]) == 0:
        raise ValueError("std is 0, but pixels are divided by it")
    for name, split in dataset["splits"].items():
        _check_split(name, split)
    if not all(type(name) is str for name in dataset.get("unordered", [])):  # absent in older data sets
        raise TypeError(f"unordered is {_format_value(dataset['unordered'])}")
    for reasons in dataset.get("reencoded", {}).values():  # absent in npy and older data sets
        _check_fields(reasons, dict.fromkeys(reasons, int))
    files = [shard["file"] for split in dataset["splits"].values() for shard in (split["index"], *split["shards"])]
    if repeated := [file for file, count in Counter(files).items() if count > 1]:
        raise ValueError(f"{_format_value(repeated[0])} is listed twice")


def _check_split(name: str, split: dict[str, Any]) -> None:
    _check_fields(split, _SPLIT_FIELDS)
    for shard in split["shards"]:
        _check_fields(shard, {**_FILE_FIELDS, "samples": int})
    _check_fields(split["index"], _FILE_FIELDS)
    for entry in (split["index"], *split["shards"]):
        file = entry["file"]
        if Path(file).name != file or file in ("", "..") or "\0" in file:
            raise ValueError(f"{_format_value(file)} is not a plain file name")
    in_shards = sum(shard["samples"] for shard in split["shards"])
    if in_shards != split["samples"]:
        raise ValueError(f"split {_format_value(name)} has {split['samples']} samples, but its shards {in_shards}")
    if split["samples"] + len(split["quarantined"]) != split["source_rows"]:
        raise ValueError(
            f"split {_format_value(name)}: {split['samples']} samples and {len(split['quarantined'])} quarantined ones "
            f"do not add up to the {split['source_rows']} rows of the source"
        )


def _check_fields(entry: dict[str, Any], fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        value = entry[name]
        if type(value) is not kind or (isinstance(value, int) and not 0 <= value <= MAX_COUNT):
            raise TypeError(f"{name} is {_format_value(value)}")


def _format_value(value: Any) -> str:
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
        return "convert the source with tools/convert.py first"
    words = ["python", "tools/convert.py", command, *source, "--out", str(out)]
    use = "" if out == path else f", and give {out} as the data set"
    return f"convert it first: {shlex.join(words)}{use}"


def _command(path: Path) -> tuple[str, list[str], Path]:
    """Guess how to convert `path` with tools/convert.py.

    Returns:
        The subcommand ("" if unknown), its source options, and the value for --out.
    """
    try:
        if not path.exists():
            return _for_missing(path)
        files = [path] if path.is_file() else sorted(path.iterdir())
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
    return "", [], path


def _for_missing(path: Path) -> tuple[str, list[str], Path]:
    """Do the same as `_command` for a data set that does not exist.

    The source is guessed from the folder's name. The known names are those in the configs of this project and of the
    homework.
    """
    if path.name in CIFAR:
        return path.name, ["--download"], path
    if path.name == "digits":
        return "digits", [], path
    if path.name.startswith("medium-imagenet"):
        return "hdf5", ["--source", "FILE.hdf5"], path
    return "", [], path
