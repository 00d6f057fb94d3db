"""Table of the cost of each augmentation.

The loader applies flips and one other augmentation at a time, and is compared to torchvision's transforms.
"""

from __future__ import annotations

import os
from pathlib import Path

from configs.schema import AugConfig, AutoAugmentConfig, BlurConfig, ColorJitterConfig, DataConfig, EraseConfig
from pipelines.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.measured_tables import Case, InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row, rounded
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask
from tools.benchmarks.suites.settings import Settings

PEER = "torchvision v2 + DataLoader"
SIDE = 224  # output size if stored images vary in size
PLAIN = "flip alone"
JITTER = ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4)
KINDS = {
    PLAIN: AugConfig(flip=0.5),
    "pad and crop": AugConfig(flip=0.5, crop="pad"),
    "random-resized crop": AugConfig(flip=0.5, crop="random-resized"),
    "colour jitter 0.4": AugConfig(flip=0.5, color_jitter=JITTER),
    "colour jitter 0.4, hue 0.1": AugConfig(flip=0.5, color_jitter=JITTER.model_copy(update={"hue": 0.1})),
    "greyscale 0.2": AugConfig(flip=0.5, grayscale=0.2),
    "Gaussian blur": AugConfig(flip=0.5, blur=BlurConfig(probability=1.0)),
    "RandAugment": AugConfig(flip=0.5, auto=AutoAugmentConfig(policy="randaugment")),
    "RandAugment, timm's rand-m9-mstd0.5-inc1": AugConfig(
        flip=0.5, auto=AutoAugmentConfig(policy="rand-m9-mstd0.5-inc1")
    ),
    "TrivialAugment": AugConfig(flip=0.5, auto=AutoAugmentConfig(policy="trivialaugment")),
    "AutoAugment": AugConfig(flip=0.5, auto=AutoAugmentConfig(policy="autoaugment-imagenet")),
    "random erasing 0.25": AugConfig(flip=0.5, erase=EraseConfig(probability=0.25)),
    "cutout": AugConfig(flip=0.5, cutout=8),
}


def augmentation_table(
    settings: Settings, folder: Path, *, batch_size: int, with_peer: bool, placement: str = "auto"
) -> InterleavedTable:
    """Return a table of our loader's rate with each augmentation in KINDS.

    The image size is the stored one, or SIDE if stored images vary in size.

    Args:
        settings: Settings of the benchmark.
        folder: Converted data set.
        batch_size: Batch size of all candidates.
        with_peer: Whether to also measure the peer, torchvision, with the KINDS that it supports.
        placement: data.placement of our loader.
    """
    stored, device = open_split(folder, SPLIT), settings.device
    size = min(stored.image_shape[:2]) if stored.image_shape else SIDE
    peer = peers.available(peers.LOADERS, stored.encoding).get(PEER) if with_peer else None
    data = DataConfig(path=str(folder), batch_size=batch_size, image_size=size, placement=placement)  # type: ignore[arg-type]
    workers = settings.workers or (len(os.sched_getaffinity(0)),)  # no sweep for each of the many rows
    cases = []
    for kind, aug in KINDS.items():
        fields: Row = {"kind": kind, "device": device, "batch_size": batch_size, "ours": True}
        cases.append(Case(Candidate(f"{OURS}, {kind}", ours.loading, (data, aug, device)), fields))
        if peer is not None and aug.cutout == 0 and not aug.auto.policy.startswith("rand-"):  # torchvision has neither
            task = PeerTask(folder, settings.scratch, batch_size, size, aug, device)
            candidate = Candidate(f"{PEER}, {kind}", peers.loading, (peer, task, workers))
            cases.append(Case(candidate, {**fields, "ours": False}))
    title = f"augmentations at {size}x{size}, {'raw' if stored.encoding == 'npy' else 'JPEG'}"
    return InterleavedTable(title, "augment", cases, {"image_size": size, "encoding": stored.encoding}, _add_ratios)


def _add_ratios(rows: list[Row], limits: Limits) -> None:
    """Set `of_plain` in our rows and `ratio` in the rows of the peer.

    `of_plain` is the rate divided by our rate for flips alone. `ratio` is our rate with the same augmentation divided
    by the peer's.
    """
    rates = {row["kind"]: row["images_per_s"] for row in rows if row["ours"] and "images_per_s" in row}
    for row in rows:
        if "images_per_s" not in row or row["kind"] not in rates or PLAIN not in rates:
            continue
        if row["ours"]:
            row["of_plain"] = rounded(row["images_per_s"] / rates[PLAIN], 4)
        else:
            row["ratio"] = rounded(rates[row["kind"]] / row["images_per_s"], 4)
