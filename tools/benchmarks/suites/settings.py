"""Settings and deadline of a benchmark run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tools.benchmarks.engine.interleaved import OUT_OF_TIME


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark run."""

    device: str  # "cpu" or "cuda"
    scratch: Path  # folder for the peers' files, deleted at the end
    data: Path  # folder for generated data sets
    small: Path | None = None  # converted 32x32 data set
    medium: Path | None = None  # converted 96x96 data set
    source: Path | None = None  # raw CIFAR-10, used if `small` does not exist
    reference: Path | None = None  # checkout of cifar10-airbench
    seconds: float = 0.5
    rounds: int = 5
    workers: tuple[int, ...] = ()  # worker processes or threads of the peers to try, or empty for the default
    seeds: int = 10  # runs of each speedrun
    epochs: int | None = None  # epochs of the runs to a target accuracy, or None for those of the configs
    samples: int | None = None  # samples of generated data sets, or None for the device's default
    only: tuple[str, ...] = ()  # stages to measure, or empty for all
    deadline: float | None = None  # end of the run or the current part, as a time.monotonic() value
    part_s: float | None = None  # time limit of each part


def is_out_of_time(settings: Settings, needed_s: float = 0.0) -> bool:
    return settings.deadline is not None and time.monotonic() + needed_s > settings.deadline


def check_time(settings: Settings, needed_s: float = 0.0) -> None:
    """Raise TimeoutError if fewer than `needed_s` seconds are left until the deadline."""
    if is_out_of_time(settings, needed_s):
        raise TimeoutError(OUT_OF_TIME)
