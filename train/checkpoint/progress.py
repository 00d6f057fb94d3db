"""The entries of a checkpoint that describe its run: progress, settings, data set and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isnan
from typing import Any

from pipelines.storage.dataset import DatasetInfo
from train.checkpoint.state import CodeEntry, DatasetEntry, StreamInfo
from train.engine.evaluate import Evaluation
from train.engine.metrics import RunTimer
from train.optim.schedule import Plateau


@dataclass
class Progress:
    """Results and decisions of a run so far, updated by the trainer."""

    best_top1: float = -1.0  # best accuracy on the validation split, from 0 to 1
    best_value: float | None = None  # best value of eval.best_by, unless that is top1
    stale_epochs: int = 0  # epochs since the best evaluation, counted if train.patience is set
    stopped_at: int = 0  # optimizer steps after which train.max_steps ended the run within an epoch
    plateau: Plateau = field(default_factory=Plateau)
    passed_over: list[list[int]] = field(default_factory=list)  # [first, last] steps to skip, counted from 1
    left_out: int = 0  # optimizer steps skipped since their gradients were not finite

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> Progress:
        """Return the progress in the "progress" entry of a checkpoint. Missing fields have their default values.

        Unknown fields, from another version, are ignored.
        """
        known = {field.name: entry[field.name] for field in fields(cls) if field.name in entry}
        return cls(**{**known, "plateau": Plateau(**entry.get("plateau", {}))})

    def entry(self) -> dict[str, object]:
        """Return the "progress" entry of a checkpoint. It omits fields with default values, except best_top1."""
        defaults = asdict(Progress())
        return {key: value for key, value in asdict(self).items() if key == "best_top1" or value != defaults[key]}

    def record(self, evaluation: Evaluation, best_by: str) -> bool:
        """Record an evaluation, and return True if it is the best so far by `best_by`, the value of eval.best_by."""
        value: float = getattr(evaluation, best_by)
        best, sign = self.best(best_by), -1 if best_by == "loss" else 1
        self.best_top1 = max(self.best_top1, evaluation.top1)
        is_better = not isnan(value) and (best is None or sign * value > sign * best)
        if is_better and best_by != "top1":
            self.best_value = value
        return is_better

    def best(self, best_by: str) -> float | None:
        """Return the best value of eval.best_by, or None if there has been no evaluation."""
        if best_by != "top1":
            return self.best_value
        return self.best_top1 if self.best_top1 >= 0 else None

    @property
    def skip_steps(self) -> set[int]:
        """The optimizer steps to skip after rewinds, counted from 0."""
        return {step for first, last in self.passed_over for step in range(first - 1, last)}


@dataclass
class RunInfo:
    """Entries of every checkpoint of a run, besides its training state and position."""

    stream: StreamInfo
    config: str  # YAML
    dataset: DatasetEntry
    progress: Progress = field(default_factory=Progress)
    clock: RunTimer = field(default_factory=RunTimer)
    code: dict[str, CodeEntry] = field(default_factory=dict)  # see `train.checkpoint.code`

    def entries(self) -> dict[str, object]:
        """Return the entries by name, with the progress and the times so far."""
        return {
            **({"code": self.code} if self.code else {}),
            "stream": self.stream,
            "config": self.config,
            "dataset": self.dataset,
            "progress": self.progress.entry(),
            "times": dict(self.clock.times),
        }


def dataset_entry(dataset: DatasetInfo, image_size: int) -> DatasetEntry:
    """Return the "dataset" entry of a checkpoint, for a model trained on images of `image_size` pixels."""
    conversion = dataset.options.get("encoding")
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "image_shape": list(dataset.image_shape) if dataset.image_shape else None,
        "conversion": conversion if isinstance(conversion, dict) else None,
        "image_size": image_size,
    }
