"""Write one split by running both passes of the shuffle, then write the split's index."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from configs.utils.console import progress_bar
from configs.utils.errors import UserError
from configs.utils.files import sync_folder
from pipelines.convert.layout import SplitLayout
from pipelines.convert.shuffle import SplitInputs, merge, partition
from pipelines.convert.source import Source, SplitSource
from pipelines.convert.spool import Table, load_table, spool_damage_hint, write_table
from pipelines.convert.worker_pool import Pool, defer_signals
from pipelines.storage.dataset import FileInfo, QuarantinedSample, ShardInfo, SplitInfo
from pipelines.storage.index import INDEX_COLUMNS

if TYPE_CHECKING:
    from tqdm import tqdm

    from pipelines.remote.upload import Uploads


@dataclass(frozen=True)
class WrittenSplit:
    """Statistics of a finished split, and its entry in dataset.json."""

    info: SplitInfo
    sums: np.ndarray  # int64 [2, 3], see Encoded
    pixels: int
    shapes: set[tuple[int, int]]
    fresh: dict[str, str]  # file name -> sha256 of each shard written by this call
    reencoded: dict[str, int]  # reason -> number of files re-encoded to jpeg, most frequent first


def write_split(
    source: Source, layout: SplitLayout, pool: Pool[SplitInputs], uploads: Uploads | None = None
) -> WrittenSplit:
    """Run both passes of the shuffle for one split and write the split's index. Upload the files if `uploads` is given.

    Raises:
        UserError: The source cannot be read, a row is rejected (see `partition`), no image can be decoded, the spool is
            damaged, a worker was killed, or an upload failed.
    """
    layout.spool.mkdir(exist_ok=True)
    blocks = _encode_blocks(layout, pool)
    tables, fresh = _merge_shards(layout, pool, uploads)
    shards = [_shard_info(layout, shard, table) for shard, table in enumerate(tables)]
    quarantined = _quarantined_samples(source.splits[layout.split], blocks)
    samples = _check_count(layout, shards, quarantined)
    columns = _index_columns(tables)
    heights, widths = columns["height"].astype(np.int64), columns["width"].astype(np.int64)
    return WrittenSplit(
        info=SplitInfo(
            samples=samples,
            labelled=source.splits[layout.split].labels is not None,
            source_rows=layout.rows,
            shuffled=layout.shuffled,
            quarantined=quarantined,
            index=_write_index(layout, columns),
            shards=tuple(shards),
        ),
        sums=sum((table["sums"] for table in blocks), np.zeros((2, 3), np.int64)),
        pixels=int(heights @ widths),
        shapes={(int(h), int(w)) for h, w in np.unique(np.stack([heights, widths], axis=1), axis=0)},
        fresh={shards[shard].file: shards[shard].sha256 for shard in fresh},
        reencoded=_count_reencoded(blocks),
    )


def _encode_blocks(layout: SplitLayout, pool: Pool[SplitInputs]) -> list[Table]:
    """Run pass 1 for each block that has no table yet, and return the tables of all blocks."""
    present = set(os.listdir(layout.spool))  # NFS would remember for seconds that a file did not exist
    missing = [block for block in range(layout.blocks) if layout.block_table(block).name not in present]
    with _progress_bar(layout, "read") as bar:
        bar.update(layout.rows - sum(layout.block_size(block) for block in missing))
        for block in pool.imap(partition, [(layout.split, block) for block in missing]):
            bar.update(layout.block_size(block))
    return [load_table(layout.block_table(block)) for block in range(layout.blocks)]


def _merge_shards(
    layout: SplitLayout, pool: Pool[SplitInputs], uploads: Uploads | None
) -> tuple[list[Table], list[int]]:
    """Run pass 2 for the unfinished shards, and upload them.

    Returns:
        The tables of all shards, and the indices of the shards that this call wrote.
    """
    present = {*os.listdir(layout.spool), *os.listdir(layout.out)}
    missing = [shard for shard in range(layout.shard_count) if not layout.is_written(shard, present)]
    left = Counter(shard // layout.group_shards for shard in missing)  # unwritten shards of each group
    with _progress_bar(layout, "write") as bar:

        def finish(shard: int) -> None:
            files, count = layout.shard_files(shard), partial(bar.update, layout.shard_size(shard))
            if uploads is None:
                count()
            else:
                uploads.submit(files, layout.upload_mark(shard), count)

        for shard in sorted(set(range(layout.shard_count)) - set(missing)):
            finish(shard)
        for group in set(range(layout.groups)) - left.keys():
            _release_spool(layout, group)
        for shard in pool.imap(merge, [(layout.split, shard) for shard in missing]):
            finish(shard)
            group = shard // layout.group_shards
            left[group] -= 1
            if left[group] == 0:
                _release_spool(layout, group)
        if uploads is not None:
            uploads.wait()
    return [load_table(layout.shard_table(shard)) for shard in range(layout.shard_count)], missing


def _shard_info(layout: SplitLayout, shard: int, table: Table) -> ShardInfo:
    return ShardInfo(
        file=layout.shard_file(shard).name,
        samples=len(table["offset"]),
        bytes=int(table["bytes"]),
        sha256=str(table["sha256"]),
    )


def _quarantined_samples(rows: SplitSource, blocks: list[Table]) -> tuple[QuarantinedSample, ...]:
    return tuple(
        QuarantinedSample(row, rows.describe(row), reason)
        for table in blocks
        for row, reason in zip(table["defect_row"].tolist(), table["defect_reason"].tolist(), strict=True)
    )


def _check_count(layout: SplitLayout, shards: list[ShardInfo], quarantined: tuple[QuarantinedSample, ...]) -> int:
    """Return the number of written samples. Raise UserError if it is 0 or if samples were lost."""
    samples = sum(shard.samples for shard in shards)
    if samples + len(quarantined) != layout.rows:
        raise UserError(
            f"split {layout.split!r}: {samples:,} samples written and {len(quarantined):,} quarantined do not add up "
            f"to the {layout.rows:,} rows of the source; {spool_damage_hint(layout.spool)}"
        )
    if samples == 0:
        raise UserError(
            f"split {layout.split!r}: none of {layout.rows} images could be decoded ({quarantined[0].reason})"
        )
    return samples


def _index_columns(tables: list[Table]) -> Table:
    """Return the columns of a split's index. Each column is an array [samples]."""
    columns = {name: np.concatenate([table[name] for table in tables]) for name in INDEX_COLUMNS if name != "shard"}
    columns["shard"] = np.repeat(np.arange(len(tables)), [len(table["offset"]) for table in tables])
    return {name: columns[name].astype(dtype) for name, dtype in INDEX_COLUMNS.items()}


def _write_index(layout: SplitLayout, columns: Table) -> FileInfo:
    file = layout.out / f"{layout.split}.index.npz"
    write_table(file, columns)
    content = file.read_bytes()
    return FileInfo(file.name, len(content), hashlib.sha256(content).hexdigest())


def _count_reencoded(blocks: list[Table]) -> dict[str, int]:
    """Return the number of files re-encoded to jpeg for each reason, most frequent reason first."""
    counts: Counter[str] = Counter()
    for table in blocks:
        counts.update(dict(zip(table["reencoded_reason"].tolist(), table["reencoded_count"].tolist(), strict=True)))
    return dict(counts.most_common())


@contextmanager
def _progress_bar(layout: SplitLayout, label: str) -> Iterator[tqdm]:
    bar: tqdm | None = None
    try:
        with defer_signals():  # tqdm prints an error when an object with an interrupted constructor is deleted
            bar = progress_bar(total=layout.rows, desc=f"{layout.split}: {label}", unit=" images", unit_scale=True)
        yield bar
    finally:
        if bar is not None:
            bar.close()  # before the message of an interruption


def _release_spool(layout: SplitLayout, group: int) -> None:
    """Delete the spool files of a group whose shards have all been written."""
    sync_folder(layout.spool)  # the tables of shards must reach the disk before the spool files are deleted
    for block in range(layout.blocks):
        layout.block_group(block, group).unlink(missing_ok=True)
