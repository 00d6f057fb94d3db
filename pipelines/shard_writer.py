"""Writing side of the format: a source of samples becomes shards, in parallel, resumable, in bounded memory.

Two passes, both sequential on disk, because train is shuffled globally while a source larger than memory may only be
read from front to back. Pass 1 (scatter): workers take blocks of source rows in order, encode them, sort them by
destination and write them to spool files. Pass 2 (gather): workers collect the pieces of one shard each and write its
tar. Where a sample goes depends on seed, split and row alone, so neither workers nor kills change a byte of the result.
The spool lies in OUT/.spool and is deleted group by group while shards appear: the peak is about 1.1 times the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from configs.errors import UserError
from pipelines import shards, tar_layout
from pipelines.encode import Defect, Encoded, Encoding, encode
from pipelines.order import permutation
from pipelines.workers import Pool

BLOCK_BYTES = 512 * 2**20  # what a worker holds in memory of one block of source rows
GROUPS = 16  # the spool of a split is deleted in so many parts
SMALL_SOURCE = 4096  # rows that are written faster than worker processes start
PROBED_ROWS = 32  # encoded ahead, to learn the size of a JPEG


@lru_cache(maxsize=1)
def _positions(rows: int, seed: int, shuffled: bool) -> np.ndarray:
    """int64 [rows]: where each source row goes in the stored order."""
    if not shuffled:
        return np.arange(rows)
    positions = np.empty(rows, np.int64)
    positions[permutation(rows, seed, epoch=0)] = np.arange(rows)
    return positions


class SplitSource(Protocol):
    """One split of a source; picklable, since worker processes read it."""

    labels: np.ndarray | None  # int64 [rows]; None for a split without labels
    bytes_per_row: int  # average bytes read per row

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        """Rows start..stop in source order: uint8 [H, W, 3], or the bytes of an image file (b'' when empty)."""
        ...

    def describe(self, row: int) -> str:
        """Names a row for people: 'images-train[17]', 'train/cat/001.jpg'."""
        ...


@dataclass(frozen=True)
class Source:
    """What is converted."""

    kind: str
    name: str
    classes: tuple[str, ...]
    fingerprint: str  # sha256 of the content, as far as it can be had cheaply
    splits: dict[str, SplitSource]


@dataclass(frozen=True)
class Options:
    """What the user chose; two conversions of one source with equal options are byte-identical."""

    encoding: Encoding
    shard_mib: int = 512
    seed: int = 0
    strict: bool = False  # a sample that would be quarantined is an error instead


@dataclass(frozen=True)
class Plan:
    """How one split is laid out: everything that both passes need, known before the first sample is encoded."""

    dataset: str
    split: str
    classes: int
    options: Options
    image_shape: tuple[int, int, int] | None
    payload_bytes: int  # of one sample; an estimate for JPEG
    rows: int
    block_rows: int
    shard_rows: int
    shuffled: bool
    spool: Path
    out: Path

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def group_shards(self) -> int:
        return -(-self.shard_count // GROUPS)

    @property
    def groups(self) -> int:
        return -(-self.shard_count // self.group_shards)

    def block_table(self, block: int) -> Path:
        return self.spool / f"block-{block:06d}.npz"

    def block_group(self, block: int, group: int) -> Path:
        return self.spool / f"block-{block:06d}.group-{group:02d}.bin"

    def shard_table(self, shard: int) -> Path:
        return self.spool / f"shard-{shard:06d}.npz"

    def shard_file(self, shard: int) -> Path:
        return self.out / f"{self.dataset}-{self.split}-{shard:06d}.tar"


def write_dataset(source: Source, out: Path, options: Options, workers: int, name: str) -> dict[str, Any]:
    """Convert `source` into `out`; returns the content of dataset.json. Progress goes to stderr.

    Raises UserError for a folder that holds something else, too little disk, a defective sample with `strict`, and
    images of several shapes in npy. Interrupted at any instant, a second call finishes with identical bytes.
    """
    request = json.loads(json.dumps({"name": name, "options": asdict(options), "source": _source_entry(source)}))
    if (out / "dataset.json").exists():
        dataset = shards.load_dataset(out)
        if {key: dataset.get(key) for key in request} == request:
            print(f"{out} already holds this data set: nothing to do", file=sys.stderr)
            shutil.rmtree(out / ".spool", ignore_errors=True)
            return dataset
        raise UserError(f"{out} already holds the data set {dataset['name']!r}, converted from another source or with "
                        "other options; choose another --out or delete the folder")  # fmt: skip
    plans = {split: _plan(source, split, options, name, out) for split in source.splits}
    _check_shapes(plans)
    _check_disk(plans, out)
    with _claim(out, request) as spool:
        written: dict[str, _Written] = {}
        if sum(len(rows) for rows in source.splits.values()) < SMALL_SOURCE:
            workers = 1
        with Pool(workers, {split: _Worker(plans[split], source.splits[split]) for split in plans}) as pool:
            # train is last: it is the largest, and its spool then shares the disk with finished shards only
            for split in sorted(plans, key=lambda split: split == "train"):
                written[split] = _write_split(source, plans[split], pool)
        mean, std = _mean_std(written["train"] if "train" in written else next(iter(written.values())))
        shapes = set().union(*(part.shapes for part in written.values()))
        dataset = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            **request,
            "classes": list(source.classes),
            "encoding": options.encoding.name,
            "image_shape": [*shapes.pop(), 3] if len(shapes) == 1 else None,
            "mean": mean,
            "std": std,
            "splits": {split: written[split].entry for split in source.splits},
        }
        info = {
            split: {
                "name": split,
                "num_samples": entry["samples"],
                "filenames": [shard["file"] for shard in entry["shards"]],
                "shard_lengths": [shard["samples"] for shard in entry["shards"]],
            }
            for split, entry in dataset["splits"].items()
        }
        _commit(out / "_info.json", json.dumps({"splits": info}, indent=1).encode() + b"\n", spool)
        _commit(out / "dataset.json", json.dumps(dataset, indent=1).encode() + b"\n", spool)
        shutil.rmtree(spool)
    return json.loads(json.dumps(dataset))


def _source_entry(source: Source) -> dict[str, str]:
    return {"kind": source.kind, "name": source.name, "fingerprint": source.fingerprint}


@contextmanager
def _claim(out: Path, request: dict[str, Any]) -> Iterator[Path]:
    """The spool folder of this very conversion, locked; refuses an `out` that holds anything else."""
    spool = out / ".spool"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(file != spool for file in out.iterdir()) and not (spool / "request.json").exists():
        raise UserError(f"--out {out} is not empty and holds no conversion; choose another folder or empty it")
    try:
        spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    with (spool / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is converting into {out}; wait for it or stop it") from None
        if (out / "dataset.json").exists():
            raise UserError(
                f"another process has just finished converting into {out}; run the command again to compare"
            )
        record = spool / "request.json"
        if record.exists() and json.loads(record.read_text()) != request:
            raise UserError(f"{out} holds an unfinished conversion of another source or with other options; "
                            "choose another --out or delete the folder")  # fmt: skip
        _commit(record, json.dumps(request).encode(), spool)
        yield spool


def _plan(source: Source, split: str, options: Options, name: str, out: Path) -> Plan:
    rows = source.splits[split]
    encoding = options.encoding
    if len(rows) == 0:
        raise UserError(f"split {split!r} of {source.name} has no rows; remove the split or fill it")
    labelled = rows.labels is not None
    if rows.labels is not None:
        _check_labels(rows.labels, len(rows), len(source.classes), split)
    probed = _probe(rows, encoding, source.name, split)
    shape = None
    if encoding.name == "npy":
        shape = (probed[0].height, probed[0].width, 3)
        payload = len(probed[0].payload)
        size = payload + len(tar_layout.npy_header(shape))
    else:
        payload = size = max(1, sum(len(sample.payload) for sample in probed) // len(probed))
    stride = shards.sample_stride(size, labelled, len(source.classes))
    held = max(rows.bytes_per_row, payload) + 256
    return Plan(
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


def _check_labels(labels: np.ndarray, rows: int, classes: int, split: str) -> None:
    if len(labels) != rows:
        raise UserError(f"split {split!r} has {len(labels)} labels for {rows} images; give one to each")
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"split {split!r} has labels from {labels.min()} to {labels.max()}, but there are {classes} classes; "
            f"use labels of 0..{classes - 1}"
        )


def _check_shapes(plans: dict[str, Plan]) -> None:
    """npy stores one shape in all splits; the samples of each are compared when they are encoded."""
    shapes = {split: f"{split!r} of {plan.image_shape[0]} x {plan.image_shape[1]}" for split, plan in plans.items()
              if plan.image_shape}  # fmt: skip
    if len({plan.image_shape for plan in plans.values()}) > 1:
        raise UserError(f"npy stores one shape, but the splits are {', '.join(shapes.values())} pixels; "
                        "give --size N or --encoding jpeg")  # fmt: skip


def _probe(rows: SplitSource, encoding: Encoding, source: str, split: str) -> list[Encoded]:
    """A few evenly spaced samples, encoded: what shape and size to expect."""
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


def _check_disk(plans: dict[str, Plan], out: Path) -> None:
    """Refuse before the first byte when the result and its spool cannot fit."""
    need = 64 * 2**20
    for plan in plans.values():
        need += plan.rows * (plan.payload_bytes + 4 * tar_layout.BLOCK)
    spool = max(plan.rows * plan.payload_bytes // plan.groups for plan in plans.values())
    present = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if need + spool - present > free:
        raise UserError(
            f"{out} has {free / 2**30:.1f} GiB free, the conversion needs about "
            f"{(need + spool - present) / 2**30:.1f} GiB; free some space or choose another --out"
        )


@dataclass(frozen=True)
class _Written:
    """What a finished split adds to dataset.json."""

    entry: dict[str, Any]
    sums: np.ndarray  # int64 [2, 3], see Encoded
    pixels: int
    shapes: set[tuple[int, int]]


def _write_split(source: Source, plan: Plan, pool: Pool) -> _Written:
    """Both passes over one split."""
    plan.spool.mkdir(exist_ok=True)
    rows = source.splits[plan.split]
    labels = rows.labels
    blocks = [block for block in range(plan.blocks) if not plan.block_table(block).exists()]
    with _bar(plan, "read") as bar:
        bar.update(plan.rows - sum(_block_rows(plan, block) for block in blocks))
        for block in pool.imap(_scatter, [(plan.split, block) for block in blocks]):
            bar.update(_block_rows(plan, block))
    tables = [_load(plan.block_table(block)) for block in range(plan.blocks)]
    with _bar(plan, "write") as bar:
        left = [_shards_of_group(plan, group) for group in range(plan.groups)]
        missing = []
        for shard in range(plan.shard_count):
            if plan.shard_table(shard).exists() and plan.shard_file(shard).exists():
                bar.update(_shard_rows(plan, shard))
                _forget(plan, left, shard)
            else:
                missing.append(shard)
        for shard in pool.imap(_gather, [(plan.split, shard) for shard in missing]):
            bar.update(_shard_rows(plan, shard))
            _forget(plan, left, shard)
    written = [_load(plan.shard_table(shard)) for shard in range(plan.shard_count)]
    quarantined = [
        {"row": int(row), "name": rows.describe(int(row)), "reason": str(reason)}
        for table in tables
        for row, reason in zip(table["defect_row"], table["defect_reason"], strict=True)
    ]
    samples = sum(len(table["offset"]) for table in written)
    if samples == 0:
        raise UserError(
            f"split {plan.split!r}: none of {plan.rows} images could be decoded ({quarantined[0]['reason']})"
        )
    columns = {
        name: np.concatenate([table[name] for table in written]) for name in shards.INDEX_COLUMNS if name != "shard"
    }
    columns["shard"] = np.repeat(np.arange(plan.shard_count), [len(table["offset"]) for table in written])
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: columns[name].astype(dtype) for name, dtype in shards.INDEX_COLUMNS.items()}
    np.savez(buffer, **arrays)
    index_file = plan.out / f"{plan.split}.index.npz"
    _commit(index_file, buffer.getvalue(), plan.spool)
    entry = {
        "samples": samples,
        "labelled": labels is not None,
        "source_rows": plan.rows,
        "quarantined": quarantined,
        "index": {
            "file": index_file.name,
            "bytes": len(buffer.getvalue()),
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        },
        "shards": [
            {
                "file": plan.shard_file(shard).name,
                "samples": len(table["offset"]),
                "bytes": int(table["bytes"]),
                "sha256": str(table["sha256"]),
            }
            for shard, table in enumerate(written)
        ],
    }
    heights, widths = columns["height"].astype(np.int64), columns["width"].astype(np.int64)
    sums = sum((table["sums"] for table in tables), np.zeros((2, 3), np.int64))
    sides = np.unique(np.stack([heights, widths], axis=1), axis=0)
    return _Written(entry, sums, int(heights @ widths), {(int(h), int(w)) for h, w in sides})


def _bar(plan: Plan, label: str) -> tqdm:
    return tqdm(total=plan.rows, desc=f"{plan.split}: {label}", unit=" images", unit_scale=True, mininterval=0.5)


def _block_rows(plan: Plan, block: int) -> int:
    return min(plan.block_rows, plan.rows - block * plan.block_rows)


def _shard_rows(plan: Plan, shard: int) -> int:
    return min(plan.shard_rows, plan.rows - shard * plan.shard_rows)


def _shards_of_group(plan: Plan, group: int) -> set[int]:
    start = group * plan.group_shards
    return set(range(start, min(start + plan.group_shards, plan.shard_count)))


def _forget(plan: Plan, left: list[set[int]], shard: int) -> None:
    """Count a shard as written; the spool of its group goes when it was the group's last."""
    group = shard // plan.group_shards
    left[group].discard(shard)
    if not left[group]:
        for block in range(plan.blocks):
            plan.block_group(block, group).unlink(missing_ok=True)


def _mean_std(written: _Written) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation over all pixels of a split, in units of 0..1."""
    mean = written.sums[0] / written.pixels
    variance = np.maximum(written.sums[1] / written.pixels - mean**2, 0)
    std = np.maximum(np.sqrt(variance), 1.0)  # a constant channel must not divide by zero
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]


@dataclass(frozen=True)
class _Worker:
    """What each worker process holds of one split."""

    plan: Plan
    rows: SplitSource


def _scatter(workers: dict[str, _Worker], task: tuple[str, int]) -> int:
    """Pass 1 for one block: encode its rows, write them to the spool sorted by destination, then the block's table."""
    plan, rows, block = workers[task[0]].plan, workers[task[0]].rows, task[1]
    start = block * plan.block_rows
    stop = start + _block_rows(plan, block)
    positions = _positions(plan.rows, plan.options.seed, plan.shuffled)[start:stop]
    payloads: list[Encoded | None] = []
    defects: list[tuple[int, str]] = []
    sums = np.zeros((2, 3), np.int64)
    for row, sample in enumerate(rows.read(start, stop), start):
        try:
            encoded = encode(sample, plan.options.encoding)
        except Defect as defect:
            if plan.options.strict:
                raise UserError(f"{rows.describe(row)}: {defect}; mend or remove it, or leave out --strict") from None
            defects.append((row, str(defect)))
            payloads.append(None)
            continue
        _check_shape(plan, rows, row, encoded)
        sums += encoded.sums
        payloads.append(encoded)
    if len(payloads) != stop - start:
        raise UserError(f"{rows.describe(start)}: the source gave {len(payloads)} rows where {stop - start} were due")
    order = [int(i) for i in np.argsort(positions) if payloads[i] is not None]
    kept = [payload for i in order if (payload := payloads[i]) is not None]
    group_of = positions[order] // plan.shard_rows // plan.group_shards
    for group in range(plan.groups):
        chosen = np.flatnonzero(group_of == group)
        _commit_pieces(plan.block_group(block, group), [kept[i].payload for i in chosen], plan.spool)
    table = {
        "row": np.array([start + i for i in order], np.int64),
        "position": positions[order].astype(np.int64),
        "size": np.array([len(sample.payload) for sample in kept], np.int64),
        "height": np.array([sample.height for sample in kept], np.int32),
        "width": np.array([sample.width for sample in kept], np.int32),
        "sums": sums,
        "defect_row": np.array([row for row, _ in defects], np.int64),
        "defect_reason": np.array([reason for _, reason in defects], dtype=str),
    }
    _commit_npz(plan.block_table(block), table)
    return block


def _check_shape(plan: Plan, rows: SplitSource, row: int, encoded: Encoded) -> None:
    if plan.image_shape is not None and (encoded.height, encoded.width) != plan.image_shape[:2]:
        raise UserError(
            f"{rows.describe(row)} has {encoded.height} x {encoded.width} pixels and others "
            f"{plan.image_shape[0]} x {plan.image_shape[1]}, but npy stores one shape; "
            f"delete {plan.out}, then give --size N or --encoding jpeg"
        )


def _gather(workers: dict[str, _Worker], task: tuple[str, int]) -> int:
    """Pass 2 for one shard: collect its samples from every block, write tar and index, then the shard's table."""
    plan, labels, shard = workers[task[0]].plan, workers[task[0]].rows.labels, task[1]
    samples = sorted(_collect(plan, shard), key=lambda sample: sample[0])
    extension = shards.EXTENSIONS[plan.options.encoding.name]
    head = tar_layout.npy_header(plan.image_shape) if plan.image_shape else b""
    writers: dict[int, tar_layout.MemberWriter] = {}
    label_size = None if labels is None else len(tar_layout.label_text(0, plan.classes))
    label_writer = tar_layout.MemberWriter("cls", label_size or 0)
    digest, offset, lines = hashlib.sha256(), 0, []
    columns: dict[str, list[int]] = {name: [] for name in ("offset", "size", "label", "height", "width")}
    temporary = plan.spool / f"shard-{shard:06d}.{os.getpid()}.tar"
    with temporary.open("wb", buffering=2**20) as file:

        def put(pieces: list[bytes | memoryview]) -> None:
            nonlocal offset
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                offset += len(piece)

        for _, row, payload, height, width in samples:
            key, size = tar_layout.key_of(row), len(head) + len(payload)
            label = -1 if labels is None else int(labels[row])
            values = (offset + tar_layout.BLOCK, size, label, height, width)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            lines.append(tar_layout.index_line(key, extension, offset + tar_layout.BLOCK, size, label_size))
            if size not in writers:
                writers[size] = tar_layout.MemberWriter(extension, size)
            put(writers[size].member(key, head, payload))
            if labels is not None:
                put(label_writer.member(key, tar_layout.label_text(label, plan.classes)))
        put([tar_layout.END_OF_ARCHIVE])
        file.flush()
        os.fsync(file.fileno())
    index = f"{tar_layout.INDEX_VERSION} {len(samples)}\n" + "".join(lines)
    _commit(plan.shard_file(shard).with_suffix(".idx"), index.encode(), plan.spool)
    temporary.rename(plan.shard_file(shard))
    arrays = {name: np.array(values, shards.INDEX_COLUMNS[name]) for name, values in columns.items()}
    _commit_npz(plan.shard_table(shard), {**arrays, "bytes": np.int64(offset), "sha256": np.array(digest.hexdigest())})
    return shard


def _collect(plan: Plan, shard: int) -> Iterator[tuple[int, int, memoryview, int, int]]:
    """(position, row, payload, height, width) of the shard's samples, block by block: one contiguous read a block."""
    group = shard // plan.group_shards
    for block in range(plan.blocks):
        table = _load(plan.block_table(block))
        shard_of = table["position"] // plan.shard_rows
        in_group = shard_of // plan.group_shards == group
        chosen = np.flatnonzero(shard_of == shard)
        if not len(chosen):
            continue
        begin = int(table["size"][in_group & (shard_of < shard)].sum())
        with plan.block_group(block, group).open("rb") as file:
            file.seek(begin)
            content = memoryview(file.read(int(table["size"][chosen].sum())))
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


def _load(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _commit_npz(file: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _commit(file, buffer.getvalue(), file.parent)


def _commit(file: Path, content: bytes, spool: Path) -> None:
    _commit_pieces(file, [content], spool)


def _commit_pieces(file: Path, pieces: list[bytes], spool: Path) -> None:
    """Write to a temporary name, flush to disk, rename: the file is there whole or not at all.

    What a kill leaves of the temporary file lies in the spool, which the run that finishes deletes.
    """
    temporary = spool / f"{file.name}.{os.getpid()}.tmp"
    with temporary.open("wb", buffering=2**20) as opened:
        for piece in pieces:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.rename(file)
