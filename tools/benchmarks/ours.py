"""Our own loader and our own step as streams: nothing here is a copy of either."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from configs.schema import AugConfig, Config, DataConfig
from pipelines import build_train_loader
from pipelines.loader import Batch, Loader
from pipelines.shards import load_dataset
from tools.benchmarks.turns import Stream
from train import dist
from train.ddp import build_all
from train.dist import Ranks
from train.loop import Training, run_step
from train.throughput import endless
from train.warm_up import warm_up

RESIDENT = "resident batch"
PLAIN = AugConfig(crop="none", flip=0.0)


@contextmanager
def loading(data: DataConfig, aug: AugConfig, device: str, seed: int = 0) -> Iterator[dict[str, Stream]]:
    """The train loader alone."""
    loader = build_train_loader(data, aug, seed=seed, device=device)
    yield {"": Stream(endless(loader), data.batch_size)}


@contextmanager
def training(config: Config, variants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Stream]]:
    """The step on one resident batch, and end to end for each variant: its name and the fields of `data` it changes.

    All share one compiled network, so their ratio is the loader's doing.
    """
    with dist.process_group(Ranks()) as device:
        built, loader = _build(config, device)
        resident = next(iter(loader))
        loader.state = {"epoch": 0, "step": 0}
        size = config.data.batch_size
        precision = str(built.amp or torch.float32).removeprefix("torch.")
        common: dict[str, Any] = {"batch_size": size, "precision": precision}
        streams = {RESIDENT: Stream(_steps(built, lambda: resident), size, lambda: common)}
        for name, changes in variants.items():
            streams[name] = _end_to_end(config, changes, built, common)
        yield streams


def _end_to_end(config: Config, changes: dict[str, Any], built: Training, common: dict[str, Any]) -> Stream:
    """Built when first asked for an item, so that a placement that does not fit costs only its own row."""
    loaders: list[Loader] = []

    def batches() -> Iterator[None]:
        data = config.data.model_copy(update=changes)
        loaders.append(build_train_loader(data, config.aug, seed=config.seed, device=built.device))
        following = endless(loaders[0])
        yield from _steps(built, lambda: next(following))

    def facts() -> dict[str, Any]:
        return common | {"data_wait_s": round(sum(loader.wait_s for loader in loaders), 4)}

    return Stream(batches(), config.data.batch_size, facts)


def _build(config: Config, device: torch.device) -> tuple[Training, Loader]:
    dataset = load_dataset(config.data.path)
    classes = config.model.num_classes or len(dataset["classes"])
    loader = build_train_loader(config.data, config.aug, seed=config.seed, device=device)
    built = build_all(config, dataset, classes, loader.image_size, device)
    warm_up(built, loader)
    built.forward.train()
    return built, loader


def _steps(built: Training, next_batch: Callable[[], Batch]) -> Iterator[None]:
    """The real training step, once per item."""
    for number in itertools.count():
        run_step(built, next_batch(), number, updates=True)
        yield
