"""Read the records of finished and unfinished runs, and turn them into rows of a comparison table and of curves.

A record is read from config.yaml, metrics.jsonl and facts.json in a run folder. Rows count epochs from 1 (epochs
trained), whereas metrics.jsonl counts them from 0.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config, Effect, settings_by_key
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from tools.common.tables import Row
from train.checkpoint.resume import read_config
from train.checkpoint.run_dir import is_locked
from train.reporting.metrics_file import MetricsLine, counted_accuracy, read_metrics

BASE_COLUMNS = {
    "model.name": "model",
    "train.lr": "lr",
    "train.optimizer.name": "optimizer",
    "train.optimizer.weight_decay": "weight_decay",
    "train.epochs": "epochs",
}
QUANTITIES = ("train_loss", "val_loss", "train_top1", "val_top1")
EMA_QUANTITIES = ("ema_val_loss", "ema_val_top1", "ema_val_top5")
MAX_NAME_LENGTH, MAX_SETTINGS_LENGTH = 28, 60  # characters that fit into a legend


@dataclass(frozen=True)
class RunRecord:
    """Config and metrics of one run."""

    folder: Path
    config: Config
    metrics: list[MetricsLine]
    global_batch: int | None  # samples per optimizer step over all ranks, or None if not recorded

    @property
    def epochs_trained(self) -> int:
        return self.metrics[-1].epoch + 1 if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        """Whether the run has trained all of its epochs, or was ended by train.max_steps or train.patience."""
        stopped_early = self.metrics[-1].get("stopped_early") if self.metrics else None
        return self.epochs_trained >= self.config.train.epochs or stopped_early is not None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return the run folders among `paths`, and those directly inside the other paths, without duplicates.

    Raises:
        UserError: A path is not a run folder and does not contain one.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give run folders, or folders that contain them (output)")
        inside = [path] if _is_run_folder(path) else sorted(filter(_is_run_folder, path.iterdir()), key=_natural_key)
        if not inside:
            raise UserError(f"{path} contains no run (config.yaml, metrics.jsonl) and no run folder; name one")
        found += inside
    return [path for number, path in enumerate(found) if path.resolve() not in {p.resolve() for p in found[:number]}]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, with or without metrics.

    Raises:
        UserError: The config or the metrics cannot be read or are invalid.
    """
    return RunRecord(folder, read_config(folder), read_metrics(folder), read_global_batch(folder))


def read_global_batch(folder: Path) -> int | None:
    """Return the global batch size of the run's latest launch from facts.json, or None if it cannot be read."""
    try:
        return int(json.loads(read_small_text(folder / "facts.json"))["global_batch"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def compared_settings(config: Config) -> dict[str, object]:
    """Return the settings that may affect results, by dotted key. Equal ones are the same point of a sweep."""
    return settings_by_key(config, (Effect.RESULTS, Effect.MINOR))


def differing_keys(configs: Sequence[Config]) -> list[str]:
    """Return the dotted keys of the settings that may affect results and differ between the configs."""
    settings = [compared_settings(config) for config in configs]
    return [key for key in settings[0] if any(other[key] != settings[0][key] for other in settings)] if settings else []


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """Return a unique label for each run.

    The labels are folder names if those are short and descriptive, or else the settings that differ if those are short
    and unique, or else folder names if those are unique, or else folder paths.
    """
    names = [record.folder.name or str(record.folder) for record in records]
    # names that differ only in a number (`lenet`, `lenet-2`) do not describe the run
    are_descriptive = len({record.config.name for record in records}) == len(set(names)) == len(records)
    if are_descriptive and max(map(len, names), default=0) <= MAX_NAME_LENGTH:
        return names
    keys = differing_keys([record.config for record in records])
    settings = [
        ", ".join(f"{key}={format_setting(settings_by_key(record.config)[key])}" for key in keys) for record in records
    ]
    if len(set(settings)) == len(records) and max(map(len, settings), default=0) <= MAX_SETTINGS_LENGTH:
        return settings
    return names if len(set(names)) == len(records) else [str(record.folder) for record in records]


def format_setting(value: object) -> str:
    """Return a setting's value as written on a command line, with numbers in their shortest form."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def comparison_rows(records: Sequence[RunRecord], names: Sequence[str]) -> list[Row]:
    """Return one row per run with its settings and results.

    `time_ratio` is the run's training time divided by that of the first run, or None if one of the two has not finished
    or its time is unknown. If any run keeps a moving average, the column `weights` tells whether a run's accuracy is
    that of the moving average (ema) or of the trained weights (raw).
    """
    configs = [record.config for record in records]
    columns = [key for key in differing_keys(configs) if key not in BASE_COLUMNS]
    has_batch = all(record.global_batch is not None for record in records)
    has_averages = any("ema_val_top1" in line for record in records for line in record.metrics)
    rows = []
    for name, record in zip(names, records, strict=True):
        settings, data, train = settings_by_key(record.config), record.config.data, record.config.train
        batch = record.global_batch if has_batch else data.batch_size * train.accumulation_steps
        rows.append(
            {
                "run": name,
                "status": status(record),
                **{column: settings[key] for key, column in BASE_COLUMNS.items()},
                "global_batch" if has_batch else "batch_per_rank": batch,
                **{key: _cell(settings[key]) for key in columns},
                **({"weights": "ema" if uses_ema(record) else "raw"} if has_averages else {}),
                **summarize_metrics(record.metrics, record.config.eval.weights),
            }
        )
    for row, record in zip(rows, records, strict=True):
        times = row["training_time_s"], rows[0]["training_time_s"]
        row["time_ratio"] = (
            times[0] / times[1] if all(times) and record.is_finished and records[0].is_finished else None
        )
    return rows


def uses_ema(record: RunRecord) -> bool:
    """Return True if the validation accuracy in tables is that of the run's moving average."""
    return record.config.train.ema.decay is not None and record.config.eval.weights != "raw"


def summarize_metrics(metrics: Sequence[MetricsLine], weights: str = "auto") -> Row:
    """Return the best validation accuracy, the latest training metrics, time, speed and memory.

    An unknown `device_memory_gib` is left out, and other unknown values are None. `weights` is the value of
    eval.weights. It selects the validation accuracy of the trained weights or of their moving average.
    """
    evaluated = [(top1, line.epoch) for line in metrics if (top1 := counted_accuracy(line, weights)) is not None]
    best = max(evaluated, key=lambda pair: pair[0], default=None)
    last = metrics[-1] if metrics else MetricsLine()
    device_gib = _over_epochs(max, metrics, "device_memory_gib")  # only recorded on a GPU
    return {
        "best_val_top1": best[0] if best else None,
        "best_epoch": best[1] + 1 if best else None,
        "train_top1": last.get("train_top1"),
        "train_loss": last.get("train_loss"),
        "training_time_s": training_time_s(metrics),
        "images_per_s": _over_epochs(statistics.median, metrics, "images_per_s"),
        "memory_gib": _over_epochs(max, metrics, "memory_gib"),
    } | ({} if device_gib is None else {"device_memory_gib": device_gib})


def training_time_s(metrics: Sequence[MetricsLine]) -> float | None:
    """Return the total duration of all epochs in seconds, or None if there are no epochs or a duration is unknown."""
    times = [line.get("epoch_time_s") for line in metrics]
    return sum(map(float, times)) if times and None not in times else None  # type: ignore[arg-type]


def curve_rows(records: Sequence[RunRecord], names: Sequence[str]) -> list[Row]:
    """Return one row per run and epoch. Non-finite losses and values that were not recorded are None."""
    averages = [name for name in EMA_QUANTITIES if any(name in line for record in records for line in record.metrics)]
    columns = (*QUANTITIES, "val_top5", *averages, "lr", "images_per_s", "epoch_time_s")
    return [
        {"run": name, "epoch": line.epoch + 1, **{column: line.get(column) for column in columns}}
        for name, record in zip(names, records, strict=True)
        for line in record.metrics
    ]


def _is_run_folder(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def _natural_key(path: Path) -> list[tuple[float, str]]:
    """Return a sort key that orders the numbers in names by value: run-2 before run-10, lr=1e-05 before lr=0.0001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", path.name)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def _over_epochs(reduce: Callable[[list[float]], float], metrics: Sequence[MetricsLine], key: str) -> float | None:
    values = [float(value) for line in metrics if (value := line.get(key)) is not None]
    return reduce(values) if values else None


def status(record: RunRecord) -> str:
    """Return whether a run has finished, or how far it got."""
    if record.is_finished:
        return "finished"
    if not record.metrics and not is_locked(record.folder):
        return "failed or stopped before its first epoch"
    return f"running or stopped at epoch {record.epochs_trained} of {record.config.train.epochs}"


def _cell(value: object) -> object:
    return format_setting(value) if isinstance(value, list | bool) else value
