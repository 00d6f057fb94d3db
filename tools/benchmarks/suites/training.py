"""Tables of training: one resident batch, end to end, and other training loops."""

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
from tools.benchmarks.engine.datasets import SPLIT
from tools.benchmarks.engine.measured_tables import InterleavedTable
from tools.benchmarks.engine.ours import OURS
from tools.benchmarks.engine.results import Row, add_bound, add_ratios
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask, training_loops


def training(
    title: str,
    config: Config,
    variants: dict[str, dict[str, Any]],
    *,
    device: str,
    details: dict[str, Any] | None = None,
    scratch: Path | None = None,
    workers: int = 1,
) -> InterleavedTable:
    """Ours on a resident batch and end to end (see ours.training); with a scratch folder peers end to end too.

    facts: what else the group's entry shall hold.
    """
    candidates = [Candidate(OURS, ours.training, (config, variants))]
    rows: list[dict[str, Any]] = [{"ours": True, "device": device, "encoding": ""}]
    size, batch_size = config.data.image_size or _stored_side(config), config.data.batch_size
    if scratch is not None:
        source = PeerTask(Path(config.data.path), scratch, batch_size, workers, size, config.aug, device)
        for name, peer in peers.available(peers.LOOPS, source.encoding).items():
            candidates.append(Candidate(name, training_loops.training, (peer, source, config)))
            rows.append({"device": device, "batch_size": batch_size})
    classes = config.model.num_classes or len(load_dataset(config.data.path)["classes"])

    @cache  # asked for after every round
    def training_flops() -> float:
        return roofline.training_flops(config.model, classes, size)

    def finish(rows: list[Row], found: Limits) -> None:
        flops = training_flops()
        resident = next(
            (row for row in rows if row["ours"] and row["name"].endswith(ours.RESIDENT)),
            {},
        )
        ceiling = resident.get("images_per_s", 0.0)
        end_to_end = [row for row in rows if row is not resident]
        for each in rows:
            peak = found.get(roofline.ARITHMETIC, 0) / flops
            if each["ours"] and ceiling and each is not resident and "images_per_s" in each:
                each["of_resident"] = float(f"{each['images_per_s'] / ceiling:.4g}")
            add_bound(each, {roofline.ARITHMETIC: peak}, _what_binds(each, each is resident))
            each["training_gflop"] = round(flops / 1e9, 4)
        add_ratios(end_to_end)

    common = {"image_size": size, "model": config.model.name, **(details or {})}
    return InterleavedTable(f"training {title}", "training", candidates, rows, common, finish)


def _what_binds(each: Row, resident: bool) -> str:
    if resident:
        return "the step: memory traffic and launches, not arithmetic"
    if not each["ours"]:
        return ""
    return "the step (see resident batch)" if each.get("of_resident", 0) >= 0.95 else "the loader"


def _stored_side(config: Config) -> int:
    return int(open_split(config.data.path, SPLIT).heights[0])
