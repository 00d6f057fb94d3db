"""Build loaders on the CPU and compare their batches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from configs.schema import AugConfig, DataConfig, EvalConfig
from pipelines import build_eval_loader, build_train_loader
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader

NO_AUG = AugConfig(flip=0)


def data_of(folder: Path | str, batch_size: int = 24, **options: Any) -> DataConfig:
    return DataConfig(path=str(folder), **{"batch_size": batch_size, "threads": 1, **options})


def train(
    folder: Path | str,
    batch_size: int = 24,
    aug: AugConfig = NO_AUG,
    rank: int = 0,
    world_size: int = 1,
    accumulation_steps: int = 1,
    seed: int = 3,
    **options: Any,
) -> TrainLoader:
    return build_train_loader(
        data_of(folder, batch_size, **options),
        aug,
        seed=seed,
        device="cpu",
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
    )


def train_loader(folder: Path, batch_size: int = 100, accumulation_steps: int = 1) -> TrainLoader:
    """Build a training loader with crops, flips and the default number of threads."""
    return build_train_loader(
        DataConfig(path=str(folder), batch_size=batch_size),
        AugConfig(crop="pad", flip=0.5),
        seed=3,
        device="cpu",
        accumulation_steps=accumulation_steps,
    )


def evaluation(
    folder: Path | str,
    batch_size: int = 24,
    rank: int = 0,
    world_size: int = 1,
    split: str | None = None,
    config: EvalConfig | None = None,
    **options: Any,
) -> EvalLoader:
    return build_eval_loader(
        data_of(folder, batch_size, **options), config, split=split, device="cpu", rank=rank, world_size=world_size
    )


def copies(batches: Iterable[Batch]) -> list[Batch]:
    """Return clones of all batches."""
    return [Batch(images.clone(), labels.clone()) for images, labels in batches]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def merged(parts: list[list[Batch]]) -> list[Batch]:
    """Return the global batches of several ranks."""
    steps = zip(*parts, strict=True)
    return [Batch(torch.cat([b.images for b in step]), torch.cat([b.labels for b in step])) for step in steps]
