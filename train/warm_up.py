"""What happens before the first step: kernels are compiled and chosen, first layers whitened. Changes nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from configs.schema import DataConfig, EvalConfig
from models.speedrun import fit_whitening, whitening_of
from pipelines import build_eval_loader
from pipelines.loader import Loader
from train import dist
from train.loop import Training, evaluate, train_step, train_whitening_bias
from train.optim import set_learning_rate

WHITENING_SAMPLES, WHITENING_BATCH = 5000, 1000
STEPS = 3  # of each kind: the first compiles, the second may record CUDA graphs, the third replays them


def warm_up(training: Training, train_loader: Loader, val_loader: Loader, val_samples: int, tta: str) -> None:
    """Run every kind of step and an evaluation, then put weights, optimizer and loader back as they were, bitwise."""
    trainings = _all(training)
    before = [(tensor, tensor.clone()) for tensor in _state(training)]
    scalers = [(one.scaler, one.scaler.state_dict()) for one in trainings]
    position = train_loader.state
    bias_epochs = training.config.whiten_bias_epochs
    for one in trainings:
        one.forward.train()
        set_learning_rate(one.optimizer, 0.0)  # nothing may grow beyond all bounds
    for epoch in (0, bias_epochs) if bias_epochs else (0,):
        train_whitening_bias(training, epoch)
        _steps(training, train_loader)
        train_loader.state = position
    evaluate(training, val_loader, val_samples, tta)
    with torch.no_grad():
        known = {tensor.data_ptr() for tensor, _ in before}
        for tensor in _state(training):
            if tensor.data_ptr() not in known:
                tensor.zero_()  # how every optimizer's state begins
        for tensor, value in before:
            tensor.copy_(value)
    for scaler, state in scalers:
        if state:
            scaler.load_state_dict(state)
    if training.device.type == "cuda":
        torch.cuda.synchronize(training.device)


def _steps(training: Training, loader: Loader) -> None:
    accumulation = training.config.accumulation_steps
    # the proxy has steps with and without an update
    batches = max(STEPS * accumulation, training.config.proxy.every_steps + STEPS if training.proxy else 0)
    for step, batch in enumerate(islice(loader, batches)):
        chosen = training.proxy.choose(batch, step) if training.proxy is not None else batch
        train_step(training, chosen, update=step % accumulation == accumulation - 1)
    if training.lookahead is not None:
        training.lookahead.meet(1.0)


def _all(training: Training) -> list[Training]:
    return [training, training.proxy.training] if training.proxy is not None else [training]


def _state(training: Training) -> Iterator[Tensor]:
    """Every tensor that a step or an evaluation changes."""
    for one in _all(training):
        yield one.sums
        yield from one.network.state_dict().values()
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    if training.lookahead is not None:
        yield from training.lookahead.slow.values()


def start_anew(training: Training, fresh: Training) -> None:
    """Begin another run in place, compiled steps and all, with the weights of `fresh`, which has not been stepped."""
    for one, other in zip(_all(training), _all(fresh), strict=True):
        one.network.load_state_dict(other.network.state_dict())
        one.sums.zero_()
        for state in one.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
    if training.lookahead is not None:
        training.lookahead.start()


def whitening_images(training: Training, data: DataConfig) -> Tensor | None:
    """The first train images as they are evaluated, uint8 [N, 3, H, W]; None where no layer is to be whitened."""
    if all(whitening_of(one.network) is None for one in _all(training)):
        return None
    section = data.model_copy(update={"placement": "host", "prefetch": 1})  # not the whole split on the device again
    evaluation = EvalConfig(batch_size=WHITENING_BATCH)
    loader = build_eval_loader(section, evaluation, split=data.train_split, device=training.device)
    return torch.cat([batch.images.clone() for batch in islice(loader, WHITENING_SAMPLES // WHITENING_BATCH)])


def whiten(training: Training, images: Tensor | None) -> float:
    """Whiten the first layers, equally on all ranks; returns the time it took in seconds."""
    begin = time.perf_counter()
    if images is not None:
        for one in _all(training):
            fit_whitening(one.network, images)
            dist.equalize_buffers(one.network)
        if training.lookahead is not None:
            training.lookahead.start()
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
    return time.perf_counter() - begin
