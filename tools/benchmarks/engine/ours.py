"""This project's data loader and training step as workloads. They run the real code, not copies of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from configs.schema import AugConfig, Config, DataConfig, EvalConfig
from pipelines import build_eval_loader, build_train_loader
from pipelines.build import open_limited
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.open import load_dataset
from pipelines.storage.dataset import ModelDataset
from tools.benchmarks.engine import process_memory
from tools.benchmarks.engine.candidate import Workload
from train.build import Job, build_all
from train.checkpoint.finetune import without_pretrained
from train.distributed.process_group import Ranks, process_group
from train.engine.losses import identity_mix
from train.engine.metrics import GIB, device_memory_bytes
from train.engine.state import TrainState
from train.engine.warm_up import blank_batch, warm_up, warm_up_training
from train.optim.freeze import set_training_mode
from train.throughput import endless_batches, full_step

OURS = "Model Zhu"  # name of our candidates
RESIDENT = "resident batch"
PLAIN = AugConfig(crop="none", flip=0.0)  # no augmentation
WARM_ITEMS = 4  # items after which memory usage is stable
Details = dict[str, object]  # additional fields of a row
Variants = Mapping[str, Mapping[str, object]]  # overrides of config section `data` by name of the workload
DISTINCT_IMAGES = 2048  # maximum number of distinct images in a resident batch; a larger batch repeats them
READ_BATCH_SIZE = 256  # batch size for reading the distinct images


@contextmanager
def loading(
    data: DataConfig, aug: AugConfig, device: str, variants: Variants | None = None
) -> Iterator[dict[str, Workload]]:
    """Build workloads that iterate over the train loader alone.

    On a GPU, the details contain the GPU memory that the loader uses once it is warm: DALI's pools, buffers and
    resident data. The value is the increase in the GPU memory used by all processes. Other candidates do not affect it,
    since they are stopped during the warm-up.

    Args:
        data: Config section `data`.
        aug: Config section `aug`.
        device: "cpu" or "cuda".
        variants: Maps the name of each workload to its overrides of `data`. If None, a single workload uses `data`
            unchanged.
    """

    def workload(changes: Mapping[str, object]) -> Workload:
        details: Details = {}

        def batches() -> Iterator[Batch]:
            torch_device = torch.device(device)
            before = device_memory_bytes(torch_device) if device == "cuda" else 0
            loader = build_train_loader(data.model_copy(update=changes), aug, device=device).single_stage()
            for number, batch in enumerate(endless_batches(loader), 1):
                if number == WARM_ITEMS and device == "cuda":
                    details["loader_memory_gib"] = round((device_memory_bytes(torch_device) - before) / GIB, 4)
                yield batch

        return Workload(batches(), data.batch_size * data.views, lambda: details)

    yield {name: workload(changes) for name, changes in (variants or {"": {}}).items()}


@contextmanager
def evaluating(data: DataConfig, evaluation: EvalConfig, device: str) -> Iterator[dict[str, Workload]]:
    """Build a workload that iterates over the evaluation loader of the train split, pass after pass."""
    loader = build_eval_loader(data, evaluation, split=data.train_split, device=device)
    yield {"": Workload(_full_batches(loader, data.batch_size), data.batch_size)}


def _full_batches(loader: EvalLoader, batch_size: int) -> Iterator[Batch]:
    while True:
        yield from (batch for batch in loader if len(batch.labels) == batch_size)


@contextmanager
def training(config: Config, variants: Variants) -> Iterator[dict[str, Workload]]:
    """Build one workload that trains on a single resident batch, plus one end-to-end training workload per variant.

    All workloads share one network and optimizer, so that they differ only in the loader.

    Args:
        config: Training config.
        variants: Maps the name of each end-to-end workload to its overrides of `config.data`.
    """
    with process_group(Ranks()) as device:
        job = Job(config, load_dataset(config.data.path, config.data.classes), Ranks(), device)
        loader = job.train_loader().single_stage()
        state = job.build_state(loader.image_size, pretrained=False)
        warm_up(state, loader)
        set_training_mode(state.forward)
        resident_batch = next(iter(loader))
        loader.position = Position(0)

        def workload(batches: Callable[[Details], Iterator[Batch]]) -> Workload:
            precision = str(state.plan.amp or torch.float32).removeprefix("torch.")
            details: Details = {"batch_size": config.data.batch_size, "precision": precision}
            steps = _with_memory(_steps(state, batches(details)), device, details)
            return Workload(steps, loader.stage.batch_images * config.train.accumulation_steps, lambda: details)

        workloads = {RESIDENT: workload(lambda details: itertools.repeat(resident_batch))}
        workloads |= {name: workload(partial(_batches, config, changes, device)) for name, changes in variants.items()}
        yield workloads


def _batches(config: Config, changes: Mapping[str, object], device: torch.device, details: Details) -> Iterator[Batch]:
    """Yield the batches of a train loader, and set `data_wait_s` in `details`.

    The loader is built when the first batch is taken, so that a failure affects only this workload.
    """
    data = config.data.model_copy(update=changes)
    loader = build_train_loader(data, config.aug, seed=config.seed, device=device, flat_views=True).single_stage()
    for batch in endless_batches(loader):
        details["data_wait_s"] = round(loader.wait_s, 4)
        yield batch


@contextmanager
def resident(config: Config, *, synthetic: bool, limit_bytes: int | None = None) -> Iterator[dict[str, Workload]]:
    """Build a workload that runs the training step on one resident batch of any size.

    The details contain the memory usage. On a GPU, the peaks exclude the loader, since the loader is freed before the
    network is built.

    Args:
        config: Training config.
        synthetic: Whether to train on noise instead of images of the data set. Noise requires data.image_size and
            model.num_classes. Either way, a limited number of images is repeated to fill the batch.
        limit_bytes: Maximum GPU memory that torch may allocate, or None for no limit.
    """
    process_memory.prefer_oom_kill()
    with process_group(Ranks()) as device:
        if limit_bytes is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
        distinct, dataset = _noise(config, device) if synthetic else _images(config, device)
        batch_size, side = config.data.batch_size, distinct.images.shape[2]
        indices = torch.arange(batch_size, device=device) % len(distinct.labels)
        images = distinct.images.permute(0, 2, 3, 1)[indices].permute(0, 3, 1, 2)  # channels last
        batch = Batch(images, distinct.labels[indices])
        del distinct, images, indices
        state = build_all(without_pretrained(config), dataset, side, device)
        if state.plan.needs_warmup:
            warm_up_training(state, blank_batch(batch_size, side, device))
        if state.plan.mixes:
            batch = identity_mix(batch)  # the cost of a step does not depend on the mixing weights
        set_training_mode(state.forward)
        steps, images_per_step = _steps(state, itertools.repeat(batch)), batch_size * config.train.accumulation_steps
        memory = partial(process_memory.memory_usage, device)
        yield {RESIDENT: Workload(steps, images_per_step, memory, prefetches=False)}


def _images(config: Config, device: torch.device) -> tuple[Batch, ModelDataset]:
    """Return up to DISTINCT_IMAGES images from the train loader of `config`, and their data set."""
    samples = len(open_limited(config.data, config.data.train_split))
    count = min(config.data.batch_size, samples, DISTINCT_IMAGES)
    data = config.data.model_copy(update={"batch_size": min(count, READ_BATCH_SIZE), "prefetch": 1})
    loader = build_train_loader(data, config.aug, seed=config.seed, device=device).single_stage()
    read: list[Batch] = []
    for batch in itertools.islice(endless_batches(loader), -(-count // data.batch_size)):
        read.append(Batch(batch.images.clone(), batch.labels.clone()))  # the loader's buffers are reused
    images, labels = (torch.cat(parts)[:count] for parts in zip(*read, strict=True))
    return Batch(images, labels), load_dataset(config.data.path, config.data.classes)


def _noise(config: Config, device: torch.device) -> tuple[Batch, ModelDataset]:
    """Return random images with random labels, and a matching stand-in for their data set."""
    side, classes = config.data.image_size, config.model.num_classes
    assert side is not None
    assert classes is not None
    count = min(config.data.batch_size, READ_BATCH_SIZE)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    dataset = ModelDataset("noise", tuple(map(str, range(classes))), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Batch(images, torch.randint(0, classes, (count,), device=device)), dataset


def _with_memory(items: Iterator[None], device: torch.device, details: Details) -> Iterator[None]:
    """Yield the items. On a GPU, add the memory usage to `details` at item WARM_ITEMS.

    The usage includes earlier workloads in this process.
    """
    for number, item in enumerate(items, 1):
        if number == WARM_ITEMS and device.type == "cuda":
            details |= {name: round(gib, 4) for name, gib in process_memory.memory_usage(device).items()}
        yield item


def _steps(state: TrainState, batches: Iterator[Batch]) -> Iterator[None]:
    """Run one optimizer step, of all its micro-steps, for each item."""
    for step in itertools.count():
        full_step(state, batches, step)
        yield
