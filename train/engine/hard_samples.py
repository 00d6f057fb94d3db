"""Selection of hard samples by the losses of a small proxy network, which is trained along with the model.

The published method first trains the proxy for a whole run and records the selected samples. Here, batches are a pure
function of the step, so selecting during training gives the same samples without a record.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import ProxyConfig, TrainConfig
from configs.utils.errors import UserError
from models.speedrun import find_whitening
from pipelines.loader.batches import Batch
from train.engine.state import TrainState, build_state
from train.optim.factory import build_optimizer
from train.optim.freeze import set_training_mode


class HardSampleSelector:
    """Selects the samples with the highest losses from each batch.

    Attributes:
        state: Training state of the small network, built from the same `train` section as that of the model. A training
            step of the small network can be captured, except in fp16.
    """

    def __init__(self, state: TrainState, config: ProxyConfig) -> None:
        self.state = state
        self._config = config
        self._losses = state.compiled(sample_losses)

    def select(self, batch: Batch, step: int) -> Batch:
        """Return the samples with the highest losses. Their number depends only on the batch size.

        Every few optimizer steps (train.proxy.every_steps), also train the small network on these samples.

        Args:
            batch: Batch on the device.
            step: Optimizer step of the run, from 0.
        """
        state, learns = self.state, step % self._config.every_steps == 0
        smoothing = state.config.label_smoothing
        with torch.set_grad_enabled(learns), state.autocast():
            losses = self._losses(state.forward, batch, smoothing)
        hard = losses.detach().topk(kept_samples(len(batch.labels), self._config), sorted=False).indices
        if learns:
            state.scaler.scale(losses[hard].mean()).backward()
            if state.guard is None:
                state.scaler.step(state.optimizer)
            else:
                state.scaler.unscale_(state.optimizer)
                state.guard.check()
                state.guard.step(state.scaler)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
        images = batch.images.permute(0, 2, 3, 1).index_select(0, hard).permute(0, 3, 1, 2)  # keeps channels_last
        return Batch(images, batch.labels.index_select(0, hard))


def sample_losses(model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Return the loss of each sample, float [B]. This is a function of its own so that it is compiled as a whole."""
    return F.cross_entropy(model(batch.images), batch.labels, label_smoothing=label_smoothing, reduction="none")


def build_proxy(
    config: TrainConfig, build: Callable[[str], nn.Module], device: torch.device
) -> HardSampleSelector | None:
    """Build the selector of train.proxy, or return None if train.proxy.model is not set.

    The bias of a whitening layer in the small network is not trained.

    Args:
        config: Train section.
        build: Returns the model of the given name, for raw pixels and on `device`.
        device: Device of the model.
    """
    if config.proxy.model is None:
        return None
    network = build(config.proxy.model)
    if (whitening := find_whitening(network)) is not None:
        whitening.bias.requires_grad_(False)
    # these settings refer to layers of the model, which the small network does not have
    settings = config.optimizer.model_copy(update={"layer_decay": None, "lr_scales": {}})
    optimizer = build_optimizer(network, settings, config.lr)
    state = build_state(network, optimizer, config, device)
    set_training_mode(state.forward)
    return HardSampleSelector(state, config.proxy)


def kept_samples(batch_size: int, config: ProxyConfig) -> int:
    return max(1, round(config.keep * batch_size))


def check_proxy(config: TrainConfig, world_size: int, mixes: bool = False) -> None:
    """Check that the settings allow selection by a proxy. No-op if train.proxy.model is not set.

    The selected samples must not depend on how a global batch is split, and the proxy ranks whole samples by
    cross-entropy.

    Args:
        config: Train section.
        world_size: Number of ranks.
        mixes: True if batches use mixup or CutMix.

    Raises:
        UserError: There are several ranks or micro-steps per step, mixed samples, or a loss other than cross-entropy.
    """
    if config.proxy.model is None:
        return
    for what, holds in (("aug.mix mixes them", mixes), (f"train.loss={config.loss}", config.loss != "cross-entropy")):
        if holds:
            raise UserError(
                f"train.proxy.model={config.proxy.model} chooses whole samples by their cross-entropy, but {what}; "
                "train them with cross-entropy and without aug.mix, or set train.proxy.model to null"
            )
    for what, value in (("world_size", world_size), ("train.accumulation_steps", config.accumulation_steps)):
        if value > 1:
            raise UserError(
                f"train.proxy.model={config.proxy.model} selects from the samples of one forward pass, which is not "
                f"the global batch with {what}={value}; use 1 or set train.proxy.model to null"
            )
