"""Run folders with made-up metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.load import load_config, to_yaml
from helpers.training import DIGITS
from train.reporting.metrics_file import MetricsLine


def metrics_line(epoch: int, **changes: Any) -> MetricsLine:
    values = {
        "train_loss": 2 / (epoch + 1),
        "train_top1": 0.3,
        "val_loss": 2.1 / (epoch + 1),
        "val_top1": 0.2 + epoch / 10,
    }
    speeds = {"lr": 1e-3, "images_per_s": 100.0 * (epoch + 1), "epoch_time_s": 2.0, "memory_gib": 1.0 + epoch}
    return MetricsLine({"epoch": epoch, **values, "val_top5": 0.9, **speeds, **changes})


def make_run(folder: Path, *settings: str, lines: list[MetricsLine] | None = None, batch: int | None = 64) -> Path:
    """Write a run folder with three epochs."""
    folder.mkdir(parents=True)
    config = load_config(DIGITS, ["train.epochs=3", *settings], name=folder.name, output=str(folder.parent))
    (folder / "config.yaml").write_text(to_yaml(config))
    metrics = [metrics_line(0), metrics_line(1), metrics_line(2)] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    if batch is not None:
        (folder / "facts.json").write_text(json.dumps({"global_batch": batch}))
    return folder
