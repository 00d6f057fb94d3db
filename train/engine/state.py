"""The state that a training step reads or updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from configs.schema import TrainConfig
from models.cpu.onednn import avoid_narrow_strided_convs
from pipelines.loader.batches import Batch
from train.distributed.process_group import data_parallel
from train.engine.execution import ExecutionPlan
from train.engine.losses import LossAndCounts, build_loss
from train.optim.averaging import Ema, Lookahead
from train.optim.factory import make_capturable
from train.optim.nonfinite import SkipNonFinite


class SampleSelector(Protocol):
    """Selects the samples of each batch to train on; see `hard_samples`."""

    state: TrainState

    def select(self, batch: Batch, step: int) -> Batch: ...


@dataclass(kw_only=True)
class TrainState:
    """Everything a training step reads or updates: first what a checkpoint holds, then how the step runs."""

    network: nn.Module  # owns the weights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: torch.Tensor  # float64 [3] on the device: loss * samples, correct, samples since the start of the epoch
    lookahead: Lookahead | None = None
    ema: Ema | None = None
    proxy: SampleSelector | None = None  # its network, optimizer and scaler

    config: TrainConfig
    plan: ExecutionPlan
    forward: nn.Module  # `network`, data-parallel if there are several ranks
    infer: nn.Module  # `network` for evaluation: compiled as planned, not data-parallel
    loss_and_counts: LossAndCounts  # computes the loss of `forward`, compiled
    captured_step: Callable[..., None] | None = None  # replaces train_step; same signature
    guard: SkipNonFinite | None = None  # skips non-finite steps

    is_fresh_init: bool = True  # whether the weights are new, so that a whitening layer must be fitted
    notes: tuple[str, ...] = ()  # messages for the log about how the network was built

    @property
    def device(self) -> torch.device:
        return self.plan.device

    def parts(self) -> list[TrainState]:
        """Return this state, followed by the state of the proxy if there is one."""
        return [self] if self.proxy is None else [self, self.proxy.state]

    def invalidate_graphs(self) -> None:
        """Discard the captured step, since tensors that it uses were replaced. `warm_up` captures a new one."""
        self.captured_step = None

    def floating_tensors(self) -> list[Tensor]:
        """Return the floating-point weights, buffers and optimizer states that are on the device.

        These include the tensors of the proxy and Lookahead's slow weights, but not the moving average.
        """
        tensors = [
            tensor
            for part in self.parts()
            for tensor in (*part.network.state_dict().values(), *optimizer_tensors(part.optimizer))
            if tensor.is_floating_point() and tensor.device == self.sums.device
        ]
        return tensors if self.lookahead is None else [*tensors, *self.lookahead.slow.values()]


def build_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, plan: ExecutionPlan
) -> TrainState:
    """Build the training state of a network, without a moving average, Lookahead or a proxy.

    Also prepare the optimizer for CUDA graphs if they are used. For training on the CPU, also modify convolutions that
    trigger a bug in oneDNN, see `models.cpu.onednn`. All ranks must call this function.

    Args:
        network: The model, on its device and in its final memory format.
        optimizer: Optimizer of the model.
        config: Config section `train`, with learning rates already scaled to the global batch size (see
            `schedule.scale_learning_rates`).
        plan: How the steps run, see `build_plan`.
    """
    device = plan.device
    note = avoid_narrow_strided_convs(network) if plan.trains and device.type == "cpu" else None
    if plan.uses_cuda_graph:
        make_capturable(optimizer, device)
    with plan.side_stream():
        forward = data_parallel(network, device, config.accumulation_steps, config.bucket_mb)
    return TrainState(
        network=network,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=plan.amp == torch.float16),
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        config=config,
        plan=plan,
        forward=forward,
        infer=network if plan.compiles_optionally else plan.compiled(network),
        loss_and_counts=build_loss(config, plan.mixes, device, plan.compiled),
        guard=SkipNonFinite(network, optimizer) if config.on_nonfinite == "skip" else None,
        notes=tuple(one for one in (note, plan.note) if one is not None),
    )


def stop_compiling(state: TrainState) -> None:
    """Let the following steps run uncompiled, after compiling has failed."""
    state.plan = replace(state.plan, compile_mode="off", needs_warmup=False)
    state.loss_and_counts = build_loss(state.config, state.plan.mixes, state.device)


def restart_in_place(state: TrainState, fresh: TrainState) -> None:
    """Reset a training state to the start of another run, in place, so that compiled and captured steps stay valid.

    Args:
        state: Training state to reset.
        fresh: Training state with the initial weights of the new run, before any step.
    """
    for one, other in zip(state.parts(), fresh.parts(), strict=True):
        one.network.load_state_dict(other.network.state_dict())
        one.sums.zero_()
        one.scaler.load_state_dict(other.scaler.state_dict())
        if not one.plan.uses_cuda_graph:
            one.optimizer.load_state_dict(other.optimizer.state_dict())
            continue
        for tensor in optimizer_tensors(one.optimizer):  # in place, since graphs hold addresses
            tensor.zero_()
    reset_copies(state)


def reset_copies(state: TrainState) -> None:
    """Set all copies of the weights and buffers to the current values. Call this after replacing the weights.

    The copies are the moving average, Lookahead's slow weights, and the buffers that a skipped step restores.
    """
    for part in state.parts():
        if part.guard is not None:
            part.guard.start()
    if state.lookahead is not None:
        state.lookahead.start()
    if state.ema is not None:
        state.ema.start()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors in the state of an optimizer, which may be nested in lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
