"""Fit whitening layers, the first layers of speedrun models, to training images."""

from __future__ import annotations

import copy
import time
from itertools import islice

import torch
from torch import Tensor

from configs.schema import DataConfig, EvalConfig
from models.speedrun import find_whitening, fit_whitening
from pipelines import build_eval_loader
from train.distributed import collectives
from train.engine.state import TrainState, reset_copies

WHITENING_SAMPLES, WHITENING_BATCH = 5000, 1000


def whitening_images(state: TrainState, data: DataConfig) -> Tensor | None:
    """Load the first training images, without augmentation.

    On a GPU, also compute the whitening once and discard the result. This first eigendecomposition of the process loads
    cuSOLVER, so the duration of `whiten` does not include the loading.

    Returns:
        At most WHITENING_SAMPLES images, uint8 [N, 3, H, W] on the device, or None if neither the model nor the proxy
        has a whitening layer.

    Raises:
        UserError: The data cannot be read or have changed.
    """
    if all(find_whitening(one.network) is None for one in state.parts()):
        return None
    section = data.model_copy(update={"placement": "host", "prefetch": 1})  # the split may already be on the device
    evaluation = EvalConfig(batch_size=WHITENING_BATCH)
    loader = build_eval_loader(
        section, evaluation, split=data.train_split, device=state.device, replace_bad_samples=True
    )
    images = torch.cat([batch.images.clone() for batch in islice(loader, WHITENING_SAMPLES // WHITENING_BATCH)])
    if state.device.type == "cuda":
        for one in state.parts():
            if (whitening := find_whitening(one.network)) is not None:
                copy.deepcopy(whitening).fit(one.network.get_submodule("normalize")(images))
        torch.cuda.synchronize(state.device)
    return images


def whiten(state: TrainState, images: Tensor | None) -> float:
    """Fit the whitening layers of newly initialized networks, and return the duration in seconds.

    Networks whose weights were loaded keep their whitening. Afterwards, all buffers are equal on all ranks, and the
    moving average and Lookahead restart at the current weights. All ranks must call this function.

    Args:
        state: Training state.
        images: Images returned by `whitening_images`, or None to do nothing.
    """
    start_s = time.perf_counter()
    if images is not None:
        for one in state.parts():
            if one.is_fresh_init:
                fit_whitening(one.network, images)
            collectives.broadcast_buffers(one.network)
        reset_copies(state)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
    return time.perf_counter() - start_s
