"""The loop over the batches of an epoch. Nothing here waits for the device between log lines."""

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
    """Host times of one epoch, or of the rest of it after a resume."""

    micro_steps: int
    time_s: float
    wait_s: float  # of it, for data


def build_timeline(config: TrainConfig, loader: TrainLoader) -> Timeline:
    """Of a run with this loader; config: with learning rates at the global batch, see `schedule.scaled`.

    Where stages change the batch size, learning rates follow it as train.lr_scaling says.
    """
    accumulation = config.accumulation_steps
    loaders = [loader.at(epoch) for epoch in range(config.epochs)]
    factors = tuple(
        lr_factor(config, one.plan.batch_size * get_world_size() * accumulation) if len(loader.stages) > 1 else 1.0
        for one in loaders
    )
    updates = tuple(len(one) // accumulation for one in loaders)
    return Timeline(updates, factors if set(factors) != {1.0} else ())


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
    """Train the rest of the loader's epoch; after_update(update, lr) follows every optimizer update, counted from 0.

    timeline: of the whole run; None: all epochs are as long as this one. decays: of schedule plateau so far.
    passed_over: updates that are not made, nor followed by anything.

    Dropout and the like draw from torch's generator, which is seeded for each batch: a resumed run draws the same.
    """
    set_training_mode(state.forward)
    set_whitening_bias_grad(state, loader.state["epoch"])
    on_gpu = state.device.type == "cuda"
    accumulation = state.config.accumulation_steps
    timeline = timeline or build_timeline(state.config, loader)
    epoch, first, steps = loader.state["epoch"], loader.state["step"], len(loader)
    # torch.manual_seed, which seeds all devices, and a hash at every batch would cost 0.15 ms per batch
    generator = torch.cuda.default_generators[state.device.index] if on_gpu else torch.default_generator
    seeds = hash64(np.arange(steps, dtype=np.uint64) ^ stream(seed, epoch, f"torch-{rank}")) >> np.uint64(1)
    begin, waited = time.perf_counter(), loader.wait_s
    for step, batch in enumerate(loader, first):
        update, micro = timeline.first(epoch) + step // accumulation, step % accumulation
        if update in skip_steps:
            continue
        lr = learning_rate(update, timeline, state.config, decays)
        whitening_lr = whitening_learning_rate(update, timeline, state.config, decays)
        for one in state.parts():
            set_learning_rate(one.optimizer, lr, whitening_lr)
        generator.manual_seed(int(seeds[step]))
        last = micro == accumulation - 1
        run_step(state, batch, update, optimizer_step=last)
        if last:
            update_averages(state, update, timeline)
            after_step(update, lr)
    if on_gpu:
        torch.cuda.synchronize(state.device)  # once per epoch, so that its time is its own
    return EpochTimes(steps - first, time.perf_counter() - begin, loader.wait_s - waited)


def set_whitening_bias_grad(state: TrainState, epoch: int) -> None:
    """Take the bias of a whitening layer out of the backward pass after `whiten_bias_epochs`.

    Its learning rate is 0 then anyhow, so that this only saves time: the gradient of the largest activations. DDP and
    captured graphs expect the same gradients in every step, and keep it.
    """
    whitening, epochs = find_whitening(state.network), state.config.whiten_bias_epochs
    if whitening is None or epochs is None or not is_trained(whitening.bias, state.optimizer):
        return
    if not state.uses_cuda_graph and not is_data_parallel(state.forward):
        whitening.bias.requires_grad_(epoch < epochs)


def is_trained(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer changes it: model.freeze holds for the whole run."""
    return any(parameter is one for group in optimizer.param_groups for one in group["params"])
