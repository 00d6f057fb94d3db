"""Tables of training on one resident batch, end-to-end training, and the training loops of other projects."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from configs.schema import Config
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.measured_tables import InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row, add_bound, add_ratios
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask, training_loops

STEP_BINDS_FROM = 0.95  # minimum share of the resident batch's rate at which the step, not the loader, limits training


def training_table(
    title: str,
    config: Config,
    variants: dict[str, dict[str, Any]],
    *,
    device: str,
    details: dict[str, Any] | None = None,
    scratch: Path | None = None,
    workers: int = 1,
) -> InterleavedTable:
    """Return a table of our training, on a resident batch and end to end, and of the peers' training.

    Args:
        title: Title without the prefix "training".
        config: Training config.
        variants: Maps the name of each end-to-end workload to its overrides of `config.data`.
        device: "cpu" or "cuda".
        details: Additional fields for the entry.
        scratch: Folder for files of the peers, or None to leave out the peers.
        workers: Worker processes of the peers.
    """
    candidates = [Candidate(OURS, ours.training, (config, variants))]
    size, batch_size = config.data.image_size or _stored_side(config), config.data.batch_size
    rows: list[Row] = [{"ours": True, "device": device, "encoding": "", "batch_size": batch_size}]
    if scratch is not None:
        task = PeerTask(Path(config.data.path), scratch, batch_size, workers, size, config.aug, device)
        for name, peer in peers.available(peers.LOOPS, task.encoding).items():
            candidates.append(Candidate(name, training_loops.training, (peer, task, config)))
            rows.append({"device": device, "batch_size": batch_size})
    classes = config.model.num_classes or len(load_dataset(config.data.path).classes)

    @cache  # called after every round
    def training_flops() -> float:
        return roofline.training_flops(config.model, classes, size)

    def add_bounds(rows: list[Row], limits: Limits) -> None:
        flops = training_flops()
        resident = next((row for row in rows if row["ours"] and row["name"].endswith(ours.RESIDENT)), {})
        resident_rate = resident.get("images_per_s", 0.0)
        for row in rows:
            if row["ours"] and resident_rate and row is not resident and "images_per_s" in row:
                row["of_resident"] = float(f"{row['images_per_s'] / resident_rate:.4g}")
            peak_rate = limits.get(roofline.ARITHMETIC, 0) / flops
            add_bound(row, {roofline.ARITHMETIC: peak_rate}, _limiting_factor(row, row is resident))
            row["training_gflop"] = round(flops / 1e9, 4)
        add_ratios([row for row in rows if row is not resident])

    common = {"image_size": size, "model": config.model.name, **(details or {})}
    return InterleavedTable(f"training {title}", "training", candidates, rows, common, add_bounds)


def _limiting_factor(row: Row, is_resident: bool) -> str:
    """Return the limiting factor of a training rate that is far below the arithmetic bound, or "" for peers."""
    if is_resident:
        return "the step: memory traffic and launches, not arithmetic"
    if not row["ours"]:
        return ""
    return "the step (see resident batch)" if row.get("of_resident", 0) >= STEP_BINDS_FROM else "the loader"


def _stored_side(config: Config) -> int:
    return int(open_split(config.data.path, config.data.train_split).heights[0])
