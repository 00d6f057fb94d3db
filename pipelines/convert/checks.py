"""Check classes, labels, shapes, disk space and the output folder before the first sample is converted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError, printable
from configs.utils.files import atomic_write, read_small_text
from configs.utils.process import acquire_lock
from pipelines.convert.layout import SplitLayout
from pipelines.convert.source import Source


def check_classes(source: Source) -> None:
    """Raise UserError if a class name contains control characters, since terminals interpret them."""
    for name in source.classes:
        if printable(name) != name:
            raise UserError(f"{source.name} names a class {name!r}, which contains control characters; rename it")


def check_labels(labels: np.ndarray, rows: int, classes: int, split: str) -> None:
    if len(labels) != rows:
        raise UserError(f"split {split!r} has {len(labels)} labels for {rows} images; give one to each")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"split {split!r} has labels from {labels.min()} to {labels.max()}, but there are {classes} classes; "
            f"use labels of 0..{classes - 1}"
        )


def check_shapes(layouts: dict[str, SplitLayout]) -> None:
    """Raise UserError if npy splits differ in image shape.

    `shuffle.partition` compares the image shapes within one split.
    """
    shapes = {
        split: f"{split!r} of {layout.image_shape[0]} x {layout.image_shape[1]}"
        for split, layout in layouts.items()
        if layout.image_shape
    }
    if len({layout.image_shape for layout in layouts.values()}) > 1:
        raise UserError(
            f"npy stores one shape, but the splits are {', '.join(shapes.values())} pixels; resize them to one "
            "size (option size) or use encoding jpeg"
        )


def check_disk(layouts: dict[str, SplitLayout], out: Path, kept_shards: int | None = None) -> None:
    """Raise UserError if the converted data set and its spool files are not expected to fit on the disk of `out`.

    `kept_shards` is the number of finished shards that are on the disk at a time, or None for all.
    """
    need = 64 * 2**20
    if kept_shards is None:
        need += sum(layout.rows * layout.stored_bytes for layout in layouts.values())
        spool = max(layout.rows * layout.payload_bytes // layout.groups for layout in layouts.values())
    else:  # a split's spool is complete before its first shard is written
        need += max(
            min(layout.rows, kept_shards * layout.shard_rows) * layout.stored_bytes for layout in layouts.values()
        )
        spool = max(layout.rows * layout.payload_bytes for layout in layouts.values())
    present = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if need + spool - present > free:
        raise UserError(
            f"{out} has {free / 2**20:,.0f} MiB free, the conversion needs about "
            f"{(need + spool - present) / 2**20:,.0f} MiB; free some space or choose another "
            f"{'--out' if kept_shards is None else '--spool'}"
        )


@contextmanager
def lock_output(out: Path, request: dict[str, object], option: str = "--out") -> Iterator[Path]:
    """Create and lock the spool folder of this conversion and yield its path.

    Temporary files of an interrupted conversion are deleted.

    Args:
        out: Folder of the conversion.
        request: What is converted, which is recorded in the folder.
        option: Option of the command that gives `out`, for messages.

    Raises:
        UserError: `out` is not a folder or cannot be created, contains anything but an unfinished conversion with the
            same `request`, has links in its spool folder or an unreadable request.json, or is used by another process.
        OSError: A file in `out` cannot be read or written.
    """
    spool = out / ".spool"
    if out.exists() and not out.is_dir():
        raise UserError(f"{option} {out} is a file; name a folder")
    if links := [file for file in (spool, *spool.rglob("*")) if file.is_symlink()]:
        raise UserError(f"{links[0]} is a link, through which a conversion would write elsewhere; remove it")
    if out.is_dir() and any(file != spool for file in out.iterdir()) and not (spool / "request.json").exists():
        raise UserError(f"{option} {out} is not empty and contains no conversion; choose another folder or empty it")
    try:
        spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {option} {out}: {error.strerror}") from None
    with (spool / "lock").open("wb") as lock:
        if not acquire_lock(lock):
            raise UserError(f"another process is converting into {out}; wait for it or stop it")
        if (out / "dataset.json").exists():
            raise UserError(
                f"another process has just finished converting into {out}; run the command again to compare"
            )
        record = spool / "request.json"
        if record.exists() and _read_request(record) != request:
            raise UserError(
                f"{out} contains an unfinished conversion of another source, or of this one before it was changed, or "
                f"with other options; choose another {option} or delete the folder"
            )
        remove_temporary(out)  # files of a killed conversion may fill the disk
        atomic_write(record, lambda file: file.write(json.dumps(request).encode()), sync=False)
        yield spool


def remove_temporary(out: Path) -> None:
    """Remove the temporary files that killed workers left."""
    for left in [*out.glob("*.tmp"), *(out / ".spool").rglob("*.tmp")]:
        left.unlink(missing_ok=True)


def _read_request(record: Path) -> object:
    """Return the recorded request of an unfinished conversion, or None if the record is damaged.

    Raises:
        UserError: The record cannot be read.
    """
    try:
        return json.loads(read_small_text(record))
    except OSError as error:
        raise UserError(f"{record} cannot be read ({error.strerror}); fix that, or choose another --out") from None
    except (ValueError, RecursionError):
        return None
