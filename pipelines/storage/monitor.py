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
from pipelines.storage.hash_cache import CHUNK, Stamp

EVERY_S = 0.5
SHARE = 0.01  # of a thread's time, at most, that looking at many files takes


class Watch:
    """Over the mapped shards of one split; any thread may call it."""

    def __init__(
        self,
        split: str,
        files: tuple[Path, ...],
        sha256: list[str],
        stamps: list[Stamp],
        lost: np.ndarray,
        mapped: Callable[[int], np.ndarray],
    ) -> None:
        """stamps, sha256: of what the files hold; lost: see `mapping.Mapped`; mapped(number): a file's bytes, uint8."""
        self._split, self._files, self._sha256, self._mapped = split, files, sha256, mapped
        self._known: list[tuple[int, int, int] | None] = [stamp.of_content for stamp in stamps]  # None: it is gone
        self._lost = lost
        self._lock = threading.Lock()
        self._next = time.monotonic() + EVERY_S
        self._problem: str | None = None

    def look(self) -> None:
        """After every batch that was read: raise a UserError if any file is known to have lost its content.

        Costs a microsecond or two; now and then it checks.
        """
        if self._problem is not None:
            raise UserError(self._problem)
        now = time.monotonic()
        if now >= self._next or self._lost.any():
            self._next = now + EVERY_S  # one of several threads is enough
            self.check()

    def check(self) -> None:
        """Look at all files now: raise a UserError if what the maps show is not what they showed at the start.

        Costs about two microseconds per file.
        """
        with self._lock:
            begin = time.monotonic()
            if self._problem is None:
                self._problem = self._lost_problem() or self._changed_problem()
            now = time.monotonic()
            self._next = now + max(EVERY_S, (now - begin) / SHARE)
        if self._problem is not None:
            raise UserError(self._problem)

    def _lost_problem(self) -> str | None:
        for number in np.flatnonzero(self._lost).tolist():
            file, known = self._files[number], self._known[number]
            size = _size_of(file)
            if known is not None and size is not None and size < known[1]:
                return self._sentence(number, f"was truncated to {size:,} of {known[1]:,} bytes")
            place = int(self._lost[number]) - self._mapped(number).ctypes.data
            return self._sentence(number, f"could not be read at byte {place:,} any more")
        return None

    def _changed_problem(self) -> str | None:
        for number, file in enumerate(self._files):
            known = self._known[number]
            try:
                status = file.stat()
            except OSError as error:
                if known is not None:
                    self._known[number] = None
                    self._goes_on(file, f"cannot be found any more ({error.strerror})")
                continue
            found = Stamp.of(status).of_content
            if found == known:
                continue
            if known is None or found[0] != known[0]:
                self._goes_on(file, "was replaced by another file")
            elif found[1] != known[1]:
                done = "truncated" if found[1] < known[1] else "extended"
                return self._sentence(number, f"was {done} from {known[1]:,} to {found[1]:,} bytes")
            elif self._digest(number) != self._sha256[number]:
                return self._sentence(number, "was overwritten with other bytes")
            self._known[number] = found
        return None

    def _digest(self, number: int) -> str:
        """sha256 of what the map shows."""
        content, digest = self._mapped(number).data, hashlib.sha256()
        for start in range(0, len(content), CHUNK):
            digest.update(content[start : start + CHUNK])
        return "" if self._lost[number] else digest.hexdigest()

    def _goes_on(self, file: Path, what: str) -> None:
        """The map still shows the file that was opened, whatever its name now leads to."""
        warn(
            f"{file.name} of split {self._split!r} {what} while it is in use: this run goes on with the bytes that it "
            "has opened, but cannot be resumed unless the file is what it was"
        )

    def _sentence(self, number: int, what: str) -> str:
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
