"""Sample indices of each batch, as pure functions of seed, epoch, batch, rank and world size.

Every rank computes the same global order and takes its positions from it, so the global batch does not depend on the
world size.
"""

from __future__ import annotations

import numpy as np

from pipelines.cpu import batch
from pipelines.rng import hash64, stream


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of range(samples) for (seed, epoch): int64 [samples].

    Samples are sorted by a hash, so the result does not depend on the version of NumPy, unlike its random generators.
    The low bits of each key hold the sample, since sorting integers is faster than an argsort.
    """
    mask = np.uint64((1 << max(1, (samples - 1).bit_length())) - 1)
    keys = (_keys(samples, seed, epoch) & ~mask) | np.arange(samples, dtype=np.uint64)
    ordered = np.empty_like(keys)
    batch.sort_hashes(keys, ordered)
    return (ordered & mask).astype(np.int64)


def window_permutation(shard: np.ndarray, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return an order for data larger than memory: random shards, samples shuffled in windows of several shards.

    The shards of a window can be read ahead and dropped together.

    Args:
        shard: int [samples], the shard of each sample.
        window_shards: shards per window.
        seed: seed of the run.
        epoch: counted from 0.

    Returns:
        int64 [samples].
    """
    window = shard_windows(int(shard.max()) + 1, window_shards, seed, epoch)[shard]
    return np.lexsort((_keys(len(shard), seed, epoch), window))


def shard_windows(shards: int, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return the window of each shard in `window_permutation`, counted in reading order: int64 [shards]."""
    return np.argsort(permutation(shards, seed, epoch)) // window_shards


def _keys(samples: int, seed: int, epoch: int) -> np.ndarray:
    return hash64(np.arange(samples, dtype=np.uint64) ^ stream(seed, epoch, "order"))


def batches_per_epoch(samples: int, batch_size: int, world_size: int, accumulation_steps: int = 1) -> int:
    """Return the number of training batches per rank and epoch; an incomplete last optimizer step is dropped."""
    return samples // (batch_size * world_size * accumulation_steps) * accumulation_steps


def train_batch(order: np.ndarray, batch: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the sample indices of one batch of this rank: int64 [batch_size].

    batch: counted from 0 in each epoch. Its samples on all ranks are consecutive in `order`.
    """
    start = (batch * world_size + rank) * batch_size
    return order[start : start + batch_size]


def eval_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the range [start, stop) of a split that a rank evaluates. The ranges cover every sample once."""
    return samples * rank // world_size, samples * (rank + 1) // world_size
