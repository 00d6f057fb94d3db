"""Convert a source to shards, in parallel and in bounded memory. An interrupted conversion can be resumed.

The train split is shuffled globally, but random reads from a source larger than memory would be slow. The conversion
therefore makes two passes, and both access the disk sequentially. In pass 1 (`shuffle.partition`), workers encode
blocks of source rows in order, sort the samples by destination and write them to spool files. In pass 2
(`shuffle.merge`), each worker collects the samples of one shard and writes its tar. The position of a sample depends
only on seed, split and row, so the result is byte-identical for any number of workers and after any interruption. The
spool files in OUT/.spool are deleted as shards are written, so the peak disk usage is about 1.1 times the size of the
result.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.utils.errors import UserError
from configs.utils.files import atomic_write, sync_folder
from pipelines.cluster.connection import Cluster
from pipelines.cluster.pool import RayPool
from pipelines.convert import checks
from pipelines.convert.encode import Defect, Encoded, encode
from pipelines.convert.layout import SplitLayout
from pipelines.convert.shuffle import SplitInput, SplitInputs, first_rows
from pipelines.convert.source import Encoding, Options, Source, SplitSource
from pipelines.convert.split_writer import WrittenSplit, write_split
from pipelines.convert.worker_pool import Pool, WorkerPool
from pipelines.storage import hash_cache, tar_format
from pipelines.storage.dataset import FORMAT, VERSION, DatasetInfo, load_dataset
from pipelines.storage.index import channel_statistics, rows_per_shard

if TYPE_CHECKING:
    from pipelines.remote.upload import Uploads

BLOCK_BYTES = 512 * 2**20  # maximum size of a block of source rows, which a worker holds in memory
SMALL_SOURCE = 4096  # rows; converting fewer takes less time than starting workers
RULES_VERSION = 2  # version of the encoding rules; must not change within a conversion
PROBED_ROWS = 32  # samples that are encoded before the conversion, to estimate the size of a JPEG


def convert_source(
    source: Source,
    out: Path,
    options: Options,
    workers: int | None,
    name: str,
    cluster: Cluster | None = None,
    uploads: Uploads | None = None,
) -> DatasetInfo:
    """Convert `source` into the folder `out`, showing progress on stderr.

    With `uploads`, the data set is written to their URL. Each file is uploaded and then deleted from `out`.

    After an interruption at any point, another call with the same arguments finishes the conversion. The result is
    byte-identical to that of an uninterrupted conversion.

    Args:
        source: Data set to convert.
        out: New or empty folder, or folder of a finished or unfinished conversion with the same `source`, `options` and
            `name`.
        options: Encoding, shard size and seed.
        workers: Maximum number of processes, or None for one per available core. A small source is converted in this
            process.
        name: Name of the data set and prefix of the shard files.
        cluster: Ray cluster whose nodes do the work; None: this machine.
        uploads: Where to upload the data set, or None to keep it in `out`.

    Returns:
        The content of dataset.json.

    Raises:
        UserError: `out` contains other files or is in use, the disk is too small, the source is invalid or cannot be
            read, no image of a split can be decoded, npy images differ in shape, a sample is defective and
            `options.strict` is set, a worker was killed, or the URL of `uploads` contains other objects or cannot be
            written to.
        OSError: A file in `out` cannot be read or written.
    """
    checks.check_classes(source)
    source_entry = {"kind": source.kind, "name": source.name, "fingerprint": source.fingerprint}
    request: dict[str, object] = {"name": name, "options": _options_entry(options), "source": source_entry}
    if (finished := _load_finished(out, request, uploads)) is not None:
        return finished
    layouts = {split: _plan_layout(source, split, options, name, out) for split in source.splits}
    checks.check_shapes(layouts)
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    checks.check_disk(layouts, out, None if uploads is None else 2 * cores + uploads.most)
    with _lock(out, {**request, "state": source.state, "rules": RULES_VERSION}, uploads) as spool:
        inputs = {split: SplitInput(layouts[split], rows) for split, rows in source.splits.items()}
        with _open_pool(inputs, spool, workers, cluster) as pool:
            written = _write_splits(source, layouts, pool, uploads)
        checks.remove_temporary(out)  # of nodes that died
        dataset = _finish(out, written, _dataset_content(source, options, request, written), uploads)
        shutil.rmtree(spool)
    return dataset


@contextmanager
def _lock(out: Path, request: dict[str, object], uploads: Uploads | None) -> Iterator[Path]:
    """Lock `out` and yield its spool folder, see `checks.lock_output`. Start the uploads if there are any."""
    if uploads is None:
        with checks.lock_output(out, request) as spool:
            yield spool
        return
    uploads.check_place(out)
    request = {**request, "out": uploads.url}
    with checks.lock_output(out, request, "--spool") as spool, uploads:
        uploads.start(request)
        yield spool


def _finish(
    out: Path, written: dict[str, WrittenSplit], content: dict[str, object], uploads: Uploads | None
) -> DatasetInfo:
    """Write _info.json, and dataset.json with `content` last. Return the data set."""
    _write_json(out / "_info.json", _webdataset_info(written))
    sync_folder(out)  # all files are on disk before dataset.json names them
    if uploads is not None:
        return uploads.finish(out, _json(content))
    _write_json(out / "dataset.json", content)
    sync_folder(out)
    dataset = load_dataset(out)
    hash_cache.store_hashes(out, dataset, {name: sha for part in written.values() for name, sha in part.fresh.items()})
    return dataset


def _options_entry(options: Options) -> dict[str, object]:
    """Return the options for dataset.json. An ignored orientation is left out, as in older data sets."""
    entry = asdict(options)
    if options.encoding.orientation == "ignore":
        del entry["encoding"]["orientation"]
    return entry


def _load_finished(out: Path, request: dict[str, object], uploads: Uploads | None) -> DatasetInfo | None:
    """Load the data set in `out` or at the URL of `uploads`, or return None if there is none.

    Raises:
        UserError: It was converted by another `request`.
    """
    place = out if uploads is None else uploads.url
    if uploads is None and not (out / "dataset.json").exists():
        return None
    dataset = load_dataset(out) if uploads is None else uploads.load()
    if dataset is None:
        return None
    if {key: dataset.content.get(key) for key in request} != request:
        raise UserError(
            f"{place} already contains the data set {dataset.name!r}, converted from another source or with other "
            "options; choose another --out or delete the folder"
        )
    print(f"{place} already contains this data set: nothing to do", file=sys.stderr)
    shutil.rmtree(out / ".spool", ignore_errors=True)
    return dataset


def _open_pool(
    inputs: SplitInputs, spool: Path, workers: int | None, cluster: Cluster | None
) -> AbstractContextManager[Pool[SplitInputs]]:
    if cluster is not None:
        return RayPool(cluster, inputs, spool, first_rows, workers)
    if sum(len(split.rows) for split in inputs.values()) < SMALL_SOURCE:
        workers = 1
    return WorkerPool(len(os.sched_getaffinity(0)) if workers is None else workers, inputs)


def _write_splits(
    source: Source, layouts: dict[str, SplitLayout], pool: Pool[SplitInputs], uploads: Uploads | None
) -> dict[str, WrittenSplit]:
    """Write the splits, and return them in the order of the source."""
    # train is the largest split. It comes last, so that the spool files of other splits are already deleted.
    order = sorted(layouts, key=lambda split: split == "train")
    written = {split: write_split(source, layouts[split], pool, uploads) for split in order}
    return {split: written[split] for split in source.splits}


def _dataset_content(
    source: Source, options: Options, request: dict[str, object], written: dict[str, WrittenSplit]
) -> dict[str, object]:
    """Return the content of dataset.json."""
    counted = written["train"] if "train" in written else next(iter(written.values()))
    mean, std = channel_statistics(counted.sums, counted.pixels)
    shapes = set().union(*(part.shapes for part in written.values()))
    content = {
        "format": FORMAT,
        "version": VERSION,
        **request,
        "classes": source.classes,
        "encoding": options.encoding.name,
        "image_shape": [*shapes.pop(), 3] if len(shapes) == 1 else None,
        "mean": list(mean),
        "std": list(std),
        "splits": {split: asdict(part.info) for split, part in written.items()},
        "unordered": source.unordered,
    }
    if options.encoding.name == "jpeg":  # not in the entries of splits, which the data set's fingerprint covers
        content["reencoded"] = {split: part.reencoded for split, part in written.items()}
    return content


def _webdataset_info(written: dict[str, WrittenSplit]) -> dict[str, object]:
    """Return the content of _info.json, for other readers of WebDataset folders, such as timm."""
    splits = {
        split: {
            "name": split,
            "num_samples": part.info.samples,
            "filenames": [shard.file for shard in part.info.shards],
            "shard_lengths": [shard.samples for shard in part.info.shards],
        }
        for split, part in written.items()
    }
    return {"splits": splits}


def _write_json(file: Path, content: dict[str, object]) -> None:
    atomic_write(file, lambda opened: opened.write(_json(content)), sync=False)


def _json(content: dict[str, object]) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def _plan_layout(source: Source, split: str, options: Options, name: str, out: Path) -> SplitLayout:
    rows = source.splits[split]
    encoding = options.encoding
    if len(rows) == 0:
        raise UserError(f"split {split!r} of {source.name} has no rows; remove the split or fill it")
    labelled = rows.labels is not None
    if rows.labels is not None:
        checks.check_labels(rows.labels, len(rows), len(source.classes), split)
    probed = _probe(rows, encoding, source, split)
    shape = None
    if encoding.name == "npy":
        shape = (probed[0].height, probed[0].width, 3)
        payload = len(probed[0].payload)
        size = payload + len(tar_format.npy_header(shape))
    else:
        payload = size = max(1, sum(len(sample.payload) for sample in probed) // len(probed))
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
        shard_rows=rows_per_shard(size, labelled, len(source.classes), options.shard_mib),
        shuffled=split == "train",
        spool=out / ".spool" / split,
        out=out,
    )


def _probe(rows: SplitSource, encoding: Encoding, source: Source, split: str) -> list[Encoded]:
    """Encode a few samples to determine the image shape (npy) or the average size in bytes (jpeg).

    Evenly spaced rows are tried until one sample (npy) or PROBED_ROWS samples (jpeg) have been encoded.

    Raises:
        UserError: The source cannot be read, or none of these rows can be decoded.
    """
    wanted = 1 if encoding.name == "npy" else min(PROBED_ROWS, len(rows))
    found: list[Encoded] = []
    reason = ""
    for start in np.linspace(0, len(rows) - 1, min(len(rows), 4 * PROBED_ROWS)).astype(int).tolist():
        try:
            found += [encode(sample, encoding) for sample in rows.read(start, start + 1)]
        except Defect as defect:
            reason = reason or f"{rows.describe(start)}: {defect}"
            continue
        if len(found) >= wanted:
            break
    if not found and source.kind == "pictures":
        raise UserError(f"no picture could be decoded ({reason}); give image files")
    if not found:
        raise UserError(f"no image of split {split!r} of {source.name} could be decoded ({reason}); check the source")
    return found
