"""Cache the sha256 of each shard, so that a file is read only once after its last change.

A cache entry is valid while the inode, size and timestamps of the file are unchanged. The cache is stored in the user's
cache folder, since the data set may be read-only and must be identical for two conversions of one source.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.files import atomic_write, user_cache
from configs.utils.process import acquire_lock
from configs.utils.warnings import warn
from pipelines.storage.dataset import DatasetInfo, ShardInfo

if TYPE_CHECKING:
    from tqdm import tqdm

MAX_ENTRIES = 8  # per file; nodes of a cluster may share a home folder and have local copies of the data
CHUNK_BYTES = 2**20
MAX_THREADS = 8
TIMESTAMP_TICK_NS = 20_000_000  # file system clocks tick at least every 10 ms; later changes get other timestamps
SAVE_INTERVAL_S = 5.0
LOCK_TIMEOUT_S = 30.0  # a process that holds the lock counts as stopped after this time without a heartbeat
MAX_CACHE_BYTES = 2**27
NOTE_BYTES = 2**34  # without a terminal, a note announces reads of at least this size


class FileStamp(NamedTuple):
    """Attributes of a file that are compared to detect changes to its content."""

    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int  # unlike modified_ns, cannot be set by programs

    @classmethod
    def from_stat(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def content_key(self) -> tuple[int, int, int]:
        """Inode, size and modification time. Renames, links and chmod update only the change time."""
        return self[:3]


class HashedFile(NamedTuple):
    """The sha256 of a file's content, and the stamp that the file had when it was read."""

    stamp: FileStamp
    sha256: str


def shard_hashes(folder: Path, dataset: DatasetInfo, split: str) -> list[HashedFile]:
    """Return the actual hash of each shard of a split. Files without a valid cache entry are read.

    A file whose cached hash differs from dataset.json is read again. One process per machine reads the files while
    other processes wait for the results, so ranks that start together read each file once.

    Raises:
        UserError: A file cannot be read, or is being changed.
    """
    shards = dataset.splits[split].shards
    record = HashCache(folder, shard_names(dataset))
    found = record.lookup(shards)
    if None in found:
        with record.exclusive() as heartbeat:
            found = record.lookup(shards)  # another process may have read them meanwhile
            missing = [number for number, content in enumerate(found) if content is None]
            try:
                for place, content in _hash_shards(folder, split, [shards[number] for number in missing], heartbeat):
                    found[missing[place]] = content
                    record.add(shards[missing[place]].file, content)
            finally:
                record.save(warn_on_error=True)
    return [content for content in found if content is not None]


def shard_names(dataset: DatasetInfo) -> set[str]:
    """Return the names of all shards of a data set."""
    return {shard.file for split in dataset.splits.values() for shard in split.shards}


def _hash_shards(
    folder: Path, split: str, shards: Sequence[ShardInfo], heartbeat: Callable[[], None]
) -> Iterator[tuple[int, HashedFile]]:
    """Yield the position of each shard in `shards` with its hash, in order of completion. Show the progress."""
    total = sum(shard.bytes for shard in shards)
    if total >= NOTE_BYTES and not sys.stderr.isatty():  # without a progress bar, announce what takes minutes
        print(
            f"checking {total / 2**30:,.0f} GiB of split {split!r}, once for each copy of a data set; "
            "data.verify=off skips this",
            file=sys.stderr,
        )
    files = [folder / shard.file for shard in shards]
    with progress_bar(
        total=total, desc=f"checking {split}", unit="B", unit_scale=True, unit_divisor=1024, delay=1
    ) as bar:
        for place, content in hash_files(files, bar, heartbeat):
            if isinstance(content, OSError):
                raise UserError(
                    f"{files[place]} cannot be read ({content.strerror}); fix that and start again, or set "
                    "data.verify=off"
                )
            yield place, content


def store_hashes(folder: Path, dataset: DatasetInfo, sha256: dict[str, str]) -> None:
    """Add the hashes of new files to the cache. `sha256` maps file names to hashes. Failures are ignored."""
    record = HashCache(folder, shard_names(dataset))
    time.sleep(TIMESTAMP_TICK_NS / 1e9)
    with suppress(OSError), record.exclusive():
        for name, digest in sha256.items():
            record.add(name, HashedFile(FileStamp.from_stat((folder / name).stat()), digest))
        record.save()


class HashCache:
    """The cache file of one data set. The cache is empty if there is no usable cache folder.

    Args:
        folder: Folder of the data set.
        names: Names of all entries; others are removed. For shards, the names of the files.
    """

    def __init__(self, folder: Path, names: set[str]) -> None:
        self._folder, self._names = folder, names
        self._new: dict[str, HashedFile] = {}
        self._saved_s = time.monotonic()
        self._path: Path | None = None
        with suppress(OSError, RuntimeError):  # no home folder, or the data set was removed
            name = os.fsencode(folder.resolve())
            self._path = cache_folder() / f"{folder.resolve().name}-{hashlib.sha256(name).hexdigest()[:16]}.json"

    def lookup(self, shards: Sequence[ShardInfo]) -> list[HashedFile | None]:
        """Return the cached hash of each shard. `shards` are the entries in dataset.json.

        The result is None for a shard that is not cached, has changed since it was hashed, or has a cached hash that
        differs from dataset.json.
        """
        known = self.load()
        found: list[HashedFile | None] = []
        for shard in shards:
            content = None
            with suppress(OSError):
                content = HashedFile(FileStamp.from_stat((self._folder / shard.file).stat()), shard.sha256)
            found.append(content if content in known.get(shard.file, []) else None)
        return found

    def add(self, name: str, content: HashedFile) -> None:
        """Add an entry, and save all entries if they have not been saved for SAVE_INTERVAL_S."""
        self._new[name] = content
        if time.monotonic() - self._saved_s > SAVE_INTERVAL_S:
            self.save()

    def save(self, warn_on_error: bool = False) -> None:
        """Merge the added entries into the cache file, which other processes may have updated in the meantime.

        A failure is ignored, or reported as a warning if `warn_on_error` is set.
        """
        self._saved_s = time.monotonic()
        if not self._new:
            return
        try:
            if self._path is None:
                raise OSError(0, "there is no home folder")
            known = {name: entries for name, entries in self.load().items() if name in self._names}
            for name, content in self._new.items():
                others = [entry for entry in known.get(name, []) if entry != content]
                known[name] = [*others, content][-MAX_ENTRIES:]
            files = {name: [[*stamp, sha256] for stamp, sha256 in entries] for name, entries in sorted(known.items())}
            text = json.dumps({"folder": str(self._folder.resolve()), "files": files})
            self._path.parent.mkdir(parents=True, exist_ok=True)
            writer = f".{os.uname().nodename}.{os.getpid()}"
            atomic_write(self._path, lambda file: file.write(text.encode()), sync=False, writer=writer)
        except OSError as error:
            if warn_on_error:
                warn(
                    f"cannot save the hashes of checked shards in {self._path or '~/.cache'} "
                    f"({error.strerror}), so every start reads all shards; set XDG_CACHE_HOME to a writable folder"
                )

    def load(self) -> dict[str, list[HashedFile]]:
        """Return the entries of the cache file. A missing, damaged or oversized file counts as empty."""
        try:
            if self._path is None or self._path.stat().st_size > MAX_CACHE_BYTES:
                return {}
            files = json.loads(self._path.read_bytes())["files"]
            known = {}
            for name, entries in files.items():
                known[name] = [HashedFile(FileStamp(*stamp), sha256) for *stamp, sha256 in entries]
            return known
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], None]]:
        """Lock the cache against other processes on this machine and yield a heartbeat function.

        The holder of the lock must call this function regularly. A waiting process continues without the lock after
        `LOCK_TIMEOUT_S` without a heartbeat, or immediately if the file system does not support locks.
        """
        lock = None
        with suppress(OSError):
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lock = self._path.with_suffix(f".{os.uname().nodename}.lock").open("ab")
        if lock is None:
            yield lambda: None
            return
        with lock:
            with suppress(OSError):  # a file system without locks
                acquire_lock(lock, LOCK_TIMEOUT_S)

            def heartbeat() -> None:
                with suppress(OSError):
                    os.utime(lock.fileno())

            yield heartbeat


def cache_folder() -> Path:
    """Return the folder of the cache files. Raises RuntimeError like `user_cache`."""
    return user_cache("verified")


def hash_files(
    files: list[Path], bar: tqdm, heartbeat: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, HashedFile | OSError]]:
    """Hash files in parallel and yield the position of each file in `files`, with its hash or error.

    Results are yielded in order of completion. While the caller waits for a file, `bar` is updated and `heartbeat` is
    called at least once a second.
    """
    read, shown = [0] * len(files), 0
    stop = threading.Event()

    def work(number: int) -> HashedFile | OSError:
        def count(size: int) -> None:
            read[number] += size
            if stop.is_set():
                raise OSError(0, "given up")

        try:
            return hash_file(files[number], count)
        except OSError as error:
            return error

    threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)), len(files)))
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        try:
            waiting = {pool.submit(work, number): number for number in range(len(files))}
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                heartbeat()
                bar.update(sum(read) - shown)
                shown = sum(read)
                for future in sorted(done, key=lambda one: one.exception() is not None):  # results before exceptions
                    yield waiting.pop(future), future.result()
        finally:  # after Ctrl-C, or if the caller stops iterating
            stop.set()
            pool.shutdown(cancel_futures=True)


def hash_file(file: Path, count: Callable[[int], None] = lambda size: None) -> HashedFile:
    """Hash a file in chunks and call `count` with the size of each chunk in bytes.

    A file that changes during an attempt is hashed again, with at most three attempts in total.

    Raises:
        OSError: The file cannot be read, or it changed during each attempt.
    """
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for _ in range(3):
        with file.open("rb", buffering=0) as opened:
            before = FileStamp.from_stat(os.fstat(opened.fileno()))
            age = time.time_ns() - before.changed_ns
            if 0 <= age < TIMESTAMP_TICK_NS:
                time.sleep((TIMESTAMP_TICK_NS - age) / 1e9)
            digest, left = hashlib.sha256(), before.bytes  # a growing file is read up to its size at opening
            while left and (size := opened.readinto(buffer[: min(left, CHUNK_BYTES)])):
                digest.update(buffer[:size])
                left -= size
                count(size)
            if before == FileStamp.from_stat(os.fstat(opened.fileno())):
                return HashedFile(before, digest.hexdigest())
    raise OSError(0, "it is being changed by another program")
