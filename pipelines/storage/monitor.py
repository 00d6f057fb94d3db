"""Detect shards that are truncated, overwritten, replaced or removed during a run.

Shards are memory-mapped, so training sees in-place changes immediately. It may use changed bytes until the next check,
which usually follows within 0.5 s. Call `check` before saving a checkpoint, so that no checkpoint is affected by
changed data.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage.hash_cache import CHUNK_BYTES, FileStamp
from pipelines.storage.memory_map import MappedShards

POLL_INTERVAL_S = 0.5  # minimum time between checks
MAX_SHARE = 0.01  # maximum share of time spent on checks


class ShardMonitor:
    """Thread-safe monitor of the mapped shards of one split.

    Args:
        split: Name of the split, for messages.
        files: Paths of the shards.
        sha256: Hash of each file when the split was opened, or its hash in dataset.json if data.verify=off. None: the
            hash is not known, so that any new modification time counts as a change.
        mapped: The mapping of the files. Files that are not mapped yet are watched from `watch` on.
    """

    def __init__(self, split: str, files: tuple[Path, ...], sha256: Sequence[str | None], mapped: MappedShards) -> None:
        self._split, self._files, self._sha256 = split, files, sha256
        self._mapped, self._fault_address = mapped.files, mapped.fault_address
        self._known = [None if stamp is None else stamp.content_key for stamp in mapped.stamps]  # None: removed
        self._watched = {number for number, stamp in enumerate(mapped.stamps) if stamp is not None}
        self._copies = len(self._watched) < len(files)  # the files are copies in a cache, which may be removed
        self._lock = threading.Lock()
        self._next = time.monotonic() + POLL_INTERVAL_S
        self._error: str | None = None

    def poll(self) -> None:
        """Raise UserError if a change to a file has been detected.

        This method calls `check` after a failed read, and otherwise at most once per POLL_INTERVAL_S. All other calls
        take about two microseconds, so `poll` can be called after every batch.
        """
        if self._error is not None:
            raise UserError(self._error)
        now = time.monotonic()
        if now >= self._next or self._fault_address.any():
            self._next = now + POLL_INTERVAL_S  # keeps other threads from checking as well
            self.check()

    def check(self) -> None:
        """Check all files now and raise UserError if the size or content of a mapped file has changed or a read failed.

        A file that was replaced or removed only causes a warning, since its mapping still shows the original content.
        A check takes about two microseconds per file, unless a modification time has changed and the file must be read.
        """
        with self._lock:
            start = time.monotonic()
            if self._error is None:
                self._error = self._fault_error() or self._change_error()
            now = time.monotonic()
            self._next = now + max(POLL_INTERVAL_S, (now - start) / MAX_SHARE)
        if self._error is not None:
            raise UserError(self._error)

    def watch(self, number: int, stamp: FileStamp | None) -> None:
        """Start to watch a file that was mapped, or stop to watch one that will be unmapped, if `stamp` is None."""
        with self._lock:
            if stamp is None:
                self._watched.discard(number)
            else:
                self._known[number] = stamp.content_key
                self._watched.add(number)

    def _fault_error(self) -> str | None:
        for number in np.flatnonzero(self._fault_address).tolist():
            file, known = self._files[number], self._known[number]
            size = _size_of(file)
            if known is not None and size is not None and size < known[1]:
                return self._message(number, f"was truncated to {size:,} of {known[1]:,} bytes")
            place = int(self._fault_address[number]) - self._mapped[number].ctypes.data
            return self._message(number, f"can no longer be read at byte {place:,}")
        return None

    def _change_error(self) -> str | None:
        for number in sorted(self._watched):
            file, known = self._files[number], self._known[number]
            try:
                status = file.stat()
            except OSError as error:
                if known is not None:
                    self._known[number] = None
                    self._warn_replaced(file, f"can no longer be found ({error.strerror})")
                continue
            found = FileStamp.from_stat(status).content_key
            if found == known:
                continue
            if known is None or found[0] != known[0]:
                self._warn_replaced(file, "was replaced by another file")
            elif found[1] != known[1]:
                done = "truncated" if found[1] < known[1] else "extended"
                return self._message(number, f"was {done} from {known[1]:,} to {found[1]:,} bytes")
            elif self._sha256[number] is None:
                return self._message(
                    number, "has a new modification time, and no hash of its content is recorded to compare it with,"
                )
            elif self._digest(number) != self._sha256[number]:
                return self._message(number, "was overwritten with other bytes")
            self._known[number] = found
        return None

    def _digest(self, number: int) -> str:
        """Return the sha256 of a file's mapped bytes, or "" if the bytes cannot be read."""
        content, digest = self._mapped[number].data, hashlib.sha256()
        for start in range(0, len(content), CHUNK_BYTES):
            digest.update(content[start : start + CHUNK_BYTES])
        return "" if self._fault_address[number] else digest.hexdigest()

    def _warn_replaced(self, file: Path, what: str) -> None:
        """Warn that a file was replaced or removed. The mapping still shows the original file."""
        if self._copies:  # it is fetched again when it is opened the next time
            return
        warn(
            f"{file.name} of split {self._split!r} {what} while it was in use: this run continues with the "
            "original bytes, but cannot be resumed unless the original file is restored"
        )

    def _message(self, number: int, what: str) -> str:
        how = "remove this copy" if self._copies else "restore the file (check the data set with `zhu convert verify`)"
        return (
            f"{self._files[number]} {what} while it was in use, so the run ends before it saves anything trained on "
            f"changed bytes; {how} and resume the run"
        )


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
