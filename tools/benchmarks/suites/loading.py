"""Tables of data loaders, with or without augmentation, compared to other libraries and to bounds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from configs.schema import AugConfig, DataConfig, EvalConfig
from pipelines.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.measured_tables import Case, InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Entry, Row, add_bound, add_ratios, skipped_row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerSpec, PeerTask
from tools.benchmarks.suites.settings import Settings

PAD_CROP = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED_CROP = AugConfig(crop="random-resized", scale=(0.25, 1.0), flip=0.5)
IMAGENET_CROP = AugConfig(crop="random-resized", flip=0.5)  # at least 8 % of the area, torchvision's default
BOUND = "bound: "
ONE_COPY = f"{BOUND}one copy of the bytes"
PINNED_COPY = f"{BOUND}{roofline.PINNED}"
# settings of data by variant of our loader of JPEG, one row each
JPEG_VARIANTS: dict[str, dict[str, object]] = {
    f"{decode} decoding": {"jpeg_decode": decode} for decode in ("exact", "fast")
}
AUGMENTED = {"cpu": "the cores' work on every image", "cuda": "the work of the graph on every image"}


def loading_table(
    settings: Settings,
    folder: Path,
    aug: AugConfig | None,
    *,
    size: int,
    batch_size: int,
    with_peers: bool = False,
    data: DataConfig | None = None,
    placements: tuple[str, ...] = ("host", "device"),
    evaluation: EvalConfig | None = None,
) -> InterleavedTable:
    """Return a table of our loader, the copies that bound its rate and, with `with_peers`, the peers.

    Args:
        settings: Settings of the benchmark.
        folder: Converted data set.
        aug: Augmentation, or None to measure reading alone.
        size: Image size after augmentation, in pixels. Ignored if `aug` is None.
        batch_size: Batch size of all candidates.
        with_peers: Whether to measure the peers.
        data: Config section `data` for our loader. The other arguments take precedence.
        placements: Placements of raw pixels to measure on a GPU. If "host" is one of them, copying a batch from pinned
            memory is measured as well.
        evaluation: Measure our evaluation loader, and the same resizing and center crop by peers, instead of `aug`.
    """
    split, device = open_split(folder, SPLIT), settings.device
    is_raw, (height, width) = split.encoding == "npy", split.image_size(0)
    side = height if aug is None and evaluation is None else size
    config = (data or DataConfig(path=str(folder))).model_copy(
        update={"path": str(folder), "batch_size": batch_size, "image_size": side}
    )
    common: Row = {"device": device, "batch_size": batch_size}
    loader: Row = {**common, "encoding": split.encoding}
    cases = [
        Case(
            _our_candidate(variant, changed, aug, evaluation, device), {**loader, "ours": True, "placement": placement}
        )
        for variant, placement, changed in _our_variants(config, device, is_raw, placements)
    ]
    if with_peers:
        task = PeerTask(folder, settings.scratch, batch_size, side, aug, device, evaluation)
        for name, peer in peers.available(peers.LOADERS, split.encoding).items():
            arguments = (peer, task, settings.workers, settings.seconds / 4)
            cases.append(Case(Candidate(name, peers.loading, arguments), loader))
    if is_raw and device != "cuda":
        cases.append(Case(Candidate(ONE_COPY, roofline.one_copy, (batch_size * side * side * 3, batch_size)), common))
    elif is_raw and "host" in placements:
        copied_bytes = batch_size * int(split.size[0])
        cases.append(Case(Candidate(PINNED_COPY, roofline.pinned_copy, (copied_bytes, batch_size)), common))
    sides = (
        f"{width}x{height}"
        if side == height == width
        else f"{width if width == height else f'{width}x{height}'} to {side}"
    )
    work = "resize and center crop" if evaluation else "reading alone" if aug is None else describe(aug)
    title = f"{sides} {'raw' if is_raw else 'JPEG'}, {work}"
    otherwise = "latency of scattered samples" if work == "reading alone" and is_raw else AUGMENTED[device]
    bounds = partial(_add_bounds, split.size, side * side * 3, otherwise)
    details: Entry = {"image_size": side, "encoding": split.encoding}
    absent = absent_rows(peers.LOADERS, split.encoding) if with_peers else []
    stage = "reading" if work == "reading alone" else "loading"
    return InterleavedTable(title, stage, cases, details, bounds, absent)


def absent_rows(table: dict[str, PeerSpec], encoding: str) -> list[Row]:
    """Return a row with the reason for each peer of a table whose library is not installed."""
    return [skipped_row(name, reason, ours=False) for name, reason in peers.missing(table, encoding).items()]


def _our_variants(
    data: DataConfig, device: str, is_raw: bool, placements: tuple[str, ...]
) -> Iterator[tuple[str, str, DataConfig]]:
    """Yield (variant for the row's name, placement, config section `data`) for each row of our loader."""
    if is_raw and device == "cuda":
        for placement in placements:
            yield placement, placement, data.model_copy(update={"placement": placement})
    elif is_raw or device == "cuda":
        yield "", "", data
    else:
        for variant, changes in JPEG_VARIANTS.items():
            yield variant, "", data.model_copy(update=changes)


def _our_candidate(
    variant: str, data: DataConfig, aug: AugConfig | None, evaluation: EvalConfig | None, device: str
) -> Candidate:
    name = f"{OURS}, {variant}" if variant else OURS
    if evaluation is not None:
        return Candidate(name, ours.evaluating, (data, evaluation, device))
    return Candidate(name, ours.loading, (data, aug or ours.PLAIN, device))


def _add_bounds(stored: np.ndarray, output_bytes: int, otherwise: str, rows: list[Row], limits: Limits) -> None:
    """Add bounds in images/s to the rows of loaders, and `ratio` (our rate divided by theirs) to the rows of peers.

    Args:
        stored: Bytes of each stored image, int [samples].
        output_bytes: Bytes of one image in a batch.
        otherwise: Limiting factor of a loader that is far below its bound.
        rows: Rows to modify.
        limits: Machine limits.
    """
    copy, pinned = (
        max((row.get("images_per_s", 0.0) for row in rows if row["name"].startswith(name)), default=0.0)
        for name in (ONE_COPY, PINNED_COPY)
    )
    loaders = [row for row in rows if "encoding" in row]
    stored_bytes = float(stored.mean())
    for row in loaders:
        bounds = roofline.loading_bounds(
            limits,
            placement=row.get("placement", ""),
            device=row["device"],
            stored_bytes=stored_bytes,
            output_bytes=output_bytes,
        )
        if copy:  # measured alternately with the loaders and at the same batch size
            bounds = {ONE_COPY.removeprefix(BOUND): copy}
        elif pinned and roofline.PINNED in bounds:
            bounds[roofline.PINNED] = pinned
        bounds |= roofline.disk_bound(limits, stored_bytes, float(stored.sum()))
        add_bound(row, bounds, otherwise)
    add_ratios(loaders)


def describe(aug: AugConfig) -> str:
    """Return the names of the enabled augmentations, separated by commas, or "no augmentation"."""
    jitter = aug.color_jitter
    names = {
        "pad and crop": aug.crop == "pad",
        "random-resized crop": aug.crop == "random-resized",
        "flip": aug.flip > 0,
        aug.auto.policy: aug.auto.policy != "none",
        "colour jitter": any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)),
        "greyscale": aug.grayscale > 0,
        "blur": aug.blur.probability > 0,
        "erasing": aug.erase.probability > 0,
        "cutout": aug.cutout > 0,
    }
    return ", ".join(name for name, is_on in names.items() if is_on) or "no augmentation"


def crop_and_flip(aug: AugConfig) -> AugConfig:
    """Return an augmentation with only the crop and flip of `aug`, so that all peers do the same work."""
    return AugConfig(crop=aug.crop, padding=aug.padding, scale=aug.scale, ratio=aug.ratio, flip=aug.flip)
