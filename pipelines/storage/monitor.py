"""Notices that shards change under a run: cut short, written over, replaced or removed. Knows files, no samples.

A map shows what is done to its file at once. A batch that was read from a changed one may have been trained on by the
time that it is noticed, half a second later at most; `check` before a checkpoint keeps that from being saved.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.storage.hash_cache import CHUNK_BYTES, FileStamp

EVERY_S = 0.5
SHARE = 0.01  # of a thread's time, at most, that looking at many files takes


class ShardMonitor:
    """Over the mapped shards of one split; any thread may call it."""

    def __init__(
        self,
        split: str,
        files: tuple[Path, ...],
        sha256: list[str],
        stamps: list[FileStamp],
        fault_address: np.ndarray,
        mapped: Callable[[int], np.ndarray],
    ) -> None:
        """stamps, sha256: of what the files hold; lost: see `mapping.Mapped`; mapped(number): a file's bytes, uint8."""
        self._split, self._files, self._sha256, self._mapped = split, files, sha256, mapped
        self._known: list[tuple[int, int, int] | None] = [stamp.content_key for stamp in stamps]  # None: it is gone
        self._fault_address = fault_address
        self._lock = threading.Lock()
        self._next = time.monotonic() + EVERY_S
        self._error: str | None = None

    def poll(self) -> None:
        """After every batch that was read: raise a UserError if any file is known to have lost its content.

        Costs a microsecond or two; now and then it checks.
        """
        if self._error is not None:
            raise UserError(self._error)
        now = time.monotonic()
        if now >= self._next or self._fault_address.any():
            self._next = now + EVERY_S  # one of several threads is enough
            self.check()

    def check(self) -> None:
        """Look at all files now: raise a UserError if what the maps show is not what they showed at the start.

        Costs about two microseconds per file.
        """
        with self._lock:
            begin = time.monotonic()
            if self._error is None:
                self._error = self._fault_error() or self._change_error()
            now = time.monotonic()
            self._next = now + max(EVERY_S, (now - begin) / SHARE)
        if self._error is not None:
            raise UserError(self._error)

    def _fault_error(self) -> str | None:
        for number in np.flatnonzero(self._fault_address).tolist():
            file, known = self._files[number], self._known[number]
            size = _size_of(file)
            if known is not None and size is not None and size < known[1]:
                return self._message(number, f"was truncated to {size:,} of {known[1]:,} bytes")
            place = int(self._fault_address[number]) - self._mapped(number).ctypes.data
            return self._message(number, f"could not be read at byte {place:,} any more")
        return None

    def _change_error(self) -> str | None:
        for number, file in enumerate(self._files):
            known = self._known[number]
            try:
                status = file.stat()
            except OSError as error:
                if known is not None:
                    self._known[number] = None
                    self._warn_replaced(file, f"cannot be found any more ({error.strerror})")
                continue
            found = FileStamp.from_stat(status).content_key
            if found == known:
                continue
            if known is None or found[0] != known[0]:
                self._warn_replaced(file, "was replaced by another file")
            elif found[1] != known[1]:
                done = "truncated" if found[1] < known[1] else "extended"
                return self._message(number, f"was {done} from {known[1]:,} to {found[1]:,} bytes")
            elif self._digest(number) != self._sha256[number]:
                return self._message(number, "was overwritten with other bytes")
            self._known[number] = found
        return None

    def _digest(self, number: int) -> str:
        """sha256 of what the map shows."""
        content, digest = self._mapped(number).data, hashlib.sha256()
        for start in range(0, len(content), CHUNK_BYTES):
            digest.update(content[start : start + CHUNK_BYTES])
        return "" if self._fault_address[number] else digest.hexdigest()

    def _warn_replaced(self, file: Path, what: str) -> None:
        """The map still shows the file that was opened, whatever its name now leads to."""
        warn(
            f"{file.name} of split {self._split!r} {what} while it is in use: this run goes on with the bytes that it "
            "has opened, but cannot be resumed unless the file is what it was"
        )

    def _message(self, number: int, what: str) -> str:
        return (
            f"{self._files[number]} {what} while it was in use, so the run ends before anything that was trained on "
            "changed bytes is saved; put the file back (`tools/convert.py verify` says whether the data set is whole) "
            "and resume the run"
        )


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
