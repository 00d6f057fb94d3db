"""Check the files of a data set against their sha256 in dataset.json, and the members of shards against the index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from pipelines.storage import hash_cache, tar_check, tar_format
from pipelines.storage.dataset import EXTENSIONS, MAX_BYTES, RECONVERT, DatasetInfo, ShardInfo, load_dataset
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

if TYPE_CHECKING:
    from tqdm import tqdm


def verify(folder: str | Path) -> list[str]:
    """Return the problems found in a data set, one sentence each. The list is empty if the data set is intact.

    Raises:
        UserError: `folder` is not a converted data set, or its dataset.json is invalid.
    """
    folder = Path(folder)
    dataset = load_dataset(folder)
    total = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards)
    problems: list[str] = []
    with progress_bar(total=total, desc="verify", unit="B", unit_scale=True, unit_divisor=1024) as bar:
        for name in dataset.splits:
            problems += _verify_split(folder, dataset, name, bar)
    return problems + info_errors(folder, dataset)


def _verify_split(folder: Path, dataset: DatasetInfo, name: str, bar: tqdm) -> list[str]:
    shards = dataset.splits[name].shards
    results = _hash_shards(folder, shards, bar)
    record = hash_cache.HashCache(folder, hash_cache.shard_names(dataset))
    for result, shard in zip(results, shards, strict=True):
        if not isinstance(result, str):
            record.add(shard.file, result)
    record.save()
    problems = [result for result in results if isinstance(result, str)]
    try:
        split = open_split(folder, name, verify="off")
    except UserError as error:
        return problems or [str(error).removesuffix(f"; {RECONVERT}")]
    for number, result in enumerate(results):
        if not isinstance(result, str) and (problem := shard_error(split, number, result.sha256)):
            problems.append(problem)
    return problems


def shard_error(split: Split, number: int, sha256: str) -> str | None:
    """Return the problem of a shard with the size that dataset.json gives, or None if it is intact.

    Args:
        split: Split that contains the shard. The contents of other shards are not read.
        number: Index of the shard in the split.
        sha256: Actual hash of the shard.
    """
    shard = split.info.shards[number]
    if sha256 != shard.sha256:
        text = tar_check.diagnose(split, number, sha256).text
        return f"{shard.file} does not have the sha256 that dataset.json gives: {text}"
    return _members_error(split, number)


def _hash_shards(folder: Path, shards: Sequence[ShardInfo], bar: tqdm) -> list[hash_cache.HashedFile | str]:
    """Return the hash of each shard, or a sentence if its file is missing, unreadable or of the wrong size."""
    results: dict[int, hash_cache.HashedFile | str] = {}
    for number, shard in enumerate(shards):
        file = folder / shard.file
        try:
            if not file.is_file():
                results[number] = f"{file.name} is missing"
            elif (size := file.stat().st_size) != shard.bytes:
                results[number] = f"{file.name} has {size:,} bytes, but dataset.json says {shard.bytes:,}"
        except OSError as error:
            results[number] = f"{file.name} {_reason(error)}"
    sized = [number for number in range(len(shards)) if number not in results]
    for place, content in hash_cache.hash_files([folder / shards[number].file for number in sized], bar):
        file_name = shards[sized[place]].file
        results[sized[place]] = f"{file_name} {_reason(content)}" if isinstance(content, OSError) else content
    return [results[number] for number in range(len(shards))]


def _members_error(split: Split, number: int) -> str | None:
    """Return the first disagreement between a shard's tar, the index and DALI's .idx file, or None if there is none."""
    file, chosen = split.files[number], np.flatnonzero(split.shard == number)
    if problem := tar_check.layout_error(split, number, chosen):
        return f"{file.name}: {problem}"
    for sample in chosen.tolist():
        if problem := tar_check.image_error(split, sample, decodes=False):
            return f"{file.name}: {split.describe(sample)} {problem}"
    beside = file.with_suffix(".idx")
    rows, offsets = split.source_rows(chosen), split.address[chosen] - number * split.slot_bytes
    extension, sizes = EXTENSIONS[split.encoding], split.size[chosen]
    expected = tar_format.index_text(rows, extension, offsets, sizes, split.label_digits).encode()
    try:
        is_equal = _read_start(beside, len(expected) + 1) == expected
    except OSError as error:
        return f"{beside.name} {_reason(error)}"
    return None if is_equal else f"{beside.name} disagrees with {file.name}"


def _read_start(file: Path, most: int) -> bytes:
    """Read up to `most` bytes of a regular file.

    Raises:
        FileNotFoundError: The file is missing or not a regular file. Reading from a pipe might block forever.
        OSError: The file cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError
    with file.open("rb") as opened:
        return opened.read(most)


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def info_errors(folder: Path, dataset: DatasetInfo) -> list[str]:
    """Return the problems of _info.json."""
    try:
        splits = json.loads(_read_start(folder / "_info.json", MAX_BYTES))["splits"]
        lengths = {name: split["shard_lengths"] for name, split in splits.items()}
    except OSError as error:
        return [f"_info.json {_reason(error)}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"_info.json cannot be read ({error})"]
    expected = {name: [shard.samples for shard in split.shards] for name, split in dataset.splits.items()}
    return [] if lengths == expected else ["_info.json disagrees with dataset.json"]
