"""Measure the training throughput of a config, for train/ddp.py --throughput and for tools."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from configs.schema import Config
from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives
from train.distributed.process_group import Ranks
from train.engine.state import TrainState
from train.engine.step import run_step, update_averages
from train.engine.warm_up import warm_up
from train.optim.freeze import set_training_mode


def endless_batches(loader: Loader) -> Iterator[Batch]:
    """Yield batches epoch after epoch, without end."""
    while True:
        yield from loader


def full_step(state: TrainState, batch: Batch, step: int, *, optimizer_step: bool) -> None:
    """Run a micro-step and, if `optimizer_step` is True, update the moving average and Lookahead.

    `step` is the optimizer step, counted from 0.
    """
    run_step(state, batch, step, optimizer_step=optimizer_step)
    if optimizer_step:
        update_averages(state, step, None)


def measure_images_per_s(
    state: TrainState, loader: Loader, world_size: int, *, warmup_steps: int = 10, seconds: float = 10.0
) -> float:
    """Return the training throughput in images/s over all ranks.

    Micro-steps are run in groups of about one second, and the result is the throughput of the group with the median
    duration. The device is synchronized only between groups. All ranks must call this function.

    Args:
        state: Training state.
        loader: Data loader of one stage.
        world_size: Number of ranks.
        warmup_steps: Minimum number of micro-steps to run before the measurement, for compilation, caches and clocks.
            They are run twice, and the duration of the second run determines the number of micro-steps in a group.
        seconds: Approximate duration of the measurement. At least three groups are run.

    Raises:
        UserError: The training step cannot be captured, or the data cannot be read or have changed.
    """
    warm_up(state, loader)
    set_training_mode(state.forward)
    batches = endless_batches(loader)
    batch_size, accumulation = 0, state.config.accumulation_steps
    numbers = itertools.count()  # of micro-steps, over all groups

    def run(steps: int) -> float:
        nonlocal batch_size
        start_s = time.perf_counter()
        for _ in range(steps):
            batch = next(batches)
            batch_size = len(batch.labels)
            step, micro_step = divmod(next(numbers), accumulation)
            full_step(state, batch, step, optimizer_step=micro_step == accumulation - 1)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
        return time.perf_counter() - start_s

    warmup_steps = -(-warmup_steps // accumulation) * accumulation  # whole optimizer steps, as in each group
    run(warmup_steps)
    warm_s = run(warmup_steps)
    # equal on all ranks, which would otherwise wait for each other forever
    optimizer_steps = collectives.from_first_rank(lambda: max(1, int(warmup_steps / warm_s / accumulation)))
    steps = optimizer_steps * accumulation
    groups = max(3, round(seconds))
    times = sorted(run(steps) for _ in range(groups))
    return steps * batch_size * world_size / times[len(times) // 2]


def print_throughput(config: Config, state: TrainState, train_loader: TrainLoader, ranks: Ranks) -> None:
    """Measure the training throughput of each stage and print it on rank 0. All ranks must call this function."""
    for stage in train_loader.stages:
        throughput = measure_images_per_s(state, stage, ranks.world_size)
        if ranks.is_first:
            size = f" at {stage.image_size} pixels" if len(train_loader.stages) > 1 else ""
            where = f"{ranks.world_size} x {state.device.type}"
            print(f"{config.name}{size}: {throughput:,.0f} images/s in training on {where}")
