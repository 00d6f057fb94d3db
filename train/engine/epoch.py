"""The loop over the batches of an epoch.

The loop itself synchronizes the device only at the end of the epoch. The callback `after_step` may synchronize as well,
and a step may do so in fp16 or with train.on_nonfinite=skip.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from configs.schema import TrainConfig
from models.speedrun import find_whitening
from pipelines.loader.train_loader import TrainLoader
from pipelines.rng import hash64, stream
from train.distributed.process_group import get_world_size, is_data_parallel
from train.engine.state import TrainState
from train.engine.step import run_step, update_averages
from train.optim.factory import set_learning_rate
from train.optim.freeze import set_training_mode
from train.optim.schedule import Timeline, learning_rate, lr_factor, whitening_learning_rate


@dataclass(frozen=True)
class EpochTimes:
    """Number of micro-steps, including skipped ones, and durations of one call to `train_epoch`."""

    micro_steps: int
    time_s: float
    wait_s: float  # part of time_s spent waiting for data


def build_timeline(config: TrainConfig, loader: TrainLoader) -> Timeline:
    """Return the timeline of a run with this loader.

    If the batch size differs between stages and train.lr_batch_size is set, the timeline contains learning rate factors
    according to train.lr_scaling.

    Args:
        config: Config section `train`, as returned by `schedule.scale_learning_rates`.
        loader: Data loader of the run.
    """
    accumulation = config.accumulation_steps
    stages = [loader.at(epoch) for epoch in range(config.epochs)]
    factors = tuple(
        lr_factor(config, stage.plan.batch_size * get_world_size() * accumulation) if len(loader.stages) > 1 else 1.0
        for stage in stages
    )
    steps = tuple(len(stage) // accumulation for stage in stages)
    return Timeline(steps, factors if set(factors) != {1.0} else ())


def train_epoch(
    state: TrainState,
    loader: TrainLoader,
    *,
    seed: int,
    rank: int,
    after_step: Callable[[int, float], None],
    timeline: Timeline | None = None,
    decays: int = 0,
    skip_steps: Collection[int] = (),
) -> EpochTimes:
    """Train from the loader's position to the end of the epoch, and return the durations.

    The default random generator of the device, which dropout uses, is seeded for each batch. A resumed run therefore
    draws the same numbers as an uninterrupted run.

    Args:
        state: Training state.
        loader: Data loader, at the position to start from.
        seed: Seed of the run.
        rank: Rank of this process.
        after_step: Called as after_step(step, lr) after each optimizer step, with the index of the step in the run,
            counted from 0, and its learning rate.
        timeline: Timeline of the run, or None to build it from the loader.
        decays: Number of decays of the plateau schedule so far.
        skip_steps: Optimizer steps of the run to skip, counted from 0. `after_step` is not called for these steps.

    Raises:
        UserError: The data cannot be read or have changed.
    """
    set_training_mode(state.forward)
    set_whitening_bias_grad(state, loader.position.epoch)
    on_gpu = state.device.type == "cuda"
    accumulation = state.config.accumulation_steps
    timeline = timeline or build_timeline(state.config, loader)
    epoch, first, batches = loader.position.epoch, loader.position.step, len(loader)
    # torch.manual_seed, which seeds all devices, and one hash per batch would take 0.15 ms per batch
    generator = torch.cuda.default_generators[state.device.index] if on_gpu else torch.default_generator
    seeds = hash64(np.arange(batches, dtype=np.uint64) ^ stream(seed, epoch, f"torch-{rank}")) >> np.uint64(1)
    start_s, wait_s = time.perf_counter(), loader.wait_s
    for index, batch in enumerate(loader, first):
        step, micro_step = timeline.first_step(epoch) + index // accumulation, index % accumulation
        if step in skip_steps:
            continue
        lr = learning_rate(step, timeline, state.config, decays)
        whitening_lr = whitening_learning_rate(step, timeline, state.config, decays)
        for part in state.parts():
            set_learning_rate(part.optimizer, lr, whitening_lr)
        generator.manual_seed(int(seeds[index]))
        is_last = micro_step == accumulation - 1
        run_step(state, batch, step, optimizer_step=is_last)
        if is_last:
            update_averages(state, step, timeline)
            after_step(step, lr)
    if on_gpu:
        torch.cuda.synchronize(state.device)  # once per epoch, so that the measured time is complete
    return EpochTimes(batches - first, time.perf_counter() - start_s, loader.wait_s - wait_s)


def set_whitening_bias_grad(state: TrainState, epoch: int) -> None:
    """Let the bias of a whitening layer require a gradient only before epoch train.whiten_bias_epochs.

    The learning rate of the bias is 0 from this epoch on, so skipping the gradient only saves the time to sum it over
    the largest activations. No-op with DDP or CUDA graphs, which need the same gradients in every step. Also a no-op if
    the bias is frozen or train.whiten_bias_epochs is not set.
    """
    whitening, epochs = find_whitening(state.network), state.config.whiten_bias_epochs
    if whitening is None or epochs is None or not is_trained(whitening.bias, state.optimizer):
        return
    if not state.plan.uses_cuda_graph and not is_data_parallel(state.forward):
        whitening.bias.requires_grad_(epoch < epochs)


def is_trained(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a group of the optimizer contains the parameter. Frozen parameters are in none of the groups."""
    return any(parameter is one for group in optimizer.param_groups for one in group["params"])
