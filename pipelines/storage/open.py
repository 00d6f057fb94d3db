"""Open a split of a converted data set.

A data set is a folder with `dataset.json` and, for each split, `NAME-SPLIT-NNNNNN.tar` shards (WebDataset convention),
DALI's `.idx` files and `SPLIT.index.npz`. For each sample, the index holds the shard number, the offset and size of the
image in bytes, the label (-1 if there is none), and the height and width of the image in pixels. `convert.writer`
writes this format.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from configs.schema import OnBadSample
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage import hash_cache, tar_check
from pipelines.storage.dataset import RECONVERT, DatasetInfo, load_dataset
from pipelines.storage.index import check_size, load_index, sample_stride
from pipelines.storage.memory_map import HUGE_PAGE_BYTES, MappedShards, map_files
from pipelines.storage.monitor import ShardMonitor
from pipelines.storage.split import Residency, Split

MAX_SLOT_RATIO = 16  # address space is not memory, but it is limited


def open_split(
    folder: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    on_bad_sample: OnBadSample = OnBadSample.STOP,
) -> Split:
    """Map the shards of a split, load its index, and check both against dataset.json.

    Opening 1.5 million samples takes well under a second if the hashes of the shards are cached.

    Args:
        folder: Folder of the data set.
        name: Name of the split.
        verify: "changed" reads and hashes shards that have changed since their last check (see `hash_cache`). "off"
            checks only the sizes of shards.
        on_bad_sample: SKIP: warn instead of raising if only image bytes of a JPEG shard are damaged.

    Raises:
        UserError: The data set or split does not exist, dataset.json is invalid, or a file is missing, unreadable,
            being changed, different from dataset.json, or a link to a file outside the data set.
        ValueError, OSError: See `map_files`.
    """
    folder = Path(folder)
    dataset = load_dataset(folder)
    if name not in dataset.splits:
        raise UserError(f"{str(folder)!r} has no split {name!r}; it has {', '.join(dataset.splits)}")
    shards = dataset.splits[name].shards
    files = tuple(folder / shard.file for shard in shards)
    for file, shard in zip(files, shards, strict=True):
        check_size(file, shard.bytes)
    index = load_index(folder, dataset, name)
    hashed = hash_cache.shard_hashes(folder, dataset, name) if verify == "changed" else None
    sha256 = [shard.sha256 for shard in shards] if hashed is None else [content.sha256 for content in hashed]
    slot_bytes = slot_bytes_of(dataset, name, int(index["size"][0]))
    mapped = map_files(files, [shard.bytes for shard in shards], slot_bytes)
    split = build_split(dataset, name, files, index, mapped, slot_bytes, sha256)
    for number, file in enumerate(files):
        stamp = mapped.stamps[number]
        if hashed is not None and stamp is not None and stamp.content_key != hashed[number].stamp.content_key:
            raise UserError(f"{file} was changed while it was being opened; start again when nothing writes to it")
        if sha256[number] != shards[number].sha256:
            _refuse(split, number, sha256[number], on_bad_sample)
    return split


def slot_bytes_of(dataset: DatasetInfo, name: str, image_bytes: int) -> int:
    """Return the distance between the starts of mapped shards: whole pages and, for npy, a multiple of the stride.

    Pages are huge pages, unless the distance would exceed `MAX_SLOT_RATIO` times the size of the largest shard.
    """
    split = dataset.splits[name]
    stride = sample_stride(image_bytes, split.labelled, len(dataset.classes)) if dataset.encoding == "npy" else 1
    largest = max(shard.bytes for shard in split.shards)
    units = (math.lcm(page, stride) for page in (HUGE_PAGE_BYTES, mmap.PAGESIZE))
    huge, small = (-(-largest // unit) * unit for unit in units)
    return huge if huge <= MAX_SLOT_RATIO * largest else small


def build_split(
    dataset: DatasetInfo,
    name: str,
    files: tuple[Path, ...],
    index: dict[str, np.ndarray],
    mapped: MappedShards,
    slot_bytes: int,
    sha256: list[str],
    residency: Callable[[ShardMonitor], Residency] | None = None,
) -> Split:
    """Return the split that consists of these parts. `residency` fetches shards; None: all are mapped."""
    monitor = ShardMonitor(name, files, sha256, mapped)
    return Split(
        dataset=dataset,
        name=name,
        labels=index["label"].astype(np.int64) if dataset.splits[name].labelled else None,
        shard=index["shard"],
        files=files,
        heights=index["height"],
        widths=index["width"],
        address=index["shard"] * np.int64(slot_bytes) + index["offset"],
        size=index["size"],
        content=mapped.content,
        slot_bytes=slot_bytes,
        monitor=monitor,
        residency=residency and residency(monitor),
    )


def _refuse(split: Split, number: int, sha256: str, on_bad_sample: OnBadSample) -> None:
    """Raise UserError for a damaged shard, or only warn if bad samples are skipped and only JPEG images are damaged.

    Args:
        split: Split that contains the shard.
        number: Index of the shard in the split.
        sha256: Actual hash of the shard.
        on_bad_sample: See `open_split`.
    """
    damage = tar_check.diagnose(split, number, sha256)
    named = f"{split.files[number]} does not have the sha256 that dataset.json gives: {damage.text}"
    # Damaged pixels of an npy split cannot be detected during training.
    is_usable = damage.in_content_only and split.encoding == "jpeg"
    if not (on_bad_sample == OnBadSample.SKIP and is_usable):
        advice = ", or train with substitutes for bad samples: data.on_bad_sample=skip" if is_usable else ""
        raise UserError(f"{named}; {RECONVERT}{advice}")
    warn(f"{named}; the samples that can be decoded are used")
