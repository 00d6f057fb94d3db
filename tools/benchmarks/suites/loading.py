"""Tables of data loaders, with or without augmentation, compared to other libraries and to bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import AugConfig, DataConfig
from pipelines.storage.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.measured_tables import InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row, add_bound, add_ratios
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask

PAD_CROP = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED_CROP = AugConfig(crop="random-resized", scale=(0.25, 1.0), flip=0.5)
BOUND = "bound: "
ONE_COPY = f"{BOUND}one copy of the bytes"
PINNED_COPY = f"{BOUND}{roofline.PINNED}"
AUGMENTED = {"cpu": "the cores' work on every image", "cuda": "the work of the graph on every image"}


def loading_table(
    folder: Path,
    aug: AugConfig | None,
    *,
    size: int,
    batch_size: int,
    device: str,
    scratch: Path | None = None,
    workers: int = 1,
    data: DataConfig | None = None,
    placements: tuple[str, ...] = ("host", "device"),
) -> InterleavedTable:
    """Return a table of our loader, the copies that bound its rate and, if `scratch` is given, the peers.

    Args:
        folder: Converted data set.
        aug: Augmentation, or None to measure reading alone.
        size: Image size after augmentation, in pixels. Ignored if `aug` is None.
        batch_size: Batch size of all candidates.
        device: "cpu" or "cuda".
        scratch: Folder for files of the peers, or None to leave out the peers.
        workers: Worker processes of the peers.
        data: Config section `data` for our loader. The other arguments take precedence.
        placements: Placements of raw pixels to measure on a GPU. If "host" is one of them, copying a batch from pinned
            memory is measured as well.
    """
    split = open_split(folder, SPLIT)
    encoding, is_raw, on_gpu = split.encoding, split.encoding == "npy", device == "cuda"
    stored_side = int(split.heights[0])
    side = stored_side if aug is None else size
    output_bytes = side * side * 3
    common: Row = {"device": device, "batch_size": batch_size}
    candidates: list[Candidate] = []
    rows: list[Row] = []

    def add(candidate: Candidate, **fields: Any) -> None:
        candidates.append(candidate)
        rows.append(common | fields)

    for placement in placements if on_gpu and is_raw else ("auto",):
        changes = {"path": str(folder), "batch_size": batch_size, "image_size": side, "placement": placement}
        config = (data or DataConfig(path=str(folder))).model_copy(update=changes)
        shown = placement if on_gpu and is_raw else ""
        name = f"{OURS}, {shown}" if shown else OURS
        candidate = Candidate(name, ours.loading, (config, aug or ours.PLAIN, device))
        add(candidate, ours=True, placement=shown, encoding=encoding)
    if scratch is not None:
        task = PeerTask(folder, scratch, batch_size, workers, side, aug, device)
        for name, peer in peers.available(peers.LOADERS, encoding).items():
            add(Candidate(name, peers.loading, (peer, task)), encoding=encoding)
    if is_raw and not on_gpu:
        add(Candidate(ONE_COPY, roofline.one_copy, (batch_size * output_bytes, batch_size)))
    if is_raw and on_gpu and "host" in placements:
        batch_bytes = batch_size * int(split.size[0])
        add(Candidate(PINNED_COPY, roofline.pinned_copy, (batch_bytes, batch_size)))

    stored_bytes = float(split.size.mean())
    otherwise = "latency of scattered samples" if aug is None and is_raw else AUGMENTED[device]
    bounds = _LoadingBounds(device, stored_bytes, float(output_bytes), stored_bytes * len(split), otherwise)
    sides = f"{stored_side}x{stored_side}" if size == stored_side or aug is None else f"{stored_side} to {size}"
    work = "reading alone" if aug is None else describe(aug)
    title = f"{sides} {'raw' if is_raw else 'JPEG'}, {work}"
    details = {"image_size": stored_side if aug is None else size, "encoding": encoding}
    return InterleavedTable(title, "reading" if aug is None else "loading", candidates, rows, details, bounds.add)


@dataclass(frozen=True)
class _LoadingBounds:
    """Adds throughput bounds in images/s to the loader rows of one table."""

    device: str
    stored_bytes: float  # of one image
    output_bytes: float  # of one image
    split_bytes: float
    otherwise: str  # limiting factor of a loader that is far below its bound

    def add(self, rows: list[Row], limits: Limits) -> None:
        """Add the bounds to the rows of loaders, and `ratio` (our rate divided by theirs) to the rows of peers."""
        copy, pinned = (
            max((row.get("images_per_s", 0.0) for row in rows if row["name"].startswith(name)), default=0.0)
            for name in (ONE_COPY, PINNED_COPY)
        )
        loaders = [row for row in rows if "encoding" in row]
        for row in loaders:
            bounds = roofline.loading_bounds(
                limits,
                placement=row.get("placement", ""),
                device=self.device,
                stored_bytes=self.stored_bytes,
                output_bytes=self.output_bytes,
            )
            if copy:  # measured alternately with the loaders and at the same batch size
                bounds = {ONE_COPY.removeprefix(BOUND): copy}
            elif pinned and roofline.PINNED in bounds:
                bounds[roofline.PINNED] = pinned
            bounds |= roofline.disk_bound(limits, self.stored_bytes, self.split_bytes)
            add_bound(row, bounds, self.otherwise)
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
