"""Chosen samples of a split, by their numbers, through the loaders that training and evaluation use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from configs.schema import DataConfig, EvalConfig
from pipelines import build_eval_loader
from pipelines.loader.loader import Loader


def select_samples(loader: Loader, samples: np.ndarray) -> Loader:
    """Let every epoch of the loader be these samples, int64 [N], in their order, drawn and augmented as ever."""
    size = loader.plan.batch_size

    def indices(epoch: int, step: int) -> np.ndarray:
        return samples[step * size : (step + 1) * size]

    loader.plan = replace(loader.plan, samples=len(samples), indices=indices, prepare=None)
    return loader


def load_images(
    data: DataConfig, evaluation: EvalConfig, split: str, samples: np.ndarray, device: torch.device
) -> Tensor:
    """These samples as they are evaluated: uint8 [N, 3, H, W] on the host."""
    section = data.model_copy(update={"placement": "host"})  # not the whole split on the device for a few images
    batch = evaluation.model_copy(update={"batch_size": min(256, max(1, len(samples)))})
    loader = select_samples(build_eval_loader(section, batch, split=split, device=device), samples)
    images = [images.cpu().clone() for images, _ in loader]
    return torch.cat(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
