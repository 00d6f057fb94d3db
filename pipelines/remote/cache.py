"""Copies of shards on this machine's disk, shared by all ranks and runs.

Each version of a data set has its own folder. A file in it has its final name only after its sha256 was compared with
dataset.json. Byte k of the file `locks` is locked (see `lock_byte`) by each reader of file k, and exclusively by the
process that fetches or removes it. So no file is fetched twice or removed under a reader, and the locks of a killed
process are free.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from configs.utils.errors import UserError
from configs.utils.files import atomic_write, user_cache
from configs.utils.process import lock_byte
from pipelines.remote.store import LOCAL_ERRORS, Stopped, Store, shown_size
from pipelines.storage.dataset import DatasetInfo, FileInfo, ShardInfo
from pipelines.storage.hash_cache import FileStamp, HashCache, HashedFile, hash_file, shard_names
from pipelines.storage.memory_map import HUGE_PAGE_BYTES

TRIES = 3  # transfers of an object that does not have its sha256
PART = ".part"  # end of the name of a file that is being fetched
COPY = ".copy"  # end of the name of its copy, see `_copy`
FETCHED_COPIES = 2  # of a shard that is being fetched: what was fetched, and its copy
SPACE = 2**40  # byte whose lock serializes decisions about the space of the cache


class NoSpaceError(Exception):
    """Raised if a file does not fit the limit of the cache, since others are in use or will be needed earlier."""


class Reader(Protocol):
    """A reader of the cache, which knows when it will need which file."""

    def next_use(self, name: str) -> float:
        """Return when a file is read next, in epochs of the run; negative: a batch waits for it; inf: not known."""
        ...

    def release(self) -> None:
        """Release the files that are not being read, to make space for one that is needed now."""
        ...

    def forget(self, name: str) -> None:
        """Note that a file was removed from the cache."""
        ...


class DatasetCache:
    """The files of one version of a data set on this machine.

    Args:
        store: The data set in the object store.
        content: Content of its dataset.json.
        dataset: The same, parsed.
        root: Folder of all cached data sets.
        limit: Maximum size of the shards in bytes, or None.

    Attributes:
        folder: Folder of this data set.
        fetched_bytes: Bytes received by this process.
        clock: Position of training, in epochs of the run.

    Raises:
        UserError: The folder cannot be created, or does not support locks.
    """

    def __init__(self, store: Store, content: bytes, dataset: DatasetInfo, root: Path, limit: int | None) -> None:
        digest = hashlib.sha256(store.url.encode() + b"\n" + content).hexdigest()[:16]
        self.store, self.limit = store, limit
        self.folder = root / f"{store.url.rpartition('/')[2]}-{digest}"
        self.fetched_bytes, self.clock = 0, 0.0
        self.readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        splits = dataset.splits.values()
        names = [name for split in splits for name in (*(shard.file for shard in split.shards), split.index.file)]
        self.places = {name: place for place, name in enumerate(names)}
        self.shards = {shard.file: shard for split in splits for shard in split.shards}
        self._dataset = dataset
        self._space, self._hashes_lock = threading.Lock(), threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "dataset.json").exists():
                writer = f".{os.uname().nodename}.{os.getpid()}"
                atomic_write(self.folder / "dataset.json", lambda file: file.write(content), writer=writer)
            self._locks = self.open_locks()
            lock_byte(self._locks, SPACE + 1, "shared")
        except OSError as error:
            raise UserError(
                f"cannot use the cache {self.folder} ({error.strerror}); set data.cache to a folder on a local disk"
            ) from None

    def open_locks(self) -> BinaryIO:
        """Return the file `locks`, opened for locks that belong to the caller."""
        return (self.folder / "locks").open("a+b")

    @cached_property
    def _hashes(self) -> HashCache:
        return HashCache(self.folder, shard_names(self._dataset))

    def verified(self, shards: list[ShardInfo]) -> list[HashedFile | None]:
        """Return the shards that are here with the content that dataset.json names, as checked before."""
        with self._hashes_lock:
            return self._hashes.lookup(shards)

    def provide(
        self, file: ShardInfo | FileInfo, locks: BinaryIO, stopped: Stopped, count: Callable[[int], object]
    ) -> FileStamp | None:
        """Return the stamp of a file that is here and intact, after fetching it if it is not.

        Return None if another process is fetching or removing the file now.

        Args:
            file: The file.
            locks: The caller's `open_locks`.
            stopped: Flag that ends the transfer.
            count: See `Store.fetch`.

        Raises:
            UserError: The file cannot be fetched, or the cache has no space for it.
            NoSpaceError: See there.
            StoppedError: The transfer was stopped.
        """
        path, place = self.folder / file.file, self.places[file.file]
        if not (lock_byte(locks, place, "exclusive") or lock_byte(locks, place, "shared")):
            return None
        try:
            with suppress(OSError):
                if (stamp := self._checked(path, file)) is not None:
                    return stamp
            if not lock_byte(locks, place, "exclusive"):  # others read it, although it is damaged
                return None
            path.unlink(missing_ok=True)
            return self._fetch(path, file, stopped, count)
        except OSError as error:
            raise UserError(self._disk_error(file, error)) from None
        finally:
            lock_byte(locks, place, "none")

    def _checked(self, path: Path, file: ShardInfo | FileInfo) -> FileStamp | None:
        """Return the stamp of a file that is here and intact, reading it only if that is not known."""
        if path.stat().st_size != file.bytes:
            return None
        if isinstance(file, ShardInfo) and (known := self.verified([file])[0]) is not None:
            return known.stamp
        hashed = hash_file(path)
        if hashed.sha256 != file.sha256:
            return None
        self._record(file, hashed)
        return hashed.stamp

    def _fetch(
        self, path: Path, file: ShardInfo | FileInfo, stopped: Stopped, count: Callable[[int], object]
    ) -> FileStamp:
        part, copy = path.with_name(path.name + PART), path.with_name(path.name + COPY)
        self._make_room(file, part)
        received = 0

        def add(size: int) -> None:
            nonlocal received
            received += size
            count(size)

        try:
            for _ in range(TRIES):
                add(-received)
                self.store.fetch(file.file, part, file.bytes, stopped=stopped, count=add)
                size = part.stat().st_size
                self.fetched_bytes += size
                if size == file.bytes and _copy(part, copy) == file.sha256:
                    copy.rename(part)
                    part.rename(path)
                    done = HashedFile(FileStamp.from_stat(path.stat()), file.sha256)
                    self._record(file, done)
                    return done.stamp
        except BaseException:
            count(-received)
            raise
        finally:
            part.unlink(missing_ok=True)
            copy.unlink(missing_ok=True)
        raise UserError(self._mismatch(file, size))

    def _mismatch(self, file: ShardInfo | FileInfo, size: int) -> str:
        found = "another sha256 than" if size == file.bytes else f"{size:,} bytes instead of the {file.bytes:,} that"
        if size > file.bytes:
            found = f"more than the {file.bytes:,} bytes that"
        return (
            f"{self.store.join(file.file)} has {found} dataset.json gives: it is truncated, or was replaced by another "
            "version; upload all files of one conversion and start again"
        )

    def _record(self, file: ShardInfo | FileInfo, hashed: HashedFile) -> None:
        if isinstance(file, ShardInfo):
            with self._hashes_lock, self._hashes.exclusive():
                self._hashes.add(file.file, hashed)
                self._hashes.save()

    def _make_room(self, file: ShardInfo | FileInfo, part: Path) -> None:
        """Reserve space for a file by creating `part`, and remove other files if the cache would exceed its limit.

        Raises NoSpaceError if that is not possible.
        """
        if self.limit is None or not isinstance(file, ShardInfo):
            part.touch()
            return
        with self._space:
            if not lock_byte(self._locks, SPACE, "exclusive"):  # another process is deciding
                raise NoSpaceError
            try:
                if not self._remove_others(file):
                    if self._next_use(file.file) >= 0:
                        raise NoSpaceError
                    for reader in list(self.readers):
                        reader.release()
                    if not self._remove_others(file):
                        raise NoSpaceError
                part.touch()
            finally:
                lock_byte(self._locks, SPACE, "none")

    def _remove_others(self, file: ShardInfo) -> bool:
        """Remove files that are needed later than `file` until there is space for it. Return False if there is none."""
        assert self.limit is not None
        used, present = self._usage()
        most = self.limit - FETCHED_COPIES * file.bytes
        if used > most:
            wanted_at, uses = self._next_use(file.file), {name: self._next_use(name) for name in present}
            for name in sorted(uses, key=lambda name: (-uses[name], name)):
                if uses[name] <= wanted_at or used <= most:
                    break
                used -= self._remove(name)
        return used <= most

    def _usage(self) -> tuple[int, list[str]]:
        """Return the bytes that all shards take or will take while they are fetched, and the names of those here."""
        used, present = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                shard = self.shards.get(_final_name(entry.name))
                if shard is None:
                    continue
                if entry.name == shard.file:
                    present.append(shard.file)
                elif self._remove(entry.name):  # of a process that was killed
                    continue
                used += {shard.file: 1, shard.file + PART: FETCHED_COPIES}.get(entry.name, 0) * shard.bytes
        return used, present

    def _remove(self, name: str) -> int:
        """Remove a file that no process reads or fetches, and return the bytes that this frees: 0 if it is in use."""
        shard = self.shards[_final_name(name)]
        if not lock_byte(self._locks, self.places[shard.file], "exclusive"):
            return 0
        try:
            (self.folder / name).unlink(missing_ok=True)
            for reader in list(self.readers) if name == shard.file else ():
                reader.forget(name)
        finally:
            lock_byte(self._locks, self.places[shard.file], "none")
        return shard.bytes

    def _next_use(self, name: str) -> float:
        return min((reader.next_use(name) for reader in list(self.readers)), default=float("inf"))

    def _disk_error(self, file: ShardInfo | FileInfo, error: OSError) -> str:
        if error.errno not in LOCAL_ERRORS:
            return f"cannot store {file.file} in the cache {self.folder} ({error.strerror}); fix that and start again"
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        return (
            f"cannot store {file.file} ({shown_size(file.bytes)}) in the cache {self.folder} ({why}); free space, set "
            "data.cache to a folder on a larger disk, or limit the cache with data.cache_gib and "
            "data.order=sequential-window"
        )


def _final_name(name: str) -> str:
    return name.removesuffix(PART).removesuffix(COPY)


def _copy(source: Path, target: Path) -> str:
    """Copy a file in pieces of HUGE_PAGE_BYTES, flush the copy to disk, and return its sha256.

    Libraries write what they fetch in pieces of 8 to 128 KiB, which makes the file slow to read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HUGE_PAGE_BYTES))
    with source.open("rb", buffering=0) as read, target.open("wb") as written:
        while size := read.readinto(buffer):
            digest.update(buffer[:size])
            written.write(buffer[:size])
        os.fsync(written.fileno())
    return digest.hexdigest()


_open: weakref.WeakValueDictionary[tuple[Path, int | None], DatasetCache] = weakref.WeakValueDictionary()


def open_cache(
    store: Store, content: bytes, dataset: DatasetInfo, folder: str | None, limit_gib: float | None
) -> DatasetCache:
    """Return the cache of a data set. The splits that this process has opened share one.

    Args:
        store, content, dataset: See `DatasetCache`.
        folder: data.cache, or None for the user's cache.
        limit_gib: data.cache_gib.

    Raises:
        UserError: See `DatasetCache`, or there is no home folder.
    """
    try:
        root = user_cache("data") if folder is None else Path(folder)
    except RuntimeError as error:
        raise UserError(f"there is no folder for the cache ({error}); set data.cache") from None
    cache = DatasetCache(store, content, dataset, root, None if limit_gib is None else int(limit_gib * 2**30))
    return _open.setdefault((cache.folder.absolute(), cache.limit), cache)
