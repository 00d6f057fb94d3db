"""Select hard samples by their losses in a proxy, a small network that is trained along with the model.

The original script, airbench96_faster (github.com/KellerJordan/cifar10-airbench), trains the proxy before the model and
stores the samples that the proxy selects in each step. Here, batches are a pure function of the step, so the proxy
selects the same samples if it is trained along with the model, and nothing needs to be stored.
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
from train.engine.execution import ExecutionPlan
from train.engine.state import TrainState, build_state
from train.engine.step import update_weights
from train.optim.factory import build_optimizer
from train.optim.freeze import set_training_mode


class HardSampleSelector:
    """Selects the samples of each batch for which the proxy's loss is highest.

    Attributes:
        state: Training state of the proxy, built from the same config section `train` as that of the model.
    """

    def __init__(self, state: TrainState, config: ProxyConfig) -> None:
        self.state = state
        self._config = config
        self._losses = state.plan.compiled(sample_losses)

    def select(self, batch: Batch, step: int) -> Batch:
        """Return the fraction train.proxy.keep of the batch with the highest losses, but at least one sample.

        If `step` is a multiple of train.proxy.every_steps, also train the proxy on these samples.

        Args:
            batch: Batch on the device.
            step: Optimizer step of the run, counted from 0.
        """
        state, learns = self.state, step % self._config.every_steps == 0
        smoothing = state.config.label_smoothing
        with torch.set_grad_enabled(learns), state.plan.autocast():
            losses = self._losses(state.forward, batch, smoothing)
        hard = losses.detach().topk(kept_samples(len(batch.labels), self._config), sorted=False).indices
        if learns:
            state.scaler.scale(losses[hard].mean()).backward()
            update_weights(state, clips=False)
        images = batch.images.permute(0, 2, 3, 1).index_select(0, hard).permute(0, 3, 1, 2)  # keeps channels_last
        return Batch(images, batch.labels.index_select(0, hard))


def sample_losses(model: nn.Module, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Return the loss of each sample, float [B]. This is a separate function, so that it can be compiled as a whole."""
    return F.cross_entropy(model(batch.images), batch.labels, label_smoothing=label_smoothing, reduction="none")


def build_proxy(
    config: TrainConfig, plan: ExecutionPlan, build: Callable[[str], nn.Module]
) -> HardSampleSelector | None:
    """Build the sample selector configured by train.proxy, or return None if train.proxy.model is not set.

    The bias of a whitening layer in the proxy is not trained.

    Args:
        config: Config section `train`.
        plan: How the steps of the model run.
        build: Function that builds a model by name, on the device and with pixel normalization.

    Raises:
        UserError: The proxy or its optimizer cannot be built with these settings.
    """
    if config.proxy.model is None:
        return None
    network = build(config.proxy.model)
    if (whitening := find_whitening(network)) is not None:
        whitening.bias.requires_grad_(False)
    # these settings refer to layers of the model, which the proxy does not have
    settings = config.optimizer.model_copy(update={"layer_decay": None, "lr_scales": {}})
    optimizer = build_optimizer(network, settings, config.lr)
    state = build_state(network, optimizer, config, plan)
    set_training_mode(state.forward)
    return HardSampleSelector(state, config.proxy)


def kept_samples(batch_size: int, config: ProxyConfig) -> int:
    return max(1, round(config.keep * batch_size))


def check_proxy(config: TrainConfig, world_size: int, mixes: bool = False) -> None:
    """Check that the settings allow a proxy to select samples. No-op if train.proxy.model is not set.

    The proxy selects from the samples of one forward pass, so that pass must cover the whole global batch. The proxy
    ranks samples by their cross-entropy, so the loss must be cross-entropy without class weights, and the samples must
    not be mixed.

    Args:
        config: Config section `train`.
        world_size: Number of ranks.
        mixes: Whether batches use mixup or CutMix.

    Raises:
        UserError: There are several ranks, several micro-steps per optimizer step, mixed samples, class weights, or a
            loss other than cross-entropy.
    """
    if config.proxy.model is None:
        return
    obstacles = {
        "aug.mix mixes them": mixes,
        f"train.loss={config.loss}": config.loss != "cross-entropy",
        "train.class_weights weights them": config.class_weights is not None,
    }
    for what, holds in obstacles.items():
        if holds:
            raise UserError(
                f"train.proxy.model={config.proxy.model} chooses whole samples by their cross-entropy, but {what}; "
                "train them with plain cross-entropy and without aug.mix, or set train.proxy.model to null"
            )
    for what, value in (("world_size", world_size), ("train.accumulation_steps", config.accumulation_steps)):
        if value > 1:
            raise UserError(
                f"train.proxy.model={config.proxy.model} selects from the samples of one forward pass, which is not "
                f"the global batch with {what}={value}; use 1 or set train.proxy.model to null"
            )
