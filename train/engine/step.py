"""The training step.

With gradient accumulation, an optimizer step consists of several micro-steps. The last micro-step updates the weights.
"""

from __future__ import annotations

from contextlib import nullcontext

from torch import nn

from configs.schema import TrainConfig
from pipelines.loader.batches import Batch
from train.distributed.process_group import without_reduction
from train.engine.state import TrainState
from train.optim.schedule import Timeline

ENDLESS = 2**62  # optimizer steps of a run without a schedule


def train_step(state: TrainState, batch: Batch, *, optimizer_step: bool = True) -> None:
    """Run the forward and backward pass on one batch and, if `optimizer_step` is True, update the weights.

    Also add the loss and the counts of the batch to `state.sums`. Does not synchronize, unless fp16 or
    train.on_nonfinite=skip checks the gradients on the host.
    """
    config = state.config
    with nullcontext() if optimizer_step else without_reduction(state.forward):
        with state.plan.autocast():
            loss, counts = state.loss_and_counts(state.forward, batch, config.label_smoothing)
        state.scaler.scale(loss / config.accumulation_steps).backward()
    state.sums += counts if state.guard is None else state.guard.mask_counts(counts)
    if optimizer_step:
        update_weights(state, clips=clips_gradients(config))


def update_weights(state: TrainState, *, clips: bool) -> None:
    """Unscale, check and clip the gradients as configured, run the optimizer, and clear the gradients.

    Args:
        state: Training state, after the backward passes of an optimizer step.
        clips: Whether to clip the gradients, which requires that any kind of clipping is enabled.
    """
    scaler, optimizer, guard = state.scaler, state.optimizer, state.guard
    if clips or guard is not None:
        scaler.unscale_(optimizer)
    if guard is not None:
        guard.check()
    if clips:
        clip_gradients(state.network, state.config)
    if guard is not None:
        guard.step(scaler)
    else:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=not state.plan.static_grads)


def run_step(state: TrainState, batch: Batch, step: int, *, optimizer_step: bool) -> None:
    """Run a micro-step, by replaying a CUDA graph if the state has a captured step.

    With a proxy, the micro-step trains on the samples that the proxy selects from the batch.

    Args:
        state: Training state.
        batch: Batch on the device.
        step: Optimizer step of the run, counted from 0.
        optimizer_step: Whether to update the weights after the backward pass.
    """
    if state.proxy is not None:
        batch = state.proxy.select(batch, step)
    (state.captured_step or train_step)(state, batch, optimizer_step=optimizer_step)


def update_averages(state: TrainState, step: int, timeline: Timeline | None) -> None:
    """Update the moving average and Lookahead after optimizer step `step` of the run, counted from 0.

    `timeline` is None for steps without a schedule, such as those of a measurement. Lookahead then keeps nothing of the
    slow weights, as at the start of a run.
    """
    if state.lookahead is not None:
        state.lookahead.update(step, ENDLESS if timeline is None else timeline.total)
    if state.ema is not None:
        state.ema.update(step + 1 - (0 if timeline is None else timeline.first_step(state.config.first_epoch)))


def clips_gradients(config: TrainConfig) -> bool:
    """Return True if any kind of gradient clipping is enabled."""
    return (config.clip_grad_norm, config.clip_grad_value, config.clip_grad_adaptive) != (None, None, None)


def clip_gradients(network: nn.Module, config: TrainConfig) -> None:
    """Clip the gradients by norm, by value or adaptively, as configured. Does not synchronize.

    Adaptive clipping excludes the last linear layer, as in the paper (AGC, Brock et al., arXiv:2102.06171).
    """
    if config.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad_norm)
    elif config.clip_grad_value is not None:
        nn.utils.clip_grad_value_(network.parameters(), config.clip_grad_value)
    elif config.clip_grad_adaptive is not None:
        from timm.utils.agc import adaptive_clip_grad  # imported here, since it takes seconds

        head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        excluded = {id(parameter) for module in head for parameter in module.parameters()}
        clipped = [parameter for parameter in network.parameters() if id(parameter) not in excluded]
        adaptive_clip_grad(clipped, clip_factor=config.clip_grad_adaptive)
