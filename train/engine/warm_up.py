"""What must happen before the first step, and before the clock: compiling, tuning and capturing the step.

None of it leaves a trace in what a step changes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from configs.utils.errors import UserError
from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from pipelines.loader.train_loader import TrainLoader
from train.distributed import collectives
from train.distributed.process_group import is_data_parallel
from train.engine.cuda_graph import CapturedStep, side_stream
from train.engine.epoch import set_whitening_bias_grad
from train.engine.evaluate import evaluate
from train.engine.losses import identity_mix
from train.engine.state import TrainState
from train.engine.step import train_step
from train.optim.freeze import set_training_mode

WARM_UP_STEPS = 3  # before a capture: kernels are compiled in the first, tuned up to the second


def warm_up(state: TrainState, loader: TrainLoader, val_loader: Loader | None = None, tta: str = "none") -> float:
    """Prepare `training` for the loaders' batches; seconds that it took. One rank that compiles nothing does nothing.

    Several ranks need their first backward passes here even then: DDP lays gradients out anew after the first one, and
    how a sum over three ranks is rounded depends on that. So the first step of a resumed run is as any other.

    tta: as `evaluate` will be told. To be called again when the optimizer's state was loaded since, as
    checkpoint.restore does. Raises UserError when the model cannot be captured.
    """
    begin = time.perf_counter()
    if state.needs_warmup or is_data_parallel(state.forward):
        if val_loader is not None:
            warm_up_evaluation(state, val_loader, tta)
        shapes = dict.fromkeys((stage.plan.batch_size, stage.image_size) for stage in loader.stages)
        warm_up_training(state, *(blank_batch(*shape, state.device) for shape in shapes))
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
    return time.perf_counter() - begin


def blank_batch(samples: int, image_size: int, device: torch.device) -> Batch:
    """A batch of black images in the memory format of a loader's."""
    images = torch.zeros((samples, image_size, image_size, 3), dtype=torch.uint8, device=device)
    return Batch(images.permute(0, 3, 1, 2), torch.zeros(samples, dtype=torch.int64, device=device))


def check_image_sizes(state: TrainState, loader: TrainLoader, built_for: int) -> None:
    """Raise UserError where the model does not take the images of training, which is else found in mid-training.

    built_for: height and width in pixels that the model was built for, and is evaluated at.
    """
    state.network.eval()
    for stage in loader.stages:
        if stage.image_size == built_for:
            continue
        try:
            with torch.no_grad(), state.autocast():
                state.network(blank_batch(1, stage.image_size, state.device).images)
        except Exception as error:  # models of timm fail in every way
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise UserError(
                f"the model is trained on images of {stage.image_size} pixels (data.image_size, data.stages), but was "
                f"built for those of the evaluation, {built_for} pixels (eval.image_size), and does not take both "
                f"({reason}); use sizes that it takes or, for a model of timm that can, "
                "model.options={dynamic_img_size: true}"
            ) from None


def warm_up_training(state: TrainState, *batches: Batch) -> None:
    """Run all kinds of steps on each of `batches`, undo what they changed, and capture them where that was asked for.

    What the first step makes of the optimizer's state must start from zero, as it does in torch's optimizers.
    """
    set_training_mode(state.forward)
    updates = [True] if state.config.accumulation_steps == 1 else [False, True]
    with side_stream(state) as stream, preserved_state(state):
        ready = [_passes(state, identity_mix(batch) if state.mixes else batch, updates) for batch in batches]
        if state.lookahead is not None:
            state.lookahead.sync(1.0)
    if stream is not None:
        state.captured_step = CapturedStep(state, ready, updates, stream)


def _passes(state: TrainState, batch: Batch, updates: list[bool]) -> Batch:
    """Steps of all kinds; the batch, or what the proxy chooses of it."""
    if state.proxy is not None:
        chosen = [state.proxy.select(batch, number) for number in range(state.config.proxy.every_steps + WARM_UP_STEPS)]
        batch = chosen[-1]
    for epoch in {0, state.config.whiten_bias_epochs or 0}:  # with and without the whitening layer's bias
        set_whitening_bias_grad(state, epoch)
        for _ in range(WARM_UP_STEPS):
            for update in updates:
                train_step(state, batch, optimizer_step=update)
    return batch


def warm_up_evaluation(state: TrainState, loader: Loader, tta: str = "none") -> None:
    """Evaluate a blank batch of the loader's size; every rank must come here, also one without samples."""
    batch = blank_batch(min(loader.plan.batch_size, loader.plan.samples), loader.image_size, state.device)
    samples = collectives.sum_over_ranks(torch.tensor(len(batch.labels), device=state.device))
    evaluate(state, [batch] if len(batch.labels) else [], int(samples), tta)


@contextmanager
def preserved_state(state: TrainState) -> Iterator[None]:
    """Undo on leaving all that steps change, in place: captured graphs know tensors by their addresses."""
    before = {name: tensor.clone() for name, tensor in _tensors(state).items()}
    # where no graph knows addresses, whatever an optimizer keeps, such as counts of steps that are plain numbers
    free = [one.optimizer for one in state.parts() if not one.uses_cuda_graph]
    optimizers = [(optimizer, copy.deepcopy(optimizer.state_dict())) for optimizer in free]
    scalers = [(one.scaler, one.scaler.state_dict()) for one in state.parts()]
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the generators
        yield
    with torch.no_grad():
        for name, tensor in _tensors(state).items():
            tensor.copy_(before[name]) if name in before else tensor.zero_()
    for optimizer, kept in optimizers:
        optimizer.load_state_dict(kept)
    for scaler, scaler_state in scalers:
        scaler.load_state_dict(scaler_state)


def _tensors(state: TrainState) -> dict[Any, torch.Tensor]:
    """All that a step changes, by name; the optimizer makes some of it in its first step.

    Without a captured graph the optimizer's state is not among it.
    """
    tensors: dict[Any, torch.Tensor] = {}
    for number, one in enumerate(state.parts()):
        named = {"sums": one.sums, **dict(one.network.named_parameters()), **dict(one.network.named_buffers())}
        tensors |= {(number, name): tensor for name, tensor in named.items()}
        for index, values in enumerate(one.optimizer.state.values() if one.uses_cuda_graph else ()):
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[number, index, name] = value
        if one.guard is not None:
            tensors |= {(number, "guard", index): tensor for index, tensor in enumerate(one.guard.last_good_buffers)}
            tensors[number, "guard", "left out"] = one.guard.skipped
    slow = state.lookahead.slow if state.lookahead is not None else {}
    return tensors | {("slow", name): tensor for name, tensor in slow.items()}
