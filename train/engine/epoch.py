"""The optimizer steps of an epoch."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
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
    """Number of micro-steps and durations of one call to `train_epoch`."""

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


def training_steps(
    state: TrainState,
    loader: TrainLoader,
    *,
    seed: int,
    rank: int = 0,
    timeline: Timeline | None = None,
    decays: int = 0,
    skip_steps: Collection[int] = (),
    end: int | None = None,
) -> Iterator[tuple[int, float]]:
    """Train from the loader's position to the end of the epoch, and yield after each optimizer step.

    The default random generator of the device, which dropout uses, is seeded for each batch. A resumed run therefore
    draws the same numbers as an uninterrupted run. The device is synchronized only at the end of the epoch, unless a
    step checks its gradients on the host (fp16, train.on_nonfinite=skip).

    Args:
        state: Training state.
        loader: Data loader, at the position to start from.
        seed: Seed of the run.
        rank: Rank of this process.
        timeline: Timeline of the run, or None to build it from the loader.
        decays: Number of decays of the plateau schedule so far.
        skip_steps: Optimizer steps of the run to skip, counted from 0.
        end: Number of optimizer steps of the run after which to stop within the epoch, or None.

    Yields:
        The optimizer step of the run, counted from 0, and its learning rate. Skipped steps are not yielded.

    Raises:
        UserError: The data cannot be read or have changed.
    """
    set_training_mode(state.forward)
    set_whitening_bias_grad(state, loader.position.epoch)
    on_gpu = state.device.type == "cuda"
    accumulation = state.config.accumulation_steps
    timeline = timeline or build_timeline(state.config, loader)
    epoch, first = loader.position.epoch, loader.position.step
    # torch.manual_seed, which seeds all devices, and one hash per batch would take 0.15 ms per batch
    generator = torch.cuda.default_generators[state.device.index] if on_gpu else torch.default_generator
    seeds = hash64(np.arange(len(loader), dtype=np.uint64) ^ stream(seed, epoch, f"torch-{rank}")) >> np.uint64(1)
    for index, batch in enumerate(loader, first):
        step, micro_step = timeline.first_step(epoch) + index // accumulation, index % accumulation
        if step == end:
            break
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
            yield step, lr
    if on_gpu:
        torch.cuda.synchronize(state.device)  # so that the measured time of the epoch is complete


def train_epoch(state: TrainState, loader: TrainLoader, *, seed: int, rank: int = 0) -> EpochTimes:
    """Run the optimizer steps of `training_steps` without logs or checkpoints, and return their durations."""
    micro_steps = len(loader) - loader.position.step
    start_s, wait_s = time.perf_counter(), loader.wait_s
    for _ in training_steps(state, loader, seed=seed, rank=rank):
        pass
    return EpochTimes(micro_steps, time.perf_counter() - start_s, loader.wait_s - wait_s)


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
