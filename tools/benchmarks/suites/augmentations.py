"""What each augmentation costs the loader: images/s of every kind on its own, beside torchvision's transforms."""

from __future__ import annotations

from pathlib import Path

from configs.schema import AugConfig, AutoAugmentConfig, BlurConfig, ColorJitterConfig, DataConfig, EraseConfig
from pipelines.storage.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.measured_tables import InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask

PEER = "torchvision v2 + DataLoader"
SIDE = 224  # where stored images have several
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
    folder: Path,
    *,
    batch_size: int,
    device: str,
    scratch: Path | None = None,
    workers: int = 1,
    placement: str = "auto",
) -> InterleavedTable:
    """All KINDS on one data set, at its stored size; with a scratch folder torchvision's beside those that it has."""
    stored = open_split(folder, SPLIT)
    size = min(stored.image_shape[:2]) if stored.image_shape else SIDE
    peer = peers.available(peers.LOADERS, stored.encoding).get(PEER)
    candidates: list[Candidate] = []
    rows: list[Row] = []

    def add(kind: str, candidate: Candidate, **details: object) -> None:
        candidates.append(candidate)
        rows.append({"kind": kind, "device": device, "batch_size": batch_size, **details})

    data = DataConfig(path=str(folder), batch_size=batch_size, image_size=size, placement=placement)  # type: ignore[arg-type]
    for kind, aug in KINDS.items():
        add(kind, Candidate(f"{OURS}, {kind}", ours.loading, (data, aug, device)), ours=True)
        if scratch is not None and peer is not None and _torchvision_has(aug):
            source = PeerTask(folder, scratch, batch_size, workers, size, aug, device)
            add(kind, Candidate(f"{PEER}, {kind}", peers.loading, (peer, source)), ours=False)
    title = f"augmentations at {size}x{size}, {'raw' if stored.encoding == 'npy' else 'JPEG'}"
    return InterleavedTable(
        title, "augment", candidates, rows, {"image_size": size, "encoding": stored.encoding}, _ratios
    )


def _torchvision_has(aug: AugConfig) -> bool:
    return aug.cutout == 0 and not aug.auto.policy.startswith("rand-")


def _ratios(rows: list[Row], found: Limits) -> None:
    """Each of ours as a share of flips alone, and each peer's row with ours divided by it."""
    del found
    rates = {row["kind"]: row["images_per_s"] for row in rows if row["ours"] and "images_per_s" in row}
    for row in rows:
        if "images_per_s" in row and row["kind"] in rates and PLAIN in rates:
            key, value = (
                ("of_plain", row["images_per_s"] / rates[PLAIN])
                if row["ours"]
                else ("ratio", rates[row["kind"]] / row["images_per_s"])
            )
            row[key] = float(f"{value:.4g}")
