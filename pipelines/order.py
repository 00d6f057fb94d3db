"""Compute the sample indices of each batch as pure functions of seed, epoch, batch, rank and world size.

Every rank computes the same global order and selects its own positions. Global batches of a given size therefore
contain the same samples for any world size.
"""

from __future__ import annotations

import numpy as np

from pipelines.cpu import batch
from pipelines.rng import hash64, stream


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of range(samples) for a seed and an epoch: int64 [samples].

    Samples are sorted by a hash. Unlike NumPy's random generators, the hash gives the same result for any version of
    NumPy. The low bits of each sort key hold the sample's index, so a plain sort replaces a slower argsort.
    """
    mask = np.uint64((1 << max(1, (samples - 1).bit_length())) - 1)
    keys = (_keys(samples, seed, epoch) & ~mask) | np.arange(samples, dtype=np.uint64)
    ordered = np.empty_like(keys)
    batch.sort_hashes(keys, ordered)
    return (ordered & mask).astype(np.int64)


def window_permutation(shard: np.ndarray, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return a sample order for data larger than memory.

    Shards are shuffled and grouped into windows, and samples are shuffled within their window. The shards of a window
    can therefore be read ahead and dropped from memory together.

    Args:
        shard: Shard index of each sample, int [samples].
        window_shards: Number of shards per window.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.

    Returns:
        Sample indices in reading order, int64 [samples].
    """
    window = shard_windows(int(shard.max()) + 1, window_shards, seed, epoch)[shard]
    return np.lexsort((_keys(len(shard), seed, epoch), window))


def shard_windows(shards: int, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return the window index of each shard for `window_permutation`: int64 [shards].

    Windows are numbered from 0 in reading order.
    """
    return np.argsort(permutation(shards, seed, epoch)) // window_shards


def _keys(samples: int, seed: int, epoch: int) -> np.ndarray:
    return hash64(np.arange(samples, dtype=np.uint64) ^ stream(seed, epoch, "order"))


def stratified_subset(labels: np.ndarray, count: int) -> np.ndarray:
    """Return a random part of a split, with each class in proportion to its size: sample indices, int64, ascending.

    The part depends only on the labels, not on the seed of a run. A smaller part is contained in every larger one.

    Args:
        labels: Label of each sample, int [samples].
        count: Number of samples to return. At least one of each class is returned, even if that is more.
    """
    hashes = hash64(np.arange(len(labels), dtype=np.uint64) ^ stream(0, 0, "limit"))
    grouped = np.lexsort((hashes, labels))  # by class, in random order within a class
    _, starts, sizes = np.unique(labels[grouped], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(starts, sizes)  # within its class
    share = np.where(place == 0, 0.0, (place + 0.5) / np.repeat(sizes, sizes))
    return np.sort(grouped[np.lexsort((hashes[grouped], share))[: max(count, len(sizes))]])


def batches_per_epoch(samples: int, batch_size: int, world_size: int, accumulation_steps: int = 1) -> int:
    """Return the number of training batches per rank and epoch. An incomplete last optimizer step is dropped."""
    return samples // (batch_size * world_size * accumulation_steps) * accumulation_steps


def train_batch(order: np.ndarray, batch: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the sample indices of one batch of a rank: int64 [batch_size].

    For each batch index, the batches of all ranks are consecutive in `order`.

    Args:
        order: Sample indices of the epoch, int64 [samples].
        batch: Index of the batch within the epoch.
        batch_size: Number of samples per rank.
        rank, world_size: Rank of this process, and number of training processes.
    """
    start = (batch * world_size + rank) * batch_size
    return order[start : start + batch_size]


def eval_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the sample range [start, stop) of a rank. Together, all ranks evaluate each sample once."""
    return samples * rank // world_size, samples * (rank + 1) // world_size
