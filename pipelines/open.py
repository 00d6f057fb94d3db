"""Open the data set that data.path names, wherever and however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from configs.schema import OnBadSample
from pipelines.storage import dataset as shards_info
from pipelines.storage import open as shards
from pipelines.storage.dataset import DatasetInfo
from pipelines.storage.split import Split


def load_dataset(path: str | Path) -> DatasetInfo:
    """Load and check the description of a data set.

    Raises:
        UserError: See `pipelines.storage.dataset.load_dataset`.
    """
    return shards_info.load_dataset(path)


def open_split(
    path: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    on_bad_sample: OnBadSample = OnBadSample.STOP,
) -> Split:
    """Open a split of a data set.

    Args:
        path: Path of the data set.
        name, verify, on_bad_sample: See `pipelines.storage.open.open_split`.

    Raises:
        UserError, ValueError, OSError: See `pipelines.storage.open.open_split`.
    """
    return shards.open_split(path, name, verify=verify, on_bad_sample=on_bad_sample)
