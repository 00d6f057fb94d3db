"""Open the data set that data.path names, wherever and however it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from configs.schema import OnBadSample
from configs.utils.errors import UserError
from configs.utils.files import is_url
from pipelines.storage import dataset as shards_info
from pipelines.storage import open as shards
from pipelines.storage.dataset import DatasetInfo, is_hdf5
from pipelines.storage.split import Split


def load_dataset(path: str | Path, classes: str | Path | None = None) -> DatasetInfo:
    """Load and check the description of a data set: a folder of shards, or an HDF5 file.

    Args:
        path: Path of the data set.
        classes: data.classes, for an HDF5 file.

    Raises:
        UserError: See `pipelines.storage.dataset.load_dataset` and `pipelines.hdf5.contents.load_contents`.
    """
    if is_url(path):
        from pipelines.remote import open as remote

        refuse_classes(path, classes)
        return remote.load_dataset(str(path))
    if is_hdf5(Path(path)):
        from pipelines.hdf5 import open as hdf5  # imports h5py

        return hdf5.load_dataset(Path(path), None if classes is None else Path(classes))
    refuse_classes(path, classes)
    return shards_info.load_dataset(path)


def open_split(
    path: str | Path,
    name: str,
    *,
    verify: Literal["changed", "off"] = "changed",
    on_bad_sample: OnBadSample = OnBadSample.STOP,
    classes: str | Path | None = None,
    cache: str | None = None,
    cache_gib: float | None = None,
) -> Split:
    """Open a split of a data set.

    Args:
        path: Path or URL of the data set.
        name, verify, on_bad_sample: See `pipelines.storage.open.open_split`.
        classes: data.classes, for an HDF5 file.
        cache, cache_gib: For a URL, see `pipelines.remote.open.open_split`.

    Raises:
        UserError, ValueError, OSError: See `pipelines.storage.open.open_split` and `pipelines.hdf5.open.open_split`.
    """
    if is_url(path):
        from pipelines.remote import open as remote

        refuse_classes(path, classes)
        return remote.open_split(str(path), name, cache, cache_gib)
    if is_hdf5(Path(path)):
        from pipelines.hdf5 import open as hdf5  # imports h5py

        file = None if classes is None else Path(classes)
        return hdf5.open_split(Path(path), name, verify=verify, classes_file=file)
    refuse_classes(path, classes)
    return shards.open_split(path, name, verify=verify, on_bad_sample=on_bad_sample)


def verify(path: str | Path, classes: str | Path | None = None) -> list[str]:
    """Return the problems found in a data set, one sentence each.

    Args:
        path: Path of the data set, a folder of shards or an HDF5 file.
        classes: data.classes, for an HDF5 file.

    Raises:
        UserError: See `pipelines.storage.verify.verify` and `pipelines.hdf5.open.verify`.
    """
    if is_hdf5(Path(path)):
        from pipelines.hdf5 import open as hdf5  # imports h5py

        return hdf5.verify(Path(path), None if classes is None else Path(classes))
    from pipelines.storage import verify as checks

    refuse_classes(path, classes)
    return checks.verify(path)


def refuse_classes(path: str | Path, classes: str | Path | None) -> None:
    """Raise UserError if names of classes are given for another data set than an HDF5 file."""
    if classes is not None:
        raise UserError(
            f"data.classes={classes} names the classes of an HDF5 file, but {path} is none; leave it out, or convert "
            "the source with --classes"
        )
