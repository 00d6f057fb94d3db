"""The state that a training step reads or updates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.schema import TrainConfig
from configs.utils.warnings import warn
from models.cpu_precision import slow_precision_reason
from models.onednn import avoid_narrow_strided_convs
from pipelines.loader.batches import Batch
from train.distributed.process_group import data_parallel
from train.engine.cpu_settings import keep_freed_memory
from train.engine.losses import LossAndCounts, build_loss
from train.engine.precision import GPU_COMPILE_MODE, MAX_COMPILED_MODELS, amp_dtype, uses_cuda_graph
from train.optim.averaging import Ema, Lookahead
from train.optim.factory import make_capturable
from train.optim.nonfinite import SkipNonFinite


class SampleSelector(Protocol):
    """Selects the samples of each batch to train on; see `hard_samples`."""

    state: TrainState

    def select(self, batch: Batch, step: int) -> Batch: ...


@dataclass
class TrainState:
    """Everything a training step reads or updates.

    `network` owns the weights. `forward` is `network`, wrapped in DDP if there are several ranks. `infer` is `network`,
    compiled if train.compile enables compilation.
    """

    network: nn.Module
    forward: nn.Module  # data-parallel
    loss_and_counts: LossAndCounts  # computes the loss of `forward`, compiled
    infer: nn.Module  # for evaluation: compiled, not data-parallel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: torch.dtype | None
    config: TrainConfig
    device: torch.device
    sums: torch.Tensor  # float64 [3] on the device: loss * samples, correct, samples since the start of the epoch
    compiled: Callable[[Any], Any]  # compiles a function, or returns it unchanged
    needs_warmup: bool  # whether to compile, tune or capture the step before training
    uses_cuda_graph: bool  # whether the step is replayed as CUDA graphs
    static_grads: bool  # whether gradients keep their storage, since the graphs of all micro-steps share it
    captured_step: Callable[..., None] | None = None  # replaces train_step; same signature
    mixes: bool = False  # whether batches are MixedBatch
    guard: SkipNonFinite | None = None  # skips non-finite steps
    lookahead: Lookahead | None = None
    ema: Ema | None = None
    proxy: SampleSelector | None = None
    is_fresh_init: bool = True  # whether the weights are new, so that a whitening layer must be fitted
    notes: tuple[str, ...] = ()  # messages for the log about how the network was built

    def parts(self) -> list[TrainState]:
        """Return this state, followed by the state of the proxy if there is one."""
        return [self] if self.proxy is None else [self, self.proxy.state]

    def drop_graph(self) -> None:
        """Discard the captured step. Call this when the tensors that the step uses are replaced."""
        self.captured_step = None

    def floating_tensors(self) -> list[Tensor]:
        """Return the floating-point weights, buffers and optimizer states that are on the device.

        These include the tensors of the proxy and Lookahead's slow weights, but not the moving average.
        """
        tensors = [
            tensor
            for part in self.parts()
            for tensor in (
                *part.network.state_dict().values(),
                *_nested_tensors(list(part.optimizer.state.values())),
            )
            if tensor.is_floating_point() and tensor.device == self.sums.device
        ]
        return tensors if self.lookahead is None else [*tensors, *self.lookahead.slow.values()]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def build_state(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    device: torch.device,
    *,
    mixes: bool = False,
    trains: bool = True,
) -> TrainState:
    """Build the training state of a network, without a moving average, Lookahead or a proxy.

    Also set process-wide options, and prepare the optimizer for CUDA graphs if they are used. For training on the CPU,
    also modify convolutions that trigger a bug in oneDNN, see `models.onednn`. All ranks must call this function.

    Args:
        network: The model, on its device and in its final memory format.
        optimizer: Optimizer of the model.
        config: Config section `train`, with learning rates already scaled to the global batch size (see
            `schedule.scale_learning_rates`).
        device: Device of the network.
        mixes: Whether batches use mixup or CutMix.
        trains: Whether backward passes will be run.

    Raises:
        UserError: train.cuda_graph is "on", but CUDA graphs cannot be used.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes are static, so the fastest convolution is searched once
        torch.set_float32_matmul_precision("high")  # TF32 for operations that autocast leaves in float32
    else:
        keep_freed_memory()
    note = avoid_narrow_strided_convs(network) if trains and device.type == "cpu" else None
    amp = amp_dtype(config.amp, device)
    if device.type == "cpu" and (reason := slow_precision_reason(amp, trains)) is not None:
        warn(
            f"train.amp={config.amp} takes 2 to 1,000 times as long as float32 here, since {reason}; use train.amp=auto"
        )
    mode = config.compile if config.compile != "auto" else (GPU_COMPILE_MODE if device.type == "cuda" else "off")
    if mode != "off":
        torch._dynamo.config.recompile_limit = MAX_COMPILED_MODELS
        # As in pipelines.gpu.triton_crop_flip. Compile workers inherit the variable.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    captures = uses_cuda_graph(config, device, amp)
    if captures:
        make_capturable(optimizer, device)
        if mode == "max-autotune":
            mode = "max-autotune-no-cudagraphs"  # graphs cannot be nested
    parallel = data_parallel(network, device, config.accumulation_steps)

    def compiled(function: Any) -> Any:
        # Compile kernels for each shape, since there are few shapes and dynamic kernels are slower.
        return function if mode == "off" else torch.compile(function, mode=mode, dynamic=False)

    return TrainState(
        network=network,
        forward=parallel,
        loss_and_counts=compiled(build_loss(config, mixes)),
        infer=compiled(network),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=amp == torch.float16),
        amp=amp,
        config=config,
        device=device,
        sums=torch.zeros(3, dtype=torch.float64, device=device),
        compiled=compiled,
        needs_warmup=device.type == "cuda" or mode != "off",
        uses_cuda_graph=captures,
        static_grads=captures and config.accumulation_steps > 1,
        mixes=mixes,
        guard=SkipNonFinite(network, optimizer) if config.on_nonfinite == "skip" else None,
        notes=() if note is None else (note,),
    )


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
        if not one.uses_cuda_graph:
            one.optimizer.load_state_dict(other.optimizer.state_dict())
            continue
        for buffers in one.optimizer.state.values():  # in place, since graphs hold addresses
            for value in buffers.values():
                if isinstance(value, Tensor):
                    value.zero_()
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


def _nested_tensors(values: list[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            yield from _nested_tensors(list(value.values()) if isinstance(value, dict) else list(value))
