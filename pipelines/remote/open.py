"""Open a data set in an object store through the cache of this machine."""

from __future__ import annotations

import threading
from functools import partial

from configs.utils.errors import UserError
from pipelines.remote.cache import DatasetCache, open_cache
from pipelines.remote.residency import POLL_S, RemoteShards
from pipelines.remote.store import Store
from pipelines.storage.dataset import DatasetInfo, parse_content
from pipelines.storage.index import load_index
from pipelines.storage.memory_map import reserve
from pipelines.storage.open import build_split, slot_bytes_of
from pipelines.storage.split import Split


def load_dataset(url: str) -> DatasetInfo:
    """Load and check dataset.json.

    Raises:
        UserError: It cannot be read, is invalid, or has an unsupported format version.
    """
    return read_dataset(Store(url))[0]


def read_dataset(store: Store) -> tuple[DatasetInfo, bytes]:
    """Return dataset.json, parsed and as stored. Raises UserError like `load_dataset`."""
    content = store.read("dataset.json")
    return parse_content(content, store.join("dataset.json")), content


def open_split(url: str, name: str, cache: str | None = None, cache_gib: float | None = None) -> Split:
    """Open a split, whose shards are fetched when they are read, or ahead of it.

    Args:
        url: URL of the data set.
        name: Name of the split.
        cache: data.cache, the folder of cached data sets; None: in the user's cache.
        cache_gib: data.cache_gib, the maximum size of this data set's shards in the cache.

    Raises:
        UserError: The data set or split does not exist, dataset.json or the index is invalid or cannot be fetched, or
            the cache cannot be used.
        ValueError, OSError: See `map_files`.
    """
    store = Store(url)
    dataset, content = read_dataset(store)
    if name not in dataset.splits:
        raise UserError(f"{store.url} has no split {name!r}; it has {', '.join(dataset.splits)}")
    files = open_cache(store, content, dataset, cache, cache_gib)
    _provide_index(files, dataset, name)
    shards = dataset.splits[name].shards
    index = load_index(files.folder, dataset, name)
    slot_bytes = slot_bytes_of(dataset, name, int(index["size"][0]))
    mapped = reserve(files.folder, [shard.bytes for shard in shards], slot_bytes)
    paths, sha256 = tuple(files.folder / shard.file for shard in shards), [shard.sha256 for shard in shards]
    residency = partial(RemoteShards, files, shards, mapped, name=name)
    return build_split(dataset, name, paths, index, mapped, slot_bytes, sha256, residency)


def _provide_index(files: DatasetCache, dataset: DatasetInfo, name: str) -> None:
    """Fetch the index of a split, unless it is in the cache and intact."""
    with files.open_locks() as locks:
        stopped = threading.Event()
        while files.provide(dataset.splits[name].index, locks, stopped, lambda size: None) is None:
            stopped.wait(POLL_S)  # another process is fetching it
