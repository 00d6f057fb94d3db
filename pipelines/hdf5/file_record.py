"""Facts about the whole content of an HDF5 file, in the user's cache: its sha256 and sums of its pixels."""

from __future__ import annotations

from pathlib import Path

from configs.utils.warnings import warn
from pipelines.storage.hash_cache import FileStamp, HashCache, HashedFile

SHA256, SUMS = "sha256", "sums"


class FileRecord(HashCache):
    """The cache file of one HDF5 file. Its entries are valid for a stamp of the file, like those of shards."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {SHA256, SUMS})
        self._file = path

    def find(self, name: str, stamp: FileStamp) -> str | None:
        """Return the entry `name` for a stamp, or None."""
        return dict(self.load().get(name, [])).get(stamp)

    def put(self, name: str, stamp: FileStamp, text: str) -> None:
        """Save an entry."""
        self.add(name, HashedFile(stamp, text))
        self.save(warn_on_error=True)

    def last_sha256(self) -> str | None:
        """Return the sha256 that was recorded last, for any stamp, or None."""
        entries = self.load().get(SHA256, [])
        return entries[-1].sha256 if entries else None

    def recorded_sha256(self, stamp: FileStamp, *, warns: bool) -> str | None:
        """Return the sha256 of the file's present content, or None if `zhu convert verify` has not recorded it."""
        found = self.find(SHA256, stamp)
        if found is None and warns and self.last_sha256() is not None:
            warn(
                f"{self._file} has changed since `zhu convert verify` recorded its sha256; if you did not expect that, "
                "run it again"
            )
        return found
