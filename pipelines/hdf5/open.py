"""Open an HDF5 file as a data set, or check every byte of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from pipelines.hdf5.contents import load_contents
from pipelines.hdf5.dataset import Hdf5Dataset, describe
from pipelines.hdf5.file_record import SHA256, FileRecord
from pipelines.hdf5.split import Hdf5Split, map_split
from pipelines.hdf5.statistics import load_channel_sums, map_blocks
from pipelines.storage import hash_cache


def load_dataset(path: Path, classes_file: Path | None = None) -> Hdf5Dataset:
    """Load and check the description of a file.

    Raises:
        UserError: See `contents.load_contents`.
    """
    return describe(load_contents(path, classes_file), load_channel_sums)


def open_split(
    path: Path, name: str, *, verify: Literal["changed", "off"] = "changed", classes_file: Path | None = None
) -> Hdf5Split:
    """Open a split of a file.

    Opening 1.5 million images takes well under a second, once the file's metadata is in the page cache.

    Args:
        path: The HDF5 file.
        name, verify: See `split.map_split`.
        classes_file: See `contents.load_contents`.

    Raises:
        UserError, ValueError, OSError: See `contents.load_contents` and `split.map_split`.
    """
    return map_split(load_dataset(path, classes_file), name, verify=verify)


def verify(path: Path, classes_file: Path | None = None) -> list[str]:
    """Return the problems found in a file, one sentence each, and record its sha256 in the user's cache.

    Every chunk must decompress, and all labels must be in range. Apart from this, HDF5 files contain no hash of their
    pixels, so a changed pixel is only found if the sha256 of the file was recorded before.

    Raises:
        UserError: The file cannot be opened; see `contents.load_contents`.
    """
    dataset = load_dataset(path, classes_file)
    problems = []
    for name in dataset.splits:
        split = map_split(dataset, name)
        if split.cache is None:  # no chunks to decompress
            continue
        try:
            for _ in map_blocks(split, f"verify {name}", lambda images: np.empty(0), lambda: None):
                pass
        except UserError as error:
            problems.append(str(error))
    record = FileRecord(path)
    with progress_bar(
        total=dataset.contents.stamp.bytes, desc="verify", unit="B", unit_scale=True, unit_divisor=1024
    ) as bar:
        [(_, hashed)] = hash_cache.hash_files([path], bar)
    if isinstance(hashed, OSError):
        return [*problems, f"{path} cannot be read ({hashed.strerror})"]
    before = record.last_sha256()
    if before is not None and before != hashed.sha256:
        problems.append(
            f"its sha256 is {hashed.sha256}, but was {before} when it was verified before; the new one is recorded, so "
            "verify again if the file was meant to change"
        )
    record.put(SHA256, hashed.stamp, hashed.sha256)
    return problems
