"""Which samples make up batch `step` of `epoch` for `rank` of `world_size`: pure functions of integers.

Knows no images, no shards but by number, no DALI. Every rank computes the one global order and takes its positions
from it, so that the global batch of a step is the same whatever the world size.
"""

from __future__ import annotations

import numpy as np

from pipelines.cpu import batch
from pipelines.rng import hash64, stream


def permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(samples), int64, from (seed, epoch).

    Samples sorted by a hash, so the result does not depend on the version of NumPy, as its own generators' streams
    may. Each key carries its sample in its low bits, since sorting integers is faster than an argsort.
    """
    mask = np.uint64((1 << max(1, (samples - 1).bit_length())) - 1)
    keys = (_keys(samples, seed, epoch) & ~mask) | np.arange(samples, dtype=np.uint64)
    ordered = np.empty_like(keys)
    batch.sort_hashes(keys, ordered)
    return (ordered & mask).astype(np.int64)


def window_permutation(shard: np.ndarray, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """An order for data larger than memory: shards at random, samples shuffled within windows of several shards.

    shard: int [samples], the shard of each sample. A window's shards can be read ahead and forgotten together.
    """
    window = shard_windows(int(shard.max()) + 1, window_shards, seed, epoch)[shard]
    return np.lexsort((_keys(len(shard), seed, epoch), window))


def shard_windows(shards: int, window_shards: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [shards]: the window of `window_permutation` that each shard belongs to, counted in reading order."""
    return np.argsort(permutation(shards, seed, epoch)) // window_shards


def _keys(samples: int, seed: int, epoch: int) -> np.ndarray:
    return hash64(np.arange(samples, dtype=np.uint64) ^ stream(seed, epoch, "order"))


def batches_per_epoch(samples: int, batch_size: int, world_size: int, accumulation_steps: int = 1) -> int:
    """Batches per rank and epoch in training: whole optimizer steps only, the last partial one is dropped."""
    return samples // (batch_size * world_size * accumulation_steps) * accumulation_steps


def train_batch(order: np.ndarray, step: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The sample indices of this rank's batch `step`: its part of positions step * global batch … of the order."""
    start = (step * world_size + rank) * batch_size
    return order[start : start + batch_size]


def eval_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous piece [start, stop) of a split that this rank evaluates; the pieces cover every sample once."""
    return samples * rank // world_size, samples * (rank + 1) // world_size
