"""Reading metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.utils.errors import UserError
from train.reporting.metrics_file import MetricsLine, best_results, read_metrics


def metrics(epoch: int, **changes: Any) -> MetricsLine:
    values = {"epoch": epoch, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.7, "val_top1": 0.4, **changes}
    return MetricsLine(values)


def test_endless_metrics_are_one_user_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/zero")
    with pytest.raises(
        UserError, match=r"metrics\.jsonl cannot be read \(it is not a regular file\); repair or remove it"
    ):
        read_metrics(tmp_path)


def test_best_epoch_is_the_first_evaluated_of_equals() -> None:
    lines = [metrics(0), metrics(1, val_top1=0.6, val_loss=1.2), metrics(2, val_top1=0.6), metrics(3, val_loss=None)]
    lines += [metrics(4, val_top1=None, val_loss=0.5)]
    assert best_results(lines) == {"best_val_top1": 0.6, "best_epoch": 2, "best_val_loss": 0.5}
    assert best_results([metrics(0, val_top1=None, val_loss=None)]) == {}
