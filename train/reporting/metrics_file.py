"""Read the metrics.jsonl of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.utils.errors import UserError
from configs.utils.files import read_small_text


class MetricsLine(dict[str, float | None]):
    """Line of a run's metrics.jsonl: the numbers of one epoch, by name. Numbers that were not finite are None."""

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return int(self["epoch"] or 0)


def read_metrics(folder: Path) -> list[MetricsLine]:
    """Return the lines of a run's metrics.jsonl.

    Reading ends at the first line that is not valid JSON, e.g. a last line that is truncated because the run was
    killed. If the file is missing, the list is empty.

    Raises:
        UserError: The file cannot be read, or a line does not map names to numbers or does not include the epoch.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = read_small_text(path, "replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); repair or remove it") from None
    metrics: list[MetricsLine] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or type(line.get("epoch")) is not int or not all(map(_is_metric, line.values())):
            raise UserError(f"{path}:{number} is not a line of a run's metrics (numbers by name); repair or remove it")
        metrics.append(MetricsLine(line))
    return metrics


def _is_metric(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not abs(value) > sys.float_info.max)


def best_results(metrics: Sequence[MetricsLine]) -> dict[str, float]:
    """Return the lowest validation loss, the highest top-1 validation accuracy, and the first epoch with it, from 1.

    The best results of a moving average have separate keys. Results that were never evaluated are omitted. `metrics` is
    from `read_metrics`.
    """
    found: dict[str, float] = {}
    for average in ("", "ema_"):
        loss, accuracy = f"{average}val_loss", f"{average}val_top1"
        top1 = [(value, -line.epoch) for line in metrics if (value := line.get(accuracy)) is not None]
        losses = [value for line in metrics if (value := line.get(loss)) is not None]
        if losses:
            found[f"best_{loss}"] = min(losses)
        if top1:
            found[f"best_{accuracy}"], negative_epoch = max(top1)  # the first of equal epochs
            found[f"best_{average}epoch"] = 1 - negative_epoch
    return found


def counted_accuracy(line: MetricsLine, weights: str) -> float | None:
    """Return the top-1 validation accuracy of the weights that eval.weights selects, or None if it is missing.

    `weights` is the value of eval.weights.
    """
    return line.get(f"{counted_average(line, weights)}val_top1")


def counted_average(line: MetricsLine, weights: str) -> str:
    """Return "ema_", the prefix of results of the moving average, if eval.weights selects them, and "" otherwise."""
    return "ema_" if "ema_val_top1" in line and weights != "raw" else ""
