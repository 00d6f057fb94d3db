"""Measure the training throughput of a config, for train/ddp.py --throughput and for tools."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch

from pipelines.loader.batches import Batch
from pipelines.loader.train_loader import TrainLoader
from train.build import Job
from train.distributed import collectives
from train.engine.cpu_settings import limit_threads
from train.engine.state import TrainState
from train.engine.step import run_step, update_averages
from train.engine.warm_up import check_image_sizes, warm_up
from train.optim.freeze import set_training_mode


def endless_batches(loader: TrainLoader) -> Iterator[Batch]:
    """Yield batches epoch after epoch, without end."""
    while True:
        yield from loader


def full_step(state: TrainState, batches: Iterator[Batch], step: int) -> None:
    """Run all micro-steps of optimizer step `step`, counted from 0, and update the moving average and Lookahead."""
    last = state.config.accumulation_steps - 1
    for micro_step in range(last + 1):
        run_step(state, next(batches), step, optimizer_step=micro_step == last)
    update_averages(state, step, None)


def measure_images_per_s(
    state: TrainState, loader: TrainLoader, world_size: int, *, warmup_steps: int = 10, seconds: float = 10.0
) -> float:
    """Return the training throughput in images/s over all ranks.

    Optimizer steps are run in groups of about one second, and the result is the throughput of the group with the median
    duration. The device is synchronized only between groups. All ranks must call this function.

    Args:
        state: Training state.
        loader: Data loader of one stage.
        world_size: Number of ranks.
        warmup_steps: Minimum number of micro-steps to run before the measurement, for compilation, caches and clocks.
            They are run twice, and the duration of the second run determines the number of steps in a group.
        seconds: Approximate duration of the measurement. At least three groups are run.

    Raises:
        UserError: The training step cannot be captured, or the data cannot be read or have changed.
    """
    warm_up(state, loader)
    set_training_mode(state.forward)
    batches = endless_batches(loader)
    accumulation = state.config.accumulation_steps
    numbers = itertools.count()  # of optimizer steps, over all groups

    def run(steps: int) -> float:
        start_s = time.perf_counter()
        for step in itertools.islice(numbers, steps):
            full_step(state, batches, step)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
        return time.perf_counter() - start_s

    warm_steps = -(-warmup_steps // accumulation)
    run(warm_steps)
    warm_s = run(warm_steps)
    # equal on all ranks, which would otherwise wait for each other forever
    steps = collectives.from_first_rank(lambda: max(1, int(warm_steps / warm_s)))
    groups = max(3, round(seconds))
    times = sorted(run(steps) for _ in range(groups))
    return steps * accumulation * loader.stage.batch_images * world_size / times[len(times) // 2]


def print_throughput(job: Job) -> None:
    """Measure the training throughput of each stage and print it on rank 0. All ranks must call this function."""
    ranks, train_loader, image_size = job.ranks, job.train_loader(), job.val_loader().image_size
    limit_threads(job.device)
    state = job.build_state(image_size, pretrained=False)
    check_image_sizes(state, train_loader, image_size)
    for stage in train_loader.stages:
        throughput = measure_images_per_s(state, train_loader.single_stage(stage), ranks.world_size)
        if ranks.is_first:
            size = f" at {stage.image_size} pixels" if len(train_loader.stages) > 1 else ""
            where = f"{ranks.world_size} x {state.device.type}"
            print(f"{job.config.name}{size}: {throughput:,.0f} images/s in training on {where}")
