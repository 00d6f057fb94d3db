"""Proves that a data set is what dataset.json says: every sha256, and index against tar, member by member."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.errors import UserError
from pipelines import shards, tar_layout

CHUNK = 2**22


def verify(folder: str | Path) -> list[str]:
    """Problems found, one sentence each, in reading order; empty when the data set is sound."""
    folder = Path(folder)
    dataset = shards.load_dataset(folder)
    total = sum(shard["bytes"] for split in dataset["splits"].values() for shard in split["shards"])
    problems: list[str] = []
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as bar:
        for name, entry in dataset["splits"].items():
            problems += _verify_split(folder, dataset, name, entry, bar)
    if not (folder / "_info.json").is_file():
        problems.append("_info.json is missing")
    else:
        problems += _verify_info(folder, dataset)
    return problems


def _verify_split(folder: Path, dataset: dict[str, Any], name: str, entry: dict[str, Any], bar: tqdm) -> list[str]:
    problems = []
    for shard in entry["shards"]:
        problem = _content_problem(folder / shard["file"], shard["bytes"], shard["sha256"], bar)
        if problem:
            problems.append(problem)
    rows = entry["samples"] + len(entry["quarantined"])
    if rows != entry["source_rows"]:
        problems.append(
            f"split {name!r}: {entry['samples']} samples and {len(entry['quarantined'])} quarantined ones "
            f"do not make up the {entry['source_rows']} rows of the source"
        )
    try:
        split = shards.open_split(folder, name)
    except UserError as error:
        return problems or [str(error).removesuffix(f"; {shards.RECONVERT}")]
    for number, file in enumerate(split.files):
        chosen = np.flatnonzero(split.shard == number)
        problem = _members_problem(split, file, number, chosen)
        if problem:
            problems.append(problem)
    return problems


def _content_problem(file: Path, size: int, sha256: str, bar: tqdm) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size:,} bytes where dataset.json says {size:,}"
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return None if digest.hexdigest() == sha256 else f"{file.name} does not have the sha256 that dataset.json gives"


def _members_problem(split: shards.Split, file: Path, number: int, chosen: np.ndarray) -> str | None:
    """Compare one tar's members with the index: names, order, offsets, sizes and labels, and DALI's .idx beside it."""
    extension = shards.EXTENSIONS[split.encoding]
    idx = [f"{tar_layout.INDEX_VERSION} {len(chosen)}\n"]
    try:
        with tarfile.open(file, "r:") as archive:
            for sample in chosen.tolist():
                member = archive.next()
                offset = int(split.address[sample]) - number * split.slot_bytes
                found = (member.name.partition(".")[2], member.offset_data, member.size) if member else None
                if member is None or found != (extension, offset, int(split.size[sample])):
                    return f"{file.name} holds {found} where the index places {split.describe(sample)}"
                if (sides := _image_sides(split, sample)) != (split.heights[sample], split.widths[sample]):
                    indexed = (int(split.heights[sample]), int(split.widths[sample]))
                    return (
                        f"{file.name}: {split.describe(sample)} is {sides} pixels high and wide, indexed as {indexed}"
                    )
                key, label = member.name.partition(".")[0], None
                if split.labels is not None:
                    label = archive.next()
                    indexed_label = int(split.labels[sample])
                    found_label = archive.extractfile(label) if label and label.name == f"{key}.cls" else None
                    stored = found_label.read() if found_label else None
                    if stored != tar_layout.label_text(indexed_label, len(split.classes)):
                        return f"{file.name} gives {stored!r} as label of {key}, the index says {indexed_label}"
                idx.append(tar_layout.index_line(key, extension, offset, member.size, label.size if label else None))
            if not len(chosen):  # Python 3.10 cannot read past the end of an empty tar
                if file.stat().st_size != len(tar_layout.END_OF_ARCHIVE):
                    return f"{file.name} holds samples, but the index lists none"
            elif (rest := archive.next()) is not None:
                return f"{file.name} holds {rest.name}, which the index does not list"
    except tarfile.TarError as error:
        return f"{file.name} is no readable tar ({error})"
    beside = file.with_suffix(".idx")
    if not beside.is_file():
        return f"{beside.name} is missing"
    return None if beside.read_text(errors="replace") == "".join(idx) else f"{beside.name} disagrees with {file.name}"


def _image_sides(split: shards.Split, sample: int) -> tuple[int, int] | None:
    """(height, width) that the stored image itself claims; None where it is no image of the split's encoding."""
    begin = int(split.address[sample])
    content = split.content[begin : begin + int(split.size[sample])].tobytes()
    if split.image_shape is not None and split.encoding == "npy":
        return split.image_shape[:2] if content.startswith(tar_layout.npy_header(split.image_shape)) else None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return image.height, image.width
    except OSError:
        return None


def _verify_info(folder: Path, dataset: dict[str, Any]) -> list[str]:
    try:
        splits = json.loads((folder / "_info.json").read_text())["splits"]
        lengths = {name: split["shard_lengths"] for name, split in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"_info.json cannot be read ({error})"]
    expected = {name: [s["samples"] for s in entry["shards"]] for name, entry in dataset["splits"].items()}
    return [] if lengths == expected else ["_info.json disagrees with dataset.json"]
