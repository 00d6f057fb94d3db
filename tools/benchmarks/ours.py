"""Our own loader and our own step as streams: nothing here is a copy of either."""

from __future__ import annotations

import gc
import time
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
from train.loop import Training
from train.throughput import endless
from train.warm_up import warm_up

RESIDENT = "resident batch"
PLAIN = AugConfig(crop="none", flip=0.0)
RAMP = (256, 512, 1024, 2048)  # batch sizes tried, as long as the rate grows
RAMP_S = 120.0  # no further size is begun after that: each has to be compiled
RAMP_STEPS = 10


@contextmanager
def loading(data: DataConfig, aug: AugConfig, device: str, seed: int = 0) -> Iterator[dict[str, Stream]]:
    """The train loader alone."""
    loader = build_train_loader(data, aug, seed=seed, device=device)
    yield {"": Stream(endless(loader), data.batch_size)}


@contextmanager
def training(config: Config, variants: dict[str, dict[str, Any]], ramp: bool = False) -> Iterator[dict[str, Stream]]:
    """The step on one resident batch, and end to end for each variant: its name and the fields of `data` it changes.

    All share one compiled network, so their ratio is the loader's doing. ramp: the batch size that trains the most
    images/s, of RAMP, instead of the config's; a size that does not fit ends the search.
    """
    with dist.process_group(Ranks()) as device:
        tried: dict[int, float] = {}
        if ramp:
            tried = dict(_ramp(config, device))
            config = _with_batch(config, max(tried, key=lambda size: tried[size]))
        built, loader = _build(config, device)
        resident = next(iter(loader))
        loader.state = {"epoch": 0, "step": 0}
        size = config.data.batch_size
        precision = str(built.amp or torch.float32).removeprefix("torch.")
        common: dict[str, Any] = {"batch_size": size, "precision": precision}
        if ramp:
            common["ramp"] = {str(number): float(f"{rate:.5g}") for number, rate in tried.items()}
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
    while True:
        built.step(built, next_batch())
        yield


def _with_batch(config: Config, batch_size: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": batch_size})})


def _ramp(config: Config, device: torch.device) -> Iterator[tuple[int, float]]:
    """(batch size, images/s on a resident batch) for growing batches, until one is no faster or does not fit."""
    best, begin = 0.0, time.monotonic()
    for size in RAMP:
        try:
            rate = _resident_rate(_with_batch(config, size), device)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            torch.compiler.reset()  # else the next size would be compiled for any size, which is slower
        yield size, rate
        if rate < 1.02 * best or time.monotonic() - begin > RAMP_S:
            break
        best = max(best, rate)
    if not best:
        raise torch.cuda.OutOfMemoryError(f"not even a batch of {RAMP[0]} fits into the memory of {device}")


def _resident_rate(config: Config, device: torch.device) -> float:
    built, loader = _build(config, device)
    batch = next(iter(loader))
    for _ in range(3):
        built.step(built, batch)
    built.sums.tolist()  # waits for the device
    begin = time.perf_counter()
    for _ in range(RAMP_STEPS):
        built.step(built, batch)
    built.sums.tolist()
    return RAMP_STEPS * config.data.batch_size / (time.perf_counter() - begin)
