"""Load selected samples of a split as evaluation loads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.schema import DataConfig, EvalConfig
from pipelines import build_eval_loader
from pipelines.loader.eval_loader import EvalLoader


def load_images(
    data: DataConfig, evaluation: EvalConfig, split: str, samples: np.ndarray, device: torch.device
) -> Tensor:
    """Return the images of `samples` as evaluation loads them, uint8 [N, 3, H, W] on the host."""
    section = data.model_copy(update={"placement": "host"})  # avoids copying the whole split to the device
    batch = evaluation.model_copy(update={"batch_size": min(256, max(1, len(samples)))})
    loader = EvalLoader(build_eval_loader(section, batch, split=split, device=device).stage.select(samples))
    images = [images.cpu().clone() for images, _ in loader]
    return torch.cat(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
