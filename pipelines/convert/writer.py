"""Convert a source to shards: in parallel, resumable and in bounded memory.

The train split is shuffled globally, but a source larger than memory can only be read from front to back. So there are
two passes, both sequential on disk. Pass 1 (`shuffle.partition`): workers encode blocks of source rows in order, sort
them by destination and write them to spool files. Pass 2 (`shuffle.merge`): workers collect the samples of one shard
each and write its tar. The place of a sample depends on seed, split and row only, so neither workers nor kills change a
byte of the result. The spool in OUT/.spool is deleted group by group as shards appear: the peak on disk is about 1.1
times the result.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.utils.errors import UserError
from pipelines.convert import checks
from pipelines.convert.encode import Defect, Encoded, Encoding, encode
from pipelines.convert.layout import SplitLayout
from pipelines.convert.shuffle import SplitInput, merge, partition
from pipelines.convert.source import Options, Source, SplitSource
from pipelines.convert.spool import commit, load_table, spool_damage_hint, sync_folder
from pipelines.convert.worker_pool import WorkerPool, defer_signals
from pipelines.storage import hash_cache, tar_format
from pipelines.storage.dataset import FORMAT, VERSION, load_dataset
from pipelines.storage.index import INDEX_COLUMNS, sample_stride

BLOCK_BYTES = 512 * 2**20  # of source rows that a worker holds in memory as one block
SMALL_SOURCE = 4096  # rows; fewer are written faster than worker processes start
RULES_VERSION = 2  # of the encoding: a conversion is finished by the version that started it
PROBED_ROWS = 32  # encoded first, to estimate the size of a JPEG

Table = dict[str, np.ndarray]


def write_dataset(source: Source, out: Path, options: Options, workers: int, name: str) -> dict[str, Any]:
    """Convert `source` into the folder `out`, with progress on stderr.

    After an interruption at any point, a second call finishes with identical bytes.

    Args:
        source: the data set to convert.
        out: new folder, or one with an unfinished conversion of the same source.
        options: encoding, shard size and seed.
        workers: number of processes.
        name: name of the data set, with which shard files start.

    Returns:
        The content of dataset.json.

    Raises:
        UserError: if `out` contains something else, the disk is too small, a sample is defective (with `strict`) or
            npy images differ in shape.
    """
    checks.check_classes(source)
    request = json.loads(json.dumps({"name": name, "options": asdict(options), "source": _source_entry(source)}))
    if (out / "dataset.json").exists():
        dataset = load_dataset(out)
        if {key: dataset.get(key) for key in request} == request:
            print(f"{out} already holds this data set: nothing to do", file=sys.stderr)
            shutil.rmtree(out / ".spool", ignore_errors=True)
            return dataset
        raise UserError(
            f"{out} already holds the data set {dataset['name']!r}, converted from another source or with other "
            "options; choose another --out or delete the folder"
        )
    layouts = {split: _plan_layout(source, split, options, name, out) for split in source.splits}
    checks.check_shapes(layouts)
    checks.check_disk(layouts, out)
    with checks.lock_output(out, {**request, "state": source.state, "rules": RULES_VERSION}) as spool:
        written: dict[str, WrittenSplit] = {}
        if sum(len(rows) for rows in source.splits.values()) < SMALL_SOURCE:
            workers = 1
        with WorkerPool(
            workers, {split: SplitInput(layouts[split], source.splits[split]) for split in layouts}
        ) as pool:
            # train is the largest: converted last, its spool shares the disk with finished shards only
            for split in sorted(layouts, key=lambda split: split == "train"):
                written[split] = _write_split(source, layouts[split], pool)
        dataset = _describe(source, options, request, written)
        _write_info(out, dataset, spool)
        sync_folder(out)  # all files are on disk before dataset.json names them
        commit(out / "dataset.json", json.dumps(dataset, indent=1).encode() + b"\n", spool)
        sync_folder(out)
        shutil.rmtree(spool)
    hash_cache.store_hashes(out, dataset, {name: sha for part in written.values() for name, sha in part.fresh.items()})
    return json.loads(json.dumps(dataset))


def _describe(
    source: Source, options: Options, request: dict[str, Any], written: dict[str, WrittenSplit]
) -> dict[str, Any]:
    """Return the content of dataset.json."""
    mean, std = _mean_std(written["train"] if "train" in written else next(iter(written.values())))
    shapes = set().union(*(part.shapes for part in written.values()))
    dataset = {
        "format": FORMAT,
        "version": VERSION,
        **request,
        "classes": list(source.classes),
        "encoding": options.encoding.name,
        "image_shape": [*shapes.pop(), 3] if len(shapes) == 1 else None,
        "mean": mean,
        "std": std,
        "splits": {split: written[split].entry for split in source.splits},
        "unordered": list(source.unordered),
    }
    if options.encoding.name == "jpeg":  # not in the entries of splits, which the fingerprint covers
        dataset["reencoded"] = {split: written[split].reencoded for split in source.splits}
    return dataset


def _write_info(out: Path, dataset: dict[str, Any], spool: Path) -> None:
    """Write _info.json, which other readers of WebDataset folders use (timm, for example)."""
    info = {
        split: {
            "name": split,
            "num_samples": entry["samples"],
            "filenames": [shard["file"] for shard in entry["shards"]],
            "shard_lengths": [shard["samples"] for shard in entry["shards"]],
        }
        for split, entry in dataset["splits"].items()
    }
    commit(out / "_info.json", json.dumps({"splits": info}, indent=1).encode() + b"\n", spool)


def _source_entry(source: Source) -> dict[str, str]:
    return {"kind": source.kind, "name": source.name, "fingerprint": source.fingerprint}


def _plan_layout(source: Source, split: str, options: Options, name: str, out: Path) -> SplitLayout:
    rows = source.splits[split]
    encoding = options.encoding
    if len(rows) == 0:
        raise UserError(f"split {split!r} of {source.name} has no rows; remove the split or fill it")
    labelled = rows.labels is not None
    if rows.labels is not None:
        checks.check_labels(rows.labels, len(rows), len(source.classes), split)
    probed = _probe(rows, encoding, source.name, split)
    shape = None
    if encoding.name == "npy":
        shape = (probed[0].height, probed[0].width, 3)
        payload = len(probed[0].payload)
        size = payload + len(tar_format.npy_header(shape))
    else:
        payload = size = max(1, sum(len(sample.payload) for sample in probed) // len(probed))
    stride = sample_stride(size, labelled, len(source.classes))
    held = max(rows.bytes_per_row, payload) + 256
    return SplitLayout(
        dataset=name,
        split=split,
        classes=len(source.classes),
        options=options,
        image_shape=shape,
        payload_bytes=payload,
        rows=len(rows),
        block_rows=max(1, min(BLOCK_BYTES // held, max(256, -(-len(rows) // 16)))),
        shard_rows=max(1, options.shard_mib * 2**20 // stride),
        shuffled=split == "train",
        spool=out / ".spool" / split,
        out=out,
    )


def _probe(rows: SplitSource, encoding: Encoding, source: str, split: str) -> list[Encoded]:
    """Encode a few evenly spaced samples, to learn their shape and size."""
    wanted = 1 if encoding.name == "npy" else min(PROBED_ROWS, len(rows))
    found: list[Encoded] = []
    for start in np.linspace(0, len(rows) - 1, min(len(rows), 4 * PROBED_ROWS)).astype(int).tolist():
        try:
            found += [encode(sample, encoding) for sample in rows.read(start, start + 1)]
        except Defect:
            continue
        if len(found) >= wanted:
            break
    if not found:
        raise UserError(f"no image of split {split!r} of {source} could be decoded; check that it is what it should be")
    return found


@dataclass(frozen=True)
class WrittenSplit:
    """A finished split: its entry of dataset.json and its statistics."""

    entry: dict[str, Any]
    sums: np.ndarray  # int64 [2, 3], see Encoded
    pixels: int
    shapes: set[tuple[int, int]]
    fresh: dict[str, str]  # sha256 of the shards written by this process, by file name
    reencoded: dict[str, int]  # files whose bytes were not kept as jpeg, by reason, most frequent first


def _write_split(source: Source, layout: SplitLayout, pool: WorkerPool) -> WrittenSplit:
    """Run both passes over one split and write its index."""
    layout.spool.mkdir(exist_ok=True)
    blocks = _encode_blocks(layout, pool)
    shards, fresh = _merge_shards(layout, pool)
    rows = source.splits[layout.split]
    quarantined = [
        {"row": int(row), "name": rows.describe(int(row)), "reason": str(reason)}
        for table in blocks
        for row, reason in zip(table["defect_row"], table["defect_reason"], strict=True)
    ]
    samples = sum(len(table["offset"]) for table in shards)
    if samples == 0:
        raise UserError(
            f"split {layout.split!r}: none of {layout.rows} images could be decoded ({quarantined[0]['reason']})"
        )
    if samples + len(quarantined) != layout.rows:
        raise UserError(
            f"split {layout.split!r}: {samples:,} samples written and {len(quarantined):,} quarantined are not the "
            f"{layout.rows:,} rows of the source; {spool_damage_hint(layout.spool)}"
        )
    columns = _index_columns(shards)
    entry = {
        "samples": samples,
        "labelled": rows.labels is not None,
        "source_rows": layout.rows,
        "shuffled": layout.shuffled,
        "quarantined": quarantined,
        "index": _write_index(layout, columns),
        "shards": [
            {
                "file": layout.shard_file(shard).name,
                "samples": len(table["offset"]),
                "bytes": int(table["bytes"]),
                "sha256": str(table["sha256"]),
            }
            for shard, table in enumerate(shards)
        ],
    }
    heights, widths = columns["height"].astype(np.int64), columns["width"].astype(np.int64)
    shapes = {(int(h), int(w)) for h, w in np.unique(np.stack([heights, widths], axis=1), axis=0)}
    return WrittenSplit(
        entry=entry,
        sums=sum((table["sums"] for table in blocks), np.zeros((2, 3), np.int64)),
        pixels=int(heights @ widths),
        shapes=shapes,
        fresh={layout.shard_file(shard).name: str(shards[shard]["sha256"]) for shard in fresh},
        reencoded=_count_reencoded(blocks),
    )


def _encode_blocks(layout: SplitLayout, pool: WorkerPool) -> list[Table]:
    """Run pass 1 for the blocks without a table; return the tables of all blocks."""
    missing = [block for block in range(layout.blocks) if not layout.block_table(block).exists()]
    with _progress_bar(layout, "read") as bar:
        bar.update(layout.rows - sum(layout.block_size(block) for block in missing))
        for block in pool.imap(partition, [(layout.split, block) for block in missing]):
            bar.update(layout.block_size(block))
    return [load_table(layout.block_table(block)) for block in range(layout.blocks)]


def _merge_shards(layout: SplitLayout, pool: WorkerPool) -> tuple[list[Table], list[int]]:
    """Run pass 2 for the unfinished shards; return the tables of all shards, and the numbers of the new ones."""
    with _progress_bar(layout, "write") as bar:
        left = [layout.group_shard_numbers(group) for group in range(layout.groups)]
        missing = []
        for shard in range(layout.shard_count):
            files = (layout.shard_table(shard), layout.shard_file(shard), layout.shard_file(shard).with_suffix(".idx"))
            if all(file.exists() for file in files):
                bar.update(layout.shard_size(shard))
                _release_spool(layout, left, shard)
            else:
                missing.append(shard)
        for shard in pool.imap(merge, [(layout.split, shard) for shard in missing]):
            bar.update(layout.shard_size(shard))
            _release_spool(layout, left, shard)
    return [load_table(layout.shard_table(shard)) for shard in range(layout.shard_count)], missing


def _index_columns(shards: list[Table]) -> Table:
    """Return the columns of a split's index, each [samples]."""
    columns = {name: np.concatenate([table[name] for table in shards]) for name in INDEX_COLUMNS if name != "shard"}
    columns["shard"] = np.repeat(np.arange(len(shards)), [len(table["offset"]) for table in shards])
    return columns


def _write_index(layout: SplitLayout, columns: Table) -> dict[str, Any]:
    """Write SPLIT.index.npz and return its entry of dataset.json."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: columns[name].astype(dtype) for name, dtype in INDEX_COLUMNS.items()}
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    file = layout.out / f"{layout.split}.index.npz"
    commit(file, content, layout.spool)
    return {"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _count_reencoded(blocks: list[Table]) -> dict[str, int]:
    """Return the number of files whose bytes were not kept as jpeg, by reason, most frequent first."""
    counts: Counter[str] = Counter()
    for table in blocks:
        counts.update(dict(zip(table["reencoded_reason"].tolist(), table["reencoded_count"].tolist(), strict=True)))
    return dict(counts.most_common())


def _progress_bar(layout: SplitLayout, label: str) -> tqdm:
    with defer_signals():  # an interrupted constructor prints an error when it is deleted
        return tqdm(
            total=layout.rows, desc=f"{layout.split}: {label}", unit=" images", unit_scale=True, mininterval=0.5
        )


def _release_spool(layout: SplitLayout, left: list[set[int]], shard: int) -> None:
    """Count a shard as written, and delete the spool of its group after the last one."""
    group = shard // layout.group_shards
    left[group].discard(shard)
    if not left[group]:
        sync_folder(layout.spool)  # tables are on disk before the pieces are deleted
        for block in range(layout.blocks):
            layout.block_group(block, group).unlink(missing_ok=True)


def _mean_std(written: WrittenSplit) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel over all pixels of a split, in units of 0..1."""
    mean = written.sums[0] / written.pixels
    variance = np.maximum(written.sums[1] / written.pixels - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 1.0)  # a constant channel must not divide by zero
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]
