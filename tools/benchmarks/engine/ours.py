"""Our own loader and our own step as streams: nothing here is a copy of either."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from configs.schema import AugConfig, Config, DataConfig
from pipelines import build_train_loader
from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from pipelines.storage.split import load_dataset, open_split
from tools.benchmarks.engine import process_memory
from tools.benchmarks.engine.candidate import Workload
from train.build import build_all
from train.checkpoint.finetune import without_pretrained
from train.distributed.process_group import Ranks, process_group
from train.engine.epoch import TrainState
from train.engine.meter import GIB, device_memory_bytes
from train.engine.mixing import identity_mix
from train.engine.throughput import endless_batches, full_step
from train.engine.warm_up import blank_batch, warm_up, warm_up_training
from train.optim.freeze import set_training_mode

OURS = "Model Zhu"
RESIDENT = "resident batch"
PLAIN = AugConfig(crop="none", flip=0.0)
WARM_ITEMS = 4  # items after which a stream's memory has reached its size
DISTINCT_IMAGES, READ_AT_ONCE = (
    2048,
    256,
)  # images of a resident batch that differ, and the loader's batch for reading them


@contextmanager
def loading(
    data: DataConfig, aug: AugConfig, device: str, variants: dict[str, dict[str, Any]] | None = None
) -> Iterator[dict[str, Workload]]:
    """The train loader alone; variants: a stream's name and the fields of `data` that it changes.

    On a GPU the facts hold the memory that building a loader and its first batches have taken: DALI's pools, the
    buffers, a data set that is resident. The contestant before has been stopped by then, and takes none meanwhile.
    """

    def workload(changes: dict[str, Any]) -> Workload:
        details: dict[str, Any] = {}

        def batches() -> Iterator[Batch]:
            where = torch.device(device)
            before = device_memory_bytes(where) if device == "cuda" else 0
            loader = build_train_loader(data.model_copy(update=changes), aug, device=device).at(0)
            for number, batch in enumerate(endless_batches(loader), 1):
                if number == WARM_ITEMS and device == "cuda":
                    details["loader_memory_gib"] = round((device_memory_bytes(where) - before) / GIB, 4)
                yield batch

        return Workload(batches(), data.batch_size, lambda: details)

    yield {name: workload(changes) for name, changes in (variants or {"": {}}).items()}


@contextmanager
def training(config: Config, variants: dict[str, dict[str, Any]]) -> Iterator[dict[str, Workload]]:
    """The step on one resident batch, and end to end for each variant: its name and the fields of `data` it changes.

    All share one compiled network, so their ratio is the loader's doing.
    """
    with process_group(Ranks()) as device:
        built, loader = _build(config, device)
        resident = next(iter(loader))
        loader.state = {"epoch": 0, "step": 0}
        size = config.data.batch_size
        precision = str(built.amp or torch.float32).removeprefix("torch.")
        common: dict[str, Any] = {"batch_size": size, "precision": precision}
        details = dict(common)
        steps = _noting_memory(_steps(built, lambda: resident), device, details)
        workloads = {RESIDENT: Workload(steps, size, lambda: details)}
        for name, changes in variants.items():
            workloads[name] = _end_to_end(config, changes, built, common)
        yield workloads


@contextmanager
def resident(config: Config, *, synthetic: bool, limit_bytes: int | None = None) -> Iterator[dict[str, Workload]]:
    """The step on one resident batch of any size: images of the data set, repeated where they do not suffice.

    synthetic: noise instead, of data.image_size; limit_bytes: of a GPU's memory that torch may take. The facts hold the
    peak of the memory used, the loader's, which is gone by then, left out on a GPU.
    """
    process_memory.prefer_oom_kill()
    with process_group(Ranks()) as device:
        if limit_bytes is not None and device.type == "cuda":
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / whole), device)
        images, dataset = _noise(config, device) if synthetic else _images(config, device)
        size, (_, _, side, _) = config.data.batch_size, images.images.shape
        rows = torch.arange(size, device=device) % len(images.labels)
        batch = Batch(images.images.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2), images.labels[rows])
        del images, rows
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        classes = config.model.num_classes or len(dataset["classes"])
        built = build_all(without_pretrained(config), dataset, classes, side, device)
        if built.needs_warmup:
            warm_up_training(built, blank_batch(size, side, device))
        if built.mixes:
            batch = identity_mix(batch)  # what a step costs does not depend on the shares
        set_training_mode(built.forward)
        yield {
            RESIDENT: Workload(
                _steps(built, lambda: batch), size, lambda: process_memory.memory_usage(device), prefetches=False
            )
        }


def _images(config: Config, device: torch.device) -> tuple[Batch, dict[str, Any]]:
    """Some images as the config's loader gives them, and what the data set says of itself."""
    samples = len(open_split(config.data.path, config.data.train_split))
    count = min(config.data.batch_size, samples, DISTINCT_IMAGES)
    data = config.data.model_copy(update={"batch_size": min(count, READ_AT_ONCE), "prefetch": 1})
    loader = build_train_loader(data, config.aug, seed=config.seed, device=device).at(0)
    read: list[Batch] = []
    for batch in itertools.islice(endless_batches(loader), -(-count // data.batch_size)):
        read.append(Batch(batch.images.clone(), batch.labels.clone()))  # the loader's buffers are reused
    images, labels = (torch.cat(parts)[:count] for parts in zip(*read, strict=True))
    return Batch(images, labels), load_dataset(config.data.path)


def _noise(config: Config, device: torch.device) -> tuple[Batch, dict[str, Any]]:
    count, side, classes = min(config.data.batch_size, READ_AT_ONCE), config.data.image_size, config.model.num_classes
    assert side is not None
    assert classes is not None
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    dataset = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "classes": range(classes)}
    return Batch(images, torch.randint(0, classes, (count,), device=device)), dataset


def _noting_memory(items: Iterator[None], device: torch.device, details: dict[str, Any]) -> Iterator[None]:
    """Pass the items on; on a GPU note in `details` the memory once warm, that of earlier streams included."""
    for number, item in enumerate(items, 1):
        if number == WARM_ITEMS and device.type == "cuda":
            details |= {name: round(gib, 4) for name, gib in process_memory.memory_usage(device).items()}
        yield item


def _end_to_end(config: Config, changes: dict[str, Any], built: TrainState, common: dict[str, Any]) -> Workload:
    """Built when first asked for an item, so that a placement that does not fit costs only its own row."""
    loaders: list[Loader] = []
    noted = dict(common)

    def batches() -> Iterator[None]:
        data = config.data.model_copy(update=changes)
        loaders.append(build_train_loader(data, config.aug, seed=config.seed, device=built.device).at(0))
        following = endless_batches(loaders[0])
        yield from _steps(built, lambda: next(following))

    def details() -> dict[str, Any]:
        return noted | {"data_wait_s": round(sum(loader.wait_s for loader in loaders), 4)}

    return Workload(_noting_memory(batches(), built.device, noted), config.data.batch_size, details)


def _build(config: Config, device: torch.device) -> tuple[TrainState, Loader]:
    dataset = load_dataset(config.data.path)
    classes = config.model.num_classes or len(dataset["classes"])
    loader = build_train_loader(config.data, config.aug, seed=config.seed, device=device).at(0)
    built = build_all(without_pretrained(config), dataset, classes, loader.image_size, device)
    warm_up(built, loader)
    set_training_mode(built.forward)
    return built, loader


def _steps(built: TrainState, next_batch: Callable[[], Batch]) -> Iterator[None]:
    """The real training step, once per item."""
    for number in itertools.count(1):
        full_step(built, next_batch(), number, optimizer_step=True)
        yield
