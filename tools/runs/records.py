"""What runs left in their folders, as one table and one set of curves. Reads runs that are still going on, too.

Knows the files of a run folder (config.yaml, metrics.jsonl, facts.json), but no picture and no process.
Epochs are counted from 1 here, as "epochs trained"; metrics.jsonl counts from 0.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import parse_config
from configs.schema import Config, all_settings, is_section
from configs.utils.errors import UserError
from configs.utils.files import read_small_text
from tools.common.tables import Row
from train.reporting.metrics_file import counted_accuracy, read_metrics

# Settings that change no result: what a run is called, where it lies, from where it goes on, how it reports and reads.
NOT_COMPARED = ("name", "output", "resume", "eval.only", "data.threads", "data.prefetch", "log.")
BASE_COLUMNS = {
    "model.name": "model",
    "train.lr": "lr",
    "train.optimizer.name": "optimizer",
    "train.optimizer.weight_decay": "weight_decay",
    "train.epochs": "epochs",
}
QUANTITIES = ("train_loss", "val_loss", "train_top1", "val_top1")
EMA_QUANTITIES = ("ema_val_loss", "ema_val_top1", "ema_val_top5")
MAX_NAME_LENGTH, MAX_SETTINGS_LENGTH = 28, 60  # characters that a legend has room for


@dataclass(frozen=True)
class RunRecord:
    """One run: what it was asked to do and what it has done so far."""

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    global_batch: int | None  # samples per update over all ranks; None: not recorded

    @property
    def epochs_trained(self) -> int:
        return self.metrics[-1]["epoch"] + 1 if self.metrics else 0

    @property
    def is_finished(self) -> bool:
        return self.epochs_trained >= self.config.train.epochs


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders that `paths` stand for, each once: a run folder itself, another folder for those inside it."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder; give run folders, or folders that hold them, such as output")
        inside = [path] if _is_run_folder(path) else sorted(filter(_is_run_folder, path.iterdir()), key=_natural_key)
        if not inside:
            raise UserError(f"{path} holds no run (config.yaml, metrics.jsonl), nor a folder of runs; name one")
        found += inside
    return [path for number, path in enumerate(found) if path.resolve() not in {p.resolve() for p in found[:number]}]


def read_run(folder: Path) -> RunRecord:
    """Raises UserError where there is no readable config; no metrics yet is no error."""
    try:
        text = read_small_text(folder / "config.yaml")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.yaml cannot be read ({error}); give the folder of a run") from None
    return RunRecord(
        folder, parse_config(text, f"{folder}/config.yaml"), read_metrics(folder), read_global_batch(folder)
    )


def read_global_batch(folder: Path) -> int | None:
    """From facts.json, since the world size is in no config: the batch of the run's latest start."""
    try:
        return int(json.loads(read_small_text(folder / "facts.json"))["global_batch"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def settings_by_key(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key, without sections."""
    values = config.model_dump(mode="json")
    result = {}
    for key, field in all_settings():
        if not is_section(field):
            value: Any = values
            for part in key.split("."):
                value = value[part]
            result[key] = value
    return result


def compared_settings(config: Config) -> dict[str, Any]:
    """The settings that the results follow from."""
    return {key: value for key, value in settings_by_key(config).items() if not key.startswith(NOT_COMPARED)}


def differing_keys(configs: Sequence[Config]) -> list[str]:
    """Dotted keys of the settings in which any two differ, bookkeeping aside."""
    settings = [compared_settings(config) for config in configs]
    return [key for key in settings[0] if any(other[key] != settings[0][key] for other in settings)] if settings else []


def run_labels(records: Sequence[RunRecord]) -> list[str]:
    """A short text for each run that tells it from the others: its name, else the settings that differ."""
    names = [record.folder.name or str(record.folder) for record in records]
    # names that only a number tells apart (`lenet`, `lenet-2`) say nothing
    are_telling = len({record.config.name for record in records}) == len(set(names)) == len(records)
    if are_telling and max(map(len, names), default=0) <= MAX_NAME_LENGTH:
        return names
    keys = differing_keys([record.config for record in records])
    settings = [
        ", ".join(f"{key}={format_value(settings_by_key(record.config)[key])}" for key in keys) for record in records
    ]
    if len(set(settings)) == len(records) and max(map(len, settings), default=0) <= MAX_SETTINGS_LENGTH:
        return settings
    return names if len(set(names)) == len(records) else [str(record.folder) for record in records]


def format_value(value: Any) -> str:
    """A setting's value as a command line would give it, numbers in their shortest form."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def comparison_rows(records: Sequence[RunRecord], names: Sequence[str]) -> list[Row]:
    """One row per run; `time_ratio` is the training time in units of the first run's, where both have finished.

    Where any run keeps a moving average, `weights` says whose accuracy counts: the average's (ema) or not (raw).
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
                "status": "finished" if record.is_finished else _progress(record),
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
    """Whether the run's best accuracy is its moving average's."""
    return record.config.train.ema.decay is not None and record.config.eval.weights != "raw"


def summarize_metrics(metrics: Sequence[dict[str, Any]], weights: str = "auto") -> Row:
    """Return the best validation accuracy, the state of training, time, speed and memory; None for what is unknown.

    weights: eval.weights, which says whose accuracy counts.
    """
    evaluated = [(top1, line["epoch"]) for line in metrics if (top1 := counted_accuracy(line, weights)) is not None]
    best = max(evaluated, key=lambda pair: pair[0], default=None)
    last = metrics[-1] if metrics else {}
    device_gib = _over_epochs(max, metrics, "device_memory_gib")  # recorded on a GPU only
    return {
        "best_val_top1": best[0] if best else None,
        "best_epoch": best[1] + 1 if best else None,
        "train_top1": last.get("train_top1"),
        "train_loss": last.get("train_loss"),
        "training_time_s": training_time_s(metrics),
        "images_per_s": _over_epochs(statistics.median, metrics, "images_per_s"),
        "memory_gib": _over_epochs(max, metrics, "memory_gib"),
    } | ({} if device_gib is None else {"device_memory_gib": device_gib})


def training_time_s(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Return the time of all epochs; None where that of any is unknown, since a part of the sum would mislead."""
    times = [line.get("epoch_time_s") for line in metrics]
    return sum(map(float, times)) if times and None not in times else None  # type: ignore[arg-type]


def curve_rows(records: Sequence[RunRecord], names: Sequence[str]) -> list[Row]:
    """Every point of every curve; a loss of nan or infinity is empty, as in metrics.jsonl, and so is the moving average
    of a run that keeps none."""
    averages = [name for name in EMA_QUANTITIES if any(name in line for record in records for line in record.metrics)]
    columns = (*QUANTITIES, "val_top5", *averages, "lr", "images_per_s", "epoch_time_s")
    return [
        {"run": name, "epoch": line["epoch"] + 1, **{column: line.get(column) for column in columns}}
        for name, record in zip(names, records, strict=True)
        for line in record.metrics
    ]


def _is_run_folder(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()


def _natural_key(path: Path) -> list[Any]:
    """Sorts run-2 before run-10, and lr=1e-05 before lr=0.0001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", path.name)
    return [(float(part), "") if number % 2 else (0.0, part) for number, part in enumerate(parts)]


def _over_epochs(reduce: Callable[[list[float]], float], metrics: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [float(line[key]) for line in metrics if line.get(key) is not None]
    return reduce(values) if values else None


def _progress(record: RunRecord) -> str:
    return f"running or stopped at epoch {record.epochs_trained} of {record.config.train.epochs}"


def _cell(value: Any) -> Any:
    return format_value(value) if isinstance(value, list | bool) else value
