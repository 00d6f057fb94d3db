"""Compile and tune the training step and the evaluation, and capture the step, before training starts.

Warm-up leaves the training state unchanged. Its duration does not count as training time (`RunTimer.times`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from configs.utils.errors import UserError
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives
from train.distributed.process_group import is_data_parallel
from train.engine.cuda_graph import CapturedStep
from train.engine.epoch import set_whitening_bias_grad
from train.engine.evaluate import evaluate
from train.engine.losses import identity_mix
from train.engine.state import TrainState, optimizer_tensors
from train.engine.step import train_step
from train.optim.freeze import set_training_mode

WARM_UP_STEPS = 3  # steps before a capture: the first compiles kernels, the first two tune them
DDP_WARM_UP_STEPS = 11  # the same with DDP, which measures its first 10 by events, and rebuilds its buckets


def warm_up(state: TrainState, loader: TrainLoader, val_loader: EvalLoader | None = None, tta: str = "none") -> float:
    """Prepare the training state for the batch shapes of the loaders, and return the duration in seconds.

    No-op for a single CPU process without compilation. All ranks must call this function, and call it again after
    loading the state of the optimizer.

    DDP rebuilds its buckets after the first backward pass. The new buckets change the summation order, so running the
    first pass here keeps resumed runs bitwise identical to uninterrupted runs.

    Args:
        state: Training state.
        loader: Training loader. The step is prepared for the batch shape of each stage.
        val_loader: Evaluation loader, or None to prepare only training.
        tta: Test-time augmentation of the evaluation.

    Raises:
        UserError: The training step of the model cannot be captured.
    """
    start_s = time.perf_counter()
    if state.plan.needs_warmup or is_data_parallel(state.forward):
        if val_loader is not None:
            warm_up_evaluation(state, val_loader, tta)
        shapes = dict.fromkeys((stage.batch_images, stage.image_size) for stage in loader.stages)
        warm_up_training(state, *(blank_batch(*shape, state.device) for shape in shapes))
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
    return time.perf_counter() - start_s


def blank_batch(samples: int, image_size: int, device: torch.device) -> Batch:
    """Return a batch of black images with label 0, in the memory format of the loaders."""
    images = torch.zeros((samples, image_size, image_size, 3), dtype=torch.uint8, device=device)
    return Batch(images.permute(0, 3, 1, 2), torch.zeros(samples, dtype=torch.int64, device=device))


def check_image_sizes(state: TrainState, loader: TrainLoader, built_for: int) -> None:
    """Check that the model accepts all image sizes used in training.

    Args:
        state: Training state. The network is left in evaluation mode.
        loader: Training loader.
        built_for: Image size in pixels for which the model was built, i.e. the image size of the evaluation.

    Raises:
        UserError: The model does not accept one of the sizes.
    """
    state.network.eval()
    for stage in loader.stages:
        if stage.image_size == built_for:
            continue
        try:
            with torch.no_grad(), state.plan.autocast():
                state.network(blank_batch(1, stage.image_size, state.device).images)
        except Exception as error:  # timm models raise errors of any kind
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UserError(
                f"the model is trained on images of {stage.image_size} pixels (data.image_size, data.stages), but was "
                f"built for those of the evaluation, {built_for} pixels (eval.image_size), and does not accept both "
                f"({reason}); use sizes that it accepts or, if a timm model supports it, "
                "model.options={dynamic_img_size: true}"
            ) from None


def warm_up_training(state: TrainState, *batches: Batch) -> None:
    """Train for several steps on each batch, undo all changes, and capture the step if CUDA graphs are used.

    With accumulation, micro-steps with and without a weight update are run and captured.

    With CUDA graphs, tensors that the optimizer creates in its first step are kept and set to zero. Such tensors must
    therefore start at zero, as in torch's optimizers. On a GPU, the peak memory statistics are reset before the
    capture, since compiling and tuning need buffers that training does not need.

    Args:
        state: Training state.
        batches: One batch of each shape.

    Raises:
        UserError: The training step cannot be captured.
    """
    set_training_mode(state.forward)
    optimizer_steps = [True] if state.config.accumulation_steps == 1 else [False, True]
    with state.plan.side_stream(), preserved_state(state):
        ready = [
            _run_steps(state, identity_mix(batch) if state.plan.mixes else batch, optimizer_steps) for batch in batches
        ]
        if state.lookahead is not None:
            state.lookahead.sync(1.0)
    if state.device.type == "cuda":
        torch.cuda.empty_cache()  # a capture does so as well; here it makes the peak start without cached memory
        torch.cuda.reset_peak_memory_stats(state.device)
    if state.plan.uses_cuda_graph:
        state.captured_step = CapturedStep(state, ready, optimizer_steps)


def _run_steps(state: TrainState, batch: Batch, optimizer_steps: list[bool]) -> Batch:
    """Run each kind of micro-step in `optimizer_steps` (see `CapturedStep`) on a batch, several times.

    Returns:
        The batch that was trained on: the samples selected by the proxy, or `batch` if there is no proxy.
    """
    if state.proxy is not None:
        chosen = [state.proxy.select(batch, number) for number in range(state.config.proxy.every_steps + WARM_UP_STEPS)]
        batch = chosen[-1]
    captures_ddp = state.plan.uses_cuda_graph and is_data_parallel(state.forward)
    for epoch in {0, state.config.whiten_bias_epochs or 0}:  # with and without the gradient of the whitening bias
        set_whitening_bias_grad(state, epoch)
        for _ in range(DDP_WARM_UP_STEPS if captures_ddp else WARM_UP_STEPS):
            for optimizer_step in optimizer_steps:
                train_step(state, batch, optimizer_step=optimizer_step)
    return batch


def warm_up_evaluation(state: TrainState, loader: EvalLoader, tta: str = "none") -> None:
    """Evaluate a blank batch with the size of the loader's first batch.

    All ranks must call this function, even those without samples.
    """
    batch = blank_batch(min(loader.plan.batch_size, loader.plan.samples), loader.image_size, state.device)
    samples = collectives.sum_over_ranks(torch.tensor(len(batch.labels), device=state.device))
    evaluate(state, [batch] if len(batch.labels) else [], int(samples), tta)


@contextmanager
def preserved_state(state: TrainState) -> Iterator[None]:
    """On exit, undo all changes to the state and the random generators.

    With CUDA graphs, tensors keep their addresses.
    """
    before = [(tensor, tensor.clone()) for tensor in _changed_tensors(state)]
    captured = [part.optimizer for part in state.parts() if part.plan.uses_cuda_graph]
    # without a graph, restore all of the optimizer's state, including step counts that are plain numbers
    uncaptured = [part.optimizer for part in state.parts() if not part.plan.uses_cuda_graph]
    optimizers = [(optimizer, copy.deepcopy(optimizer.state_dict())) for optimizer in uncaptured]
    scalers = [(part.scaler, part.scaler.state_dict()) for part in state.parts()]
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    with torch.no_grad():
        for optimizer in captured:  # tensors that did not exist before start at zero
            for tensor in optimizer_tensors(optimizer):
                tensor.zero_()
        for tensor, value in before:
            tensor.copy_(value)
    for optimizer, kept in optimizers:
        optimizer.load_state_dict(kept)
    for scaler, scaler_state in scalers:
        scaler.load_state_dict(scaler_state)


def _changed_tensors(state: TrainState) -> list[torch.Tensor]:
    """Return the tensors that a step changes in place. Those of optimizers are included only with CUDA graphs."""
    tensors = [] if state.lookahead is None else list(state.lookahead.slow.values())
    for part in state.parts():
        tensors += [part.sums, *part.network.parameters(), *part.network.buffers()]
        if part.plan.uses_cuda_graph:
            tensors += optimizer_tensors(part.optimizer)
        if part.guard is not None:
            tensors += [*part.guard.last_good_buffers, part.guard.skipped]
    return tensors
