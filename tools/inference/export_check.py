"""Compare the logits of an exported model with the checkpoint's, in batches of several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from configs.utils.errors import UserError
from configs.utils.files import is_url
from pipelines import build_eval_loader
from tools.inference.export_formats import PredictFunction
from train.trained_model import TrainedModel

BATCH_SIZES = (1, 7, 64)  # reveals a batch size that was traced as a constant
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ExpectedLogits:
    """Images, and the checkpoint's logits for them. Every export format must reproduce these logits."""

    images: Tensor  # uint8 [N, 3, H, W]
    logits: Tensor  # float32 [N, classes], of the checkpoint's model
    kind: str  # name of the split, or "random pixels"
    source: str  # description of the images for messages, with the data set's folder

    @property
    def max_abs(self) -> float:
        """Largest absolute logit."""
        return float(self.logits.abs().max())


@dataclass(frozen=True)
class Comparison:
    """Differences between an exported model's logits and the expected ones."""

    max_difference: float  # over all logits
    same_top1: int  # number of images with the same predicted class


def expected_logits(trained: TrainedModel, data_path: str | None, samples: int) -> ExpectedLogits:
    """Return the checkpoint's logits for the first `samples` images of the run's validation split.

    The images are read from the data set in `data_path`. If `data_path` is None, they are read from the run's data set,
    or are random if that data set does not exist.

    Raises:
        UserError: The data set cannot be read, or a logit is not finite.
    """
    path = data_path or trained.config.data.path
    if data_path is not None or is_url(path) or Path(path).exists():
        images = first_images(trained, path, samples)
        kind = trained.config.data.val_split
        source = f"{len(images)} images of split {kind!r} of {path}"
    else:
        size = (samples, 3, trained.dataset.image_size, trained.dataset.image_size)
        images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        kind = "random pixels"
        source = f"{samples} images of random pixels, since there is no data set in {path} (see --data-path)"
    with torch.inference_mode():
        logits = torch.cat([trained.state.network(batch) for batch in images.split(64)])
    if not logits.isfinite().all():
        raise UserError(f"{trained.path} gives logits that are not finite (a diverged run?); use another checkpoint")
    return ExpectedLogits(images, logits.float(), kind, source)


def first_images(trained: TrainedModel, path: str, samples: int) -> Tensor:
    data = trained.eval_data_config(path).model_copy(update={"placement": "auto", "batch_size": 64})
    evaluation = trained.config.eval.model_copy(update={"batch_size": None})
    parts: list[Tensor] = []
    for images, _ in build_eval_loader(data, evaluation, device=CPU):
        parts.append(images.clone())  # the loader reuses its buffers
        if sum(map(len, parts)) >= samples:
            break
    return torch.cat(parts)[:samples]


def compare_logits(predict: PredictFunction, expected: ExpectedLogits) -> Comparison:
    """Compare the logits of `predict` with the expected ones.

    Batch sizes cycle through BATCH_SIZES, and memory formats alternate between contiguous and channels_last. Raises
    ValueError if the logits are not float32 or have a different shape than expected.
    """
    parts: list[Tensor] = []
    start, sizes = 0, cycle(BATCH_SIZES)
    while start < len(expected.images):
        strides = torch.channels_last if len(parts) % 2 else torch.contiguous_format
        batch = expected.images[start : start + next(sizes)].contiguous(memory_format=strides)
        with torch.inference_mode():
            parts.append(predict(batch))
        start += len(batch)
    logits = torch.cat(parts)
    if logits.shape != expected.logits.shape or logits.dtype != torch.float32:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, not float32 {list(expected.logits.shape)}")
    return Comparison(
        max_difference=float((logits - expected.logits).abs().max()),
        same_top1=int((logits.argmax(1) == expected.logits.argmax(1)).sum()),
    )
