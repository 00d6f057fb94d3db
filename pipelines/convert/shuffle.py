"""External shuffle of a split's rows into shards, in two passes with spool files between them. See `writer`.

Pass 1 (`partition`) encodes a block of source rows, sorts the samples by destination and writes them to spool files.
Pass 2 (`merge`) collects the samples of one shard and writes its tar. Both passes run in worker processes. A block or
shard is finished once its table has been renamed to its final name, so an interrupted pass can be repeated.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import atomic_write, sync_folder
from pipelines.convert.encode import Defect, Encoded, encode
from pipelines.convert.layout import SplitLayout
from pipelines.convert.source import SplitSource
from pipelines.convert.spool import WRITER, Table, load_table, spool_damage_hint, write_payloads, write_table
from pipelines.storage import tar_format
from pipelines.storage.dataset import EXTENSIONS
from pipelines.storage.index import stored_order
from pipelines.storage.memory_map import HUGE_PAGE_BYTES

SAMPLE_COLUMNS = ("position", "row", "size", "height", "width")  # arrays of a block's table with one item per sample


@dataclass(frozen=True)
class SplitInput:
    """Layout and rows of one split. Each worker process has a copy of this object."""

    layout: SplitLayout
    rows: SplitSource


SplitInputs = dict[str, SplitInput]  # by name of the split


def first_rows(splits: SplitInputs) -> dict[str, str]:
    """Return a hash of the first row of each split, to compare what several machines read.

    Raises:
        UserError: The source cannot be read.
        OSError: The source cannot be read.
    """
    return {name: _hash(next(iter(split.rows.read(0, 1)))) for name, split in splits.items()}


def _hash(row: np.ndarray | bytes) -> str:
    return hashlib.sha256(row if isinstance(row, bytes) else row.tobytes()).hexdigest()


def partition(splits: SplitInputs, task: tuple[str, int]) -> int:
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
    split, block = splits[task[0]], task[1]
    layout = split.layout
    encoded, defects = _encode_block(split, block)
    reencoded = Counter(sample.reencoded for sample in encoded.values() if sample.reencoded is not None)
    rows = np.array([*encoded], np.int64)
    positions = _positions(layout.rows, layout.options.seed, layout.shuffled)[rows]
    order = np.argsort(positions)
    rows, positions = rows[order], positions[order]
    samples = [encoded[row] for row in rows.tolist()]
    group_of = positions // layout.shard_rows // layout.group_shards
    for group in range(layout.groups):
        payloads = [samples[i].payload for i in np.flatnonzero(group_of == group)]
        write_payloads(layout.block_group(block, group), payloads)
    sync_folder(layout.spool)  # the samples must reach the disk before their table
    table = {
        "row": rows,
        "position": positions,
        "size": np.array([len(sample.payload) for sample in samples], np.int64),
        "height": np.array([sample.height for sample in samples], np.int32),
        "width": np.array([sample.width for sample in samples], np.int32),
        "sums": sum((sample.sums for sample in samples), np.zeros((2, 3), np.int64)),
        "defect_row": np.array([*defects], np.int64),
        "defect_reason": np.array([*defects.values()], dtype=str),
        "reencoded_reason": np.array([*reencoded], dtype=str),
        "reencoded_count": np.array([*reencoded.values()], np.int64),
    }
    write_table(layout.block_table(block), table)
    return block


def _encode_block(split: SplitInput, block: int) -> tuple[dict[int, Encoded], dict[int, str]]:
    """Encode the rows of a block. Return the encoded samples and the reasons of defects, both by source row."""
    layout, rows = split.layout, split.rows
    start = block * layout.block_rows
    stop = start + layout.block_size(block)
    encoded: dict[int, Encoded] = {}
    defects: dict[int, str] = {}
    for row, sample in enumerate(rows.read(start, stop), start):
        try:
            encoded[row] = encode(sample, layout.options.encoding)
        except Defect as defect:
            if layout.options.strict:
                raise UserError(
                    f"{rows.describe(row)}: {defect}; fix or remove it, or omit --strict, and delete {layout.out}"
                ) from None
            defects[row] = str(defect)
        else:
            _check_shape(layout, rows, row, encoded[row])
    if (count := len(encoded) + len(defects)) != stop - start:
        raise UserError(f"{rows.describe(start)}: the source returned {count} rows instead of {stop - start}")
    return encoded, defects


def _check_shape(layout: SplitLayout, rows: SplitSource, row: int, encoded: Encoded) -> None:
    if layout.image_shape is not None and (encoded.height, encoded.width) != layout.image_shape[:2]:
        raise UserError(
            f"{rows.describe(row)} has {encoded.height} x {encoded.width} pixels and others "
            f"{layout.image_shape[0]} x {layout.image_shape[1]}, but npy stores one shape; "
            f"delete {layout.out}, then resize to one size (option size) or use encoding jpeg"
        )


def merge(splits: SplitInputs, task: tuple[str, int]) -> int:
    """Collect the samples of a shard from every block, write the tar and .idx files, then write the shard's table.

    Args:
        splits: All splits by name.
        task: Name of the split and index of the shard.

    Returns:
        The index of the shard.

    Raises:
        UserError: A spool file is damaged.
    """
    layout, row_labels, shard = splits[task[0]].layout, splits[task[0]].rows.labels, task[1]
    samples, payloads = _shard_samples(layout, shard)
    extension = EXTENSIONS[layout.options.encoding.name]
    head = tar_format.npy_header(layout.image_shape) if layout.image_shape else b""
    labels = None if row_labels is None else row_labels[samples["row"]]
    label_text = None if labels is None else tar_format.digits(labels, tar_format.count_label_digits(layout.classes))
    label_digits = None if label_text is None else label_text.shape[1]
    sizes = samples["size"] + len(head)
    strides = tar_format.sample_bytes(sizes, label_digits)
    offsets = np.cumsum(strides) - strides + tar_format.BLOCK
    digest = hashlib.sha256()

    def write_tar(file: BinaryIO) -> None:
        for block in _huge_pages(tar_format.shard_pieces(samples["row"], extension, head, payloads, label_text)):
            file.write(block)
            digest.update(block)

    index = tar_format.index_text(samples["row"], extension, offsets, sizes, label_digits)
    file = layout.shard_file(shard)
    atomic_write(file.with_suffix(".idx"), lambda opened: opened.write(index.encode()), sync=False, writer=WRITER)
    atomic_write(file, write_tar, writer=WRITER)
    table = {
        "offset": offsets,
        "size": sizes,
        "label": np.full(len(sizes), -1) if labels is None else labels,
        "height": samples["height"],
        "width": samples["width"],
        "bytes": np.array(strides.sum() + len(tar_format.END_OF_ARCHIVE)),
        "sha256": np.array(digest.hexdigest()),
    }
    write_table(layout.shard_table(shard), table)
    return shard


def _shard_samples(layout: SplitLayout, shard: int) -> tuple[Table, list[memoryview]]:
    """Return the rows of the block tables and the payloads of the samples of a shard, in stored order.

    The samples of one block are read at once, since they are contiguous in the spool.

    Raises:
        UserError: A spool file is damaged.
    """
    group = shard // layout.group_shards
    tables: list[Table] = []
    payloads: list[memoryview] = []
    for block in range(layout.blocks):
        table = load_table(layout.block_table(block))
        shard_of = table["position"] // layout.shard_rows
        before = (shard_of // layout.group_shards == group) & (shard_of < shard)
        tables.append({name: table[name][shard_of == shard] for name in SAMPLE_COLUMNS})
        ends = np.cumsum(tables[-1]["size"]).tolist()
        total = ends[-1] if ends else 0
        with layout.block_group(block, group).open("rb") as file:
            file.seek(int(table["size"][before].sum()))
            content = memoryview(file.read(total))
        if len(content) < total:
            raise UserError(f"{file.name} was truncated; {spool_damage_hint(layout.spool)}")
        payloads += [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    samples = {name: np.concatenate([table[name] for table in tables]) for name in SAMPLE_COLUMNS}
    order = np.argsort(samples["position"])
    return {name: column[order] for name, column in samples.items()}, [payloads[i] for i in order]


def _huge_pages(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Join pieces of a file to blocks of HUGE_PAGE_BYTES; the last block may be shorter.

    A block is valid until the next one is requested.
    """
    block, end = memoryview(bytearray(HUGE_PAGE_BYTES)), 0
    for piece in pieces:
        left = memoryview(piece)
        while end + len(left) > HUGE_PAGE_BYTES:
            room = HUGE_PAGE_BYTES - end
            block[end:], left, end = left[:room], left[room:], 0
            yield block
        block[end : end + len(left)] = left
        end += len(left)
    yield block[:end]


@lru_cache(maxsize=1)
def _positions(rows: int, seed: int, shuffled: bool) -> np.ndarray:
    """Return the position of each source row after shuffling, or its own index if not `shuffled`: int64 [rows]."""
    positions = np.empty(rows, np.int64)
    positions[stored_order(rows, seed, shuffled)] = np.arange(rows)
    return positions
