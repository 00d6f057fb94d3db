"""Tables of data loaders: reading, with and without augmentation, beside other libraries."""

from __future__ import annotations

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
AUGMENTED = {"cpu": "the cores' work on every image", "cuda": "the work of the graph on every image"}


def loading(
    folders: list[Path],
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
    """Reading (aug None) or reading with augmentation, from data sets of the same images; with a scratch folder peers
    too.

    size: side of the images that augmentation gives. placements: of raw pixels on a GPU; beside the host's the copy of
    a batch from pinned memory is measured.
    """
    candidates: list[Candidate] = []
    details: list[dict[str, Any]] = []
    sizes: dict[str, tuple[float, float]] = {}
    encodings = []
    for folder in folders:
        split = open_split(folder, SPLIT)
        raw = split.encoding == "npy"
        encodings.append(split.encoding)
        base = data or DataConfig(path=str(folder))
        stored = int(split.heights[0])
        side = stored if aug is None else size
        sizes[split.encoding] = (float(split.size.mean()), side * side * 3.0)
        for placement in placements if device == "cuda" and raw else ("auto",):
            changes = {"path": str(folder), "batch_size": batch_size, "image_size": side, "placement": placement}
            parts = (split.encoding,) if len(folders) > 1 else ()
            shown = placement if device == "cuda" and raw else ""
            name = ", ".join([OURS, *parts, *filter(None, [shown])])
            arguments = (base.model_copy(update=changes), aug or ours.PLAIN, device)
            candidates.append(Candidate(name, ours.loading, arguments))
            details.append(
                {
                    "ours": True,
                    "device": device,
                    "placement": shown,
                    "encoding": split.encoding,
                    "batch_size": batch_size,
                }
            )
        if scratch is not None:
            source = PeerTask(folder, scratch, batch_size, workers, side, aug, device)
            for name, peer in peers.available(peers.LOADERS, split.encoding).items():
                candidates.append(Candidate(name, peers.loading, (peer, source)))
                details.append({"device": device, "encoding": split.encoding, "batch_size": batch_size})
        if device == "cpu" and raw:
            batch_bytes = batch_size * side * side * 3
            candidates.append(Candidate(ONE_COPY, roofline.one_copy, (batch_bytes, batch_size)))
            details.append({"device": device, "batch_size": batch_size})
        if device == "cuda" and raw and "host" in placements:
            batch_bytes = batch_size * int(split.size[0])
            candidates.append(Candidate(f"{BOUND}{roofline.PINNED}", roofline.pinned_copy, (batch_bytes, batch_size)))
            details.append({"device": device, "batch_size": batch_size})

    def finish(rows: list[Row], found: Limits) -> None:
        copy, pinned = (
            max((each.get("images_per_s", 0.0) for each in rows if each["name"].startswith(name)), default=0.0)
            for name in (ONE_COPY, f"{BOUND}{roofline.PINNED}")
        )
        for each in rows:
            if "encoding" not in each:
                continue
            stored_bytes, output_bytes = sizes[each["encoding"]]
            bounds = roofline.loading_bounds(
                found,
                placement=each.get("placement", ""),
                device=device,
                stored_bytes=stored_bytes,
                output_bytes=output_bytes,
            )
            if copy:  # of batches of this size, in turns with the others
                bounds = {ONE_COPY.removeprefix(BOUND): copy}
            elif pinned and roofline.PINNED in bounds:
                bounds[roofline.PINNED] = pinned
            bounds |= roofline.disk_bound(found, stored_bytes, stored_bytes * split_samples)
            add_bound(
                each,
                bounds,
                otherwise="latency of scattered samples"
                if aug is None and each["encoding"] == "npy"
                else AUGMENTED[device],
            )
        add_ratios([each for each in rows if "encoding" in each])

    split_samples = len(open_split(folders[0], SPLIT))
    stage = "reading" if aug is None else "loading"
    stored_side = int(open_split(folders[0], SPLIT).heights[0])
    what = "reading alone" if aug is None else describe(aug)
    sides = f"{stored_side}x{stored_side}" if size == stored_side or aug is None else f"{stored_side} to {size}"
    title = f"{sides} {'raw' if encodings == ['npy'] else 'JPEG' if encodings == ['jpeg'] else 'raw and JPEG'}, {what}"
    group_facts = {"image_size": size, "encoding": encodings[0] if len(encodings) == 1 else "npy and jpeg"}
    return InterleavedTable(title, stage, candidates, details, group_facts, finish)


def describe(aug: AugConfig) -> str:
    """What the loader does, in its order."""
    jitter = aug.color_jitter
    parts = {
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
    return ", ".join(part for part, is_on in parts.items() if is_on) or "no augmentation"


def crop_and_flip(aug: AugConfig) -> AugConfig:
    """The part of an augmentation that all peers have."""
    return AugConfig(crop=aug.crop, padding=aug.padding, scale=aug.scale, ratio=aug.ratio, flip=aug.flip)
