"""Verify a data set in an object store, with a few of its shards on this machine at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.files import user_cache
from pipelines.remote.open import read_dataset
from pipelines.remote.store import Store
from pipelines.storage.dataset import MAX_BYTES, RECONVERT, DatasetInfo, FileInfo, ShardInfo
from pipelines.storage.hash_cache import hash_file
from pipelines.storage.open import open_split
from pipelines.storage.split import Split
from pipelines.storage.verify import info_errors, shard_error

MAX_SHARDS = 4  # shards on this machine at a time


def verify(url: str) -> tuple[DatasetInfo, list[str]]:
    """Return the data set at a URL and its problems, one sentence each, as `pipelines.storage.verify.verify` does.

    Raises:
        UserError: There is no data set at the URL, its dataset.json is invalid, or objects cannot be read.
        OSError: The disk of the cache is full or cannot be written.
    """
    store = Store(url)
    with tempfile.TemporaryDirectory(dir=_cache()) as name:
        folder = Path(name)
        dataset, content = read_dataset(store)
        (folder / "dataset.json").write_bytes(content)  # for `open_split`
        total = sum(shard.bytes for split in dataset.splits.values() for shard in split.shards)
        problems: list[str] = []
        with progress_bar(total=total, desc="verify", unit="B", unit_scale=True, unit_divisor=1024) as bar:
            lock = Lock()

            def count(size: int) -> None:
                with lock:
                    bar.update(size)

            for split in dataset.splits:
                problems += _split_errors(store, folder, dataset, split, count)
        _fetch_if_stored(store, folder, "_info.json", MAX_BYTES)
        return dataset, problems + info_errors(folder, dataset)


def _cache() -> Path | None:
    """Return the folder for temporary files, or None for that of the system."""
    try:
        folder = user_cache("verify")
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):
        return None
    return folder


def _split_errors(
    store: Store, folder: Path, dataset: DatasetInfo, name: str, count: Callable[[int], object]
) -> list[str]:
    info, stopped = dataset.splits[name], Event()
    _fetch(store, folder, info.index, stopped)
    for shard in info.shards:
        _empty(folder / shard.file, shard.bytes)
    try:
        split = open_split(folder, name, verify="off")  # maps the empty files
    except UserError as error:
        return [str(error).removesuffix(f"; {RECONVERT}").replace(str(folder), store.url)]
    with ThreadPoolExecutor(MAX_SHARDS, thread_name_prefix="verify") as pool:
        try:
            work = partial(_shard_error, store, folder, split, stopped, count)
            return [problem for problem in pool.map(work, range(len(info.shards))) if problem]
        finally:  # after an error or Ctrl-C
            stopped.set()
            pool.shutdown(cancel_futures=True)


def _shard_error(
    store: Store, folder: Path, split: Split, stopped: Event, count: Callable[[int], object], number: int
) -> str | None:
    """Fetch a shard into the empty file that is mapped, check it, and remove its bytes."""
    shard = split.info.shards[number]
    file = folder / shard.file
    beside = file.with_suffix(".idx")
    with file.open("r+b") as mapped:
        try:
            if problem := _fetch(store, folder, shard, stopped, count):
                return problem
            if not os.path.samestat(os.fstat(mapped.fileno()), file.stat()):  # gcsfs removes files of failed transfers
                with file.open("rb") as fetched:
                    shutil.copyfileobj(fetched, mapped)
                mapped.flush()
            _fetch_if_stored(store, folder, beside.name, shard.bytes, stopped)
            return shard_error(split, number, hash_file(file).sha256)
        finally:
            mapped.truncate(0)
            file.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)


def _empty(file: Path, size: int) -> None:
    """Make a file that has a size, but takes no space."""
    with file.open("wb") as opened:
        opened.truncate(size)


def _fetch(
    store: Store,
    folder: Path,
    info: FileInfo | ShardInfo,
    stopped: Event,
    count: Callable[[int], object] = lambda size: None,
) -> str | None:
    """Fetch an object that dataset.json lists. Return a sentence if it is missing or of the wrong size.

    Of an object of the wrong size, only the size is fetched.
    """
    found, file = store.find(info.file, stopped=stopped), folder / info.file
    if found is None:
        return f"{info.file} is missing"
    if found.bytes == info.bytes:
        store.fetch(info.file, file, info.bytes, stopped=stopped, count=count)
    else:
        _empty(file, found.bytes)
    size = file.stat().st_size  # another one if the object was replaced meanwhile
    return None if size == info.bytes else f"{info.file} has {size:,} bytes, but dataset.json says {info.bytes:,}"


def _fetch_if_stored(store: Store, folder: Path, name: str, most: int, stopped: Event | None = None) -> None:
    """Fetch an object unless it is missing."""
    if store.find(name, stopped=stopped) is not None:
        store.fetch(name, folder / name, most, stopped=stopped)
