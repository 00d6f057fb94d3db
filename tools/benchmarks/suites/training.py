"""Tables of training on one resident batch, end-to-end training, and the training loops of other projects."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from configs.schema import Config
from pipelines.open import load_dataset, open_split
from tools.benchmarks import peers
from tools.benchmarks.engine import ours, roofline
from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.measured_tables import Case, InterleavedTable
from tools.benchmarks.engine.ours import OURS, Variants
from tools.benchmarks.engine.results import Entry, Row, add_bound, add_ratios, rounded
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.peers import PeerTask, training_loops
from tools.benchmarks.suites.loading import absent_rows
from tools.benchmarks.suites.settings import Settings

STEP_BINDS_FROM = 0.95  # minimum share of the resident batch's rate at which the step, not the loader, limits training


def training_table(
    settings: Settings, title: str, config: Config, variants: Variants, *, with_peers: bool = False
) -> InterleavedTable:
    """Return a table of our training, on a resident batch and end to end, and of the peers' training.

    Args:
        settings: Settings of the benchmark.
        title: Title without the prefix "training".
        config: Training config.
        variants: Maps the name of each end-to-end workload to its overrides of `config.data`.
        with_peers: Whether to measure the peers.
    """
    device, batch_size = settings.device, config.data.batch_size
    size = config.data.image_size or int(open_split(config.data.path, config.data.train_split).heights[0])
    common: Row = {"device": device, "batch_size": batch_size}
    cases = [Case(Candidate(OURS, ours.training, (config, variants)), {**common, "ours": True, "encoding": ""})]
    absent: list[Row] = []
    if with_peers:
        task = PeerTask(Path(config.data.path), settings.scratch, batch_size, size, config.aug, device)
        for name, peer in peers.available(peers.LOOPS, task.encoding).items():
            arguments = (peer, task, config, settings.workers, settings.seconds / 4)
            cases.append(Case(Candidate(name, training_loops.training, arguments), common))
        absent = absent_rows(peers.LOOPS, task.encoding)
    classes = config.model.num_classes or len(load_dataset(config.data.path, config.data.classes).classes)
    details: Entry = {"image_size": size, "model": config.model.name}
    flops = cache(partial(roofline.training_flops, config.model, classes, size))  # needed after every round
    return InterleavedTable(f"training {title}", "training", cases, details, partial(_add_bounds, flops), absent)


def _add_bounds(training_flops: Callable[[], float], rows: list[Row], limits: Limits) -> None:
    """Add the arithmetic bound to all rows, `of_resident` to our end-to-end rows and `ratio` to the rows of peers."""
    flops = training_flops()
    bounds = {roofline.ARITHMETIC: limits.get(roofline.ARITHMETIC, 0) / flops}
    resident = next((row for row in rows if row["ours"] and row["name"].endswith(ours.RESIDENT)), Row())
    for row in rows:
        row["training_gflop"] = round(flops / 1e9, 4)
        if row is resident:
            add_bound(row, bounds, "the step: memory traffic and launches, not arithmetic")
            continue
        if row["ours"] and "images_per_s" in row and "images_per_s" in resident:
            row["of_resident"] = rounded(row["images_per_s"] / resident["images_per_s"], 4)
        binds = "the step (see resident batch)" if row.get("of_resident", 0) >= STEP_BINDS_FROM else "the loader"
        add_bound(row, bounds, binds if row["ours"] else "")
    add_ratios([row for row in rows if row is not resident])
