"""The task of a peer: a converted data set, a scratch folder, and the settings that all loaders share."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.schema import AugConfig, EvalConfig
from pipelines.open import open_split
from pipelines.storage.dataset import ChannelValues
from pipelines.storage.split import Split
from tools.benchmarks.engine.datasets import QUALITY, SPLIT, labels_or_zeros, make_variant

Batch = tuple[torch.Tensor, torch.Tensor]  # images [B, ...] and labels [B]
Batches = Iterator[Batch]


@lru_cache(maxsize=2)
def _opened(folder: Path) -> Split:
    """Open the train split of a data set, or return it from a cache.

    PeerTask does not store the split, since tasks are pickled and memory maps cannot be.
    """
    return open_split(folder, SPLIT)


@dataclass(frozen=True)
class PeerTask:
    """Data set and settings for a peer's loader."""

    folder: Path
    scratch: Path
    batch_size: int
    image_size: int  # after augmentation, in pixels
    aug: AugConfig | None = None  # or None to only read and decode
    device: str = "cpu"
    evaluation: EvalConfig | None = None  # resize and crop as in evaluation, instead of `aug`
    workers: int = 1  # processes or threads

    @property
    def split(self) -> Split:
        return _opened(self.folder)

    @property
    def encoding(self) -> str:
        return self.split.encoding

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def labels(self) -> np.ndarray:
        """Labels of the train split, int64 [samples]. All are 0 if the split has no labels."""
        return labels_or_zeros(self.split)

    @property
    def stats(self) -> tuple[ChannelValues, ChannelValues]:
        """Mean and standard deviation of each color channel, for pixels scaled to the range 0 to 1."""
        return self.split.dataset.mean, self.split.dataset.std

    @property
    def resized_side(self) -> int:
        """Shorter side in pixels to which an evaluation resizes an image before the center crop."""
        return round(self.image_size / (self.evaluation or EvalConfig()).crop_fraction)

    def jpeg_file(self, index: int) -> bytes:
        """Return the stored file of a sample of a JPEG split."""
        return self.split.image_bytes(index).tobytes()

    def pil_image(self, index: int) -> Image.Image:
        if self.encoding == "npy":
            return Image.fromarray(self.pixels(index))
        return Image.open(io.BytesIO(self.jpeg_file(index))).convert("RGB")

    def pixels(self, index: int) -> np.ndarray:
        """Return the decoded pixels of a sample, uint8 [H, W, 3]."""
        if self.encoding != "npy":
            return np.asarray(self.pil_image(index))
        height, width = self.split.image_size(index)
        return self.split.image_bytes(index)[-height * width * 3 :].reshape(height, width, 3)

    def file(self, ending: str) -> Path:
        """Return the path for a peer's copy of this split in the scratch folder, with the given ending."""
        return self.scratch / f"{self.folder.name}-{self.encoding}-{QUALITY}{ending}"

    def shards_for_workers(self) -> Split:
        """Return the split for libraries that assign whole shards to workers.

        If an npy split has fewer shards than workers, return a copy with smaller shards instead (see `make_variant`).
        """
        if len(self.split.files) >= self.workers or self.encoding != "npy":
            return self.split
        out = self.file("-shards")
        return open_split(out if (out / "dataset.json").exists() else make_variant(self.folder, out), SPLIT)


def endless(batches: Iterable[Batch], device: str) -> Batches:
    """Yield the batches of a loader epoch after epoch.

    If `device` is "cuda", batches are copied to the GPU. The host does not wait for copies from pinned memory.
    """
    while True:
        for images, labels in batches:
            if device == "cuda":
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            else:
                yield images, labels
