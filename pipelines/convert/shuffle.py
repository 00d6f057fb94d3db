"""External shuffle of a split's rows into shards, in two passes with spool files between them. See `writer`.

Pass 1 (`partition`) encodes a block of source rows, sorts the samples by destination and writes them to spool files.
Pass 2 (`merge`) collects the samples of one shard and writes its tar. Both passes run in worker processes. A block or
shard is finished once its table has been renamed to its final name, so an interrupted pass can be repeated.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from configs.utils.errors import UserError
from pipelines.convert.encode import Defect, Encoded, encode
from pipelines.convert.layout import SplitLayout
from pipelines.convert.source import SplitSource
from pipelines.convert.spool import commit, commit_npz, commit_pieces, load_table, spool_damage_hint, sync_folder
from pipelines.order import permutation
from pipelines.storage import tar_format
from pipelines.storage.dataset import EXTENSIONS
from pipelines.storage.index import INDEX_COLUMNS


@dataclass(frozen=True)
class SplitInput:
    """Layout and rows of one split. Each worker process has a copy of this object."""

    layout: SplitLayout
    rows: SplitSource


def partition(splits: dict[str, SplitInput], task: tuple[str, int]) -> int:
    """Encode the rows of a block, write them to the spool sorted by destination, then write the block's table.

    Args:
        splits: All splits by name.
        task: Name of the split and index of the block.

    Returns:
        The index of the block.

    Raises:
        UserError: The source cannot be read or returns the wrong number of rows, npy images differ in shape, or a
            sample is defective and `Options.strict` is set.
    """
    layout, rows, block = splits[task[0]].layout, splits[task[0]].rows, task[1]
    start = block * layout.block_rows
    stop = start + layout.block_size(block)
    positions = _positions(layout.rows, layout.options.seed, layout.shuffled)[start:stop]
    payloads: list[Encoded | None] = []
    defects: list[tuple[int, str]] = []
    sums = np.zeros((2, 3), np.int64)
    reencoded: Counter[str] = Counter()
    for row, sample in enumerate(rows.read(start, stop), start):
        try:
            encoded = encode(sample, layout.options.encoding)
        except Defect as defect:
            if layout.options.strict:
                raise UserError(
                    f"{rows.describe(row)}: {defect}; fix or remove it, or omit --strict, and delete {layout.out}"
                ) from None
            defects.append((row, str(defect)))
            payloads.append(None)
            continue
        _check_shape(layout, rows, row, encoded)
        sums += encoded.sums
        if encoded.reencoded is not None:
            reencoded[encoded.reencoded] += 1
        payloads.append(encoded)
    if len(payloads) != stop - start:
        raise UserError(f"{rows.describe(start)}: the source returned {len(payloads)} rows instead of {stop - start}")
    order = [int(i) for i in np.argsort(positions) if payloads[i] is not None]
    kept = [payload for i in order if (payload := payloads[i]) is not None]
    group_of = positions[order] // layout.shard_rows // layout.group_shards
    for group in range(layout.groups):
        chosen = np.flatnonzero(group_of == group)
        commit_pieces(layout.block_group(block, group), [kept[i].payload for i in chosen], layout.spool)
    table = {
        "row": np.array([start + i for i in order], np.int64),
        "position": positions[order].astype(np.int64),
        "size": np.array([len(sample.payload) for sample in kept], np.int64),
        "height": np.array([sample.height for sample in kept], np.int32),
        "width": np.array([sample.width for sample in kept], np.int32),
        "sums": sums,
        "defect_row": np.array([row for row, _ in defects], np.int64),
        "defect_reason": np.array([reason for _, reason in defects], dtype=str),
        "reencoded_reason": np.array([*reencoded], dtype=str),
        "reencoded_count": np.array([*reencoded.values()], np.int64),
    }
    sync_folder(layout.spool)  # the samples must reach the disk before their table
    commit_npz(layout.block_table(block), table)
    return block


def _check_shape(layout: SplitLayout, rows: SplitSource, row: int, encoded: Encoded) -> None:
    if layout.image_shape is not None and (encoded.height, encoded.width) != layout.image_shape[:2]:
        raise UserError(
            f"{rows.describe(row)} has {encoded.height} x {encoded.width} pixels and others "
            f"{layout.image_shape[0]} x {layout.image_shape[1]}, but npy stores one shape; "
            f"delete {layout.out}, then give --size N or --encoding jpeg"
        )


def merge(splits: dict[str, SplitInput], task: tuple[str, int]) -> int:
    """Collect the samples of a shard from every block, write the tar and .idx files, then write the shard's table.

    Args:
        splits: All splits by name.
        task: Name of the split and index of the shard.

    Returns:
        The index of the shard.

    Raises:
        UserError: A spool file is damaged.
    """
    layout, labels, shard = splits[task[0]].layout, splits[task[0]].rows.labels, task[1]
    samples = sorted(_shard_samples(layout, shard), key=lambda sample: sample[0])
    extension = EXTENSIONS[layout.options.encoding.name]
    head = tar_format.npy_header(layout.image_shape) if layout.image_shape else b""
    writers: dict[int, tar_format.MemberWriter] = {}
    label_size = None if labels is None else len(tar_format.label_text(0, layout.classes))
    label_writer = tar_format.MemberWriter("cls", label_size or 0)
    digest, offset, lines = hashlib.sha256(), 0, []
    columns: dict[str, list[int]] = {name: [] for name in ("offset", "size", "label", "height", "width")}
    temporary = layout.spool / f"shard-{shard:06d}.{os.getpid()}.tar"
    with temporary.open("wb", buffering=2**20) as file:

        def put(pieces: list[bytes | memoryview]) -> None:
            nonlocal offset
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                offset += len(piece)

        for _, row, payload, height, width in samples:
            key, size = tar_format.key_of(row), len(head) + len(payload)
            label = -1 if labels is None else int(labels[row])
            values = (offset + tar_format.BLOCK, size, label, height, width)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            lines.append(tar_format.index_line(key, extension, offset + tar_format.BLOCK, size, label_size))
            if size not in writers:
                writers[size] = tar_format.MemberWriter(extension, size)
            put(writers[size].member(key, head, payload))
            if labels is not None:
                put(label_writer.member(key, tar_format.label_text(label, layout.classes)))
        put([tar_format.END_OF_ARCHIVE])
        file.flush()
        os.fsync(file.fileno())
    index = f"{tar_format.INDEX_VERSION} {len(samples)}\n" + "".join(lines)
    commit(layout.shard_file(shard).with_suffix(".idx"), index.encode(), layout.spool)
    temporary.rename(layout.shard_file(shard))
    sync_folder(layout.out)
    arrays = {name: np.array(values, INDEX_COLUMNS[name]) for name, values in columns.items()}
    commit_npz(layout.shard_table(shard), {**arrays, "bytes": np.int64(offset), "sha256": np.array(digest.hexdigest())})
    return shard


def _shard_samples(layout: SplitLayout, shard: int) -> Iterator[tuple[int, int, memoryview, int, int]]:
    """Yield (position, row, payload, height, width) for each sample of a shard.

    The samples of one block are read at once, since they are contiguous in the spool.

    Raises:
        UserError: A spool file is damaged.
    """
    group = shard // layout.group_shards
    for block in range(layout.blocks):
        table = load_table(layout.block_table(block))
        shard_of = table["position"] // layout.shard_rows
        in_group = shard_of // layout.group_shards == group
        chosen = np.flatnonzero(shard_of == shard)
        if not len(chosen):
            continue
        start = int(table["size"][in_group & (shard_of < shard)].sum())
        with layout.block_group(block, group).open("rb") as file:
            file.seek(start)
            content = memoryview(file.read(int(table["size"][chosen].sum())))
        if len(content) < table["size"][chosen].sum():
            raise UserError(f"{file.name} was truncated; {spool_damage_hint(layout.spool)}")
        ends = np.cumsum(table["size"][chosen]).tolist()
        for i, end in zip(chosen.tolist(), ends, strict=True):
            payload = content[end - int(table["size"][i]) : end]
            yield (
                int(table["position"][i]),
                int(table["row"][i]),
                payload,
                int(table["height"][i]),
                int(table["width"][i]),
            )


@lru_cache(maxsize=1)
def _positions(rows: int, seed: int, shuffled: bool) -> np.ndarray:
    """Return the position of each source row after shuffling, or its own index if not `shuffled`: int64 [rows]."""
    if not shuffled:
        return np.arange(rows)
    positions = np.empty(rows, np.int64)
    positions[permutation(rows, seed, epoch=0)] = np.arange(rows)
    return positions
