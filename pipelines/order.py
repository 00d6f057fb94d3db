"""Compute the sample indices of each batch as pure functions of seed, epoch, batch, rank and world size.

Every rank computes the same global order and selects its own positions. Global batches of a given size therefore
contain the same samples for any world size.
"""

from __future__ import annotations

from typing import NamedTuple

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


def lane_permutation(shard: np.ndarray, lanes: int, seed: int, epoch: int) -> np.ndarray:
    """Return a sample order for data larger than memory, which mixes `lanes` shards at a time.

    The shards are shuffled and dealt to lanes in turn. A lane is a sequence of shards, with the samples of each shard
    shuffled. Positions 2i and 2i + 1 of the order belong to lane i mod `lanes`, so that every machine can take the
    pairs of its own lanes, see `train_positions`. Lanes are equally long: what some have too much at their end, and the
    last shards, if their number is not a multiple of `lanes`, are split over the others.

    Args:
        shard: Shard index of each sample, int [samples].
        lanes: Number of lanes.
        seed: Seed of the run.
        epoch: Epoch, counted from 0.

    Returns:
        Sample indices in reading order, int64 [samples].
    """
    sizes = np.bincount(shard)
    turns = permutation(len(sizes), seed, epoch)
    turn = np.empty(len(sizes), np.uint16 if len(sizes) <= 2**16 else np.int64)  # NumPy sorts uint16 in linear time
    turn[turns] = np.arange(len(sizes))
    drawn = permutation(len(shard), seed, epoch)
    by_shard = drawn[np.argsort(turn[shard[drawn]], kind="stable")]
    ordered = np.empty_like(by_shard)
    ordered[_lane_positions(sizes[turns], lanes)] = by_shard
    return ordered


def _lane_positions(sizes: np.ndarray, lanes: int) -> np.ndarray:
    """Return the position in the order of each sample, counted shard by shard: int64 [samples].

    `sizes` are the numbers of samples of the shards in the order in which they are dealt, int64 [shards].
    """
    samples, whole = int(sizes.sum()), len(sizes) // lanes * lanes
    rounds, left = divmod(samples, 2 * lanes)
    length = 2 * rounds + np.clip(left - 2 * np.arange(lanes), 0, 2)
    dealt = sizes[:whole].reshape(-1, lanes)
    begin = (np.cumsum(dealt, axis=0) - dealt).reshape(-1)  # of each whole shard in its lane
    lane, offset = np.arange(whole) % lanes, np.arange(samples)
    offset[: dealt.sum()] += np.repeat(begin - np.cumsum(sizes[:whole]) + sizes[:whole], sizes[:whole])
    lane = np.repeat(lane, sizes[:whole])

    too_much = np.concatenate([np.flatnonzero(offset[: len(lane)] >= length[lane]), np.arange(len(lane), samples)])
    lane = np.concatenate([lane, np.empty(samples - len(lane), np.int64)])
    filled = np.minimum(dealt.sum(axis=0), length)
    # In the order of reversed bits, so that lanes that follow each other are likely on the same machine.
    fill = np.array(sorted(range(lanes), key=lambda number: f"{number:032b}"[::-1]))
    missing = (length - filled)[fill]
    lane[too_much] = np.repeat(fill, missing)
    offset[too_much] = np.arange(len(too_much)) + np.repeat(filled[fill] - np.cumsum(missing) + missing, missing)
    return offset // 2 * (2 * lanes) + 2 * lane + offset % 2


class ShardSchedule(NamedTuple):
    """The shards that the ranks of one machine read in an epoch, in the order of their first use. Steps are batches."""

    shard: np.ndarray  # int64 [K]: shard indices, each once
    first: np.ndarray  # int64 [K], ascending: step of the shard's first use
    last: np.ndarray  # int64 [K]: step of its last use


def shard_schedule(
    order: np.ndarray,
    shard: np.ndarray,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    machines: int = 1,
) -> ShardSchedule:
    """Return which shards the machine of a rank needs in an epoch, and when.

    Args:
        order: Sample indices of the epoch, int64 [samples].
        shard: Shard index of each sample, int [samples].
        steps: Batches per rank.
        batch_size, rank, world_size, machines: See `train_positions`.
    """
    machine_batch = batch_size * world_size // machines
    used = order[: steps * machine_batch * machines]
    if machines > 1:
        used = used.reshape(-1, machines, 2)[:, rank // (world_size // machines)].reshape(-1)
    needed, place = shard[used], np.arange(len(used))
    first = np.full(shard.max(initial=-1) + 1, len(used))
    last = np.zeros_like(first)
    first[needed[::-1]] = place[::-1]  # the last assignment to an index counts
    last[needed] = place
    shards = np.argsort(first)[: np.count_nonzero(first < len(used))]
    return ShardSchedule(shards, first[shards] // machine_batch, last[shards] // machine_batch)


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


def train_batch(
    order: np.ndarray, batch: int, batch_size: int, rank: int, world_size: int, machines: int = 1
) -> np.ndarray:
    """Return the sample indices of one batch of a rank: int64 [batch_size].

    Args:
        order: Sample indices of the epoch, int64 [samples].
        batch, batch_size, rank, world_size, machines: See `train_positions`.
    """
    if machines == 1:
        start = (batch * world_size + rank) * batch_size
        return order[start : start + batch_size]
    return order[train_positions(batch, batch_size, rank, world_size, machines)]


def train_positions(batch: int, batch_size: int, rank: int, world_size: int, machines: int = 1) -> np.ndarray:
    """Return the positions of one batch of a rank in the order of the epoch: int64 [batch_size].

    For each batch index, the batches of all ranks are consecutive in the order. With several machines, pair i of
    positions, 2i and 2i + 1, belongs to machine i mod `machines`. The ranks of a machine share its positions in
    contiguous parts.

    Args:
        batch: Index of the batch within the epoch.
        batch_size: Number of samples per rank.
        rank, world_size: Rank of this process, and number of training processes.
        machines: Number of machines, with equally many consecutive ranks and an even number of samples per batch.
    """
    machine, local_rank = divmod(rank, world_size // machines)
    place = local_rank * batch_size + np.arange(batch_size)  # within the machine's part
    return batch * world_size * batch_size + 2 * (place // 2 * machines + machine) + place % 2


def eval_range(samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the sample range [start, stop) of a rank. Together, all ranks evaluate each sample once."""
    return samples * rank // world_size, samples * (rank + 1) // world_size
