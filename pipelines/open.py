"""Open the data set that data.path names, wherever and however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from configs.schema import OnBadSample
from configs.utils.files import is_url
from pipelines.storage import dataset as shards_info
from pipelines.storage import open as shards
from pipelines.storage.dataset import DatasetInfo
from pipelines.storage.split import Split


def load_dataset(path: str | Path) -> DatasetInfo:
    """Load and check the description of a data set.

    Raises:
        UserError: See `pipelines.storage.dataset.load_dataset`.
    """
    if is_url(path):
        from pipelines.remote import open as remote

        return remote.load_dataset(str(path))
    return shards_info.load_dataset(path)


def open_split(
    path: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    on_bad_sample: OnBadSample = OnBadSample.STOP,
    cache: str | None = None,
    cache_gib: float | None = None,
) -> Split:
    """Open a split of a data set.

    Args:
        path: Path or URL of the data set.
        name, verify, on_bad_sample: See `pipelines.storage.open.open_split`.
        cache, cache_gib: For a URL, see `pipelines.remote.open.open_split`.

    Raises:
        UserError, ValueError, OSError: See `pipelines.storage.open.open_split`.
    """
    if is_url(path):
        from pipelines.remote import open as remote

        return remote.open_split(str(path), name, cache, cache_gib)
    return shards.open_split(path, name, verify=verify, on_bad_sample=on_bad_sample)
