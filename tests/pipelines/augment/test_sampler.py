"""The DALI graph and the CPU graph give the same training batches for the same draws, on photos.

The DALI graph, which training uses on a GPU, runs on the CPU here, with inputs converted from the draws.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import (
    AugConfig,
    AutoAugmentConfig,
    BlurConfig,
    ColorJitterConfig,
    DataConfig,
    EraseConfig,
    PaddingMode,
)
from helpers.backends import use_dali
from helpers.photos import converted, photos
from pipelines import build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.train_loader import TrainLoader

BATCH, SIZE, STEPS = 24, 48, 3
EVERYTHING = AugConfig(
    crop="random-resized",
    flip=0.5,
    flip_mode="alternating",
    auto=AutoAugmentConfig(policy="rand-m9-mstd0.5-inc1", fill="mean"),
    color_jitter=ColorJitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8),
    grayscale=0.2,
    blur=BlurConfig(probability=0.5),
    erase=EraseConfig(probability=0.5, fill="random"),
    cutout=9,
)
AUGS = {
    "everything": EVERYTHING,
    "reflected": EVERYTHING.model_copy(update={"crop": "pad", "padding_mode": PaddingMode.REFLECT}),
    "padded": EVERYTHING.model_copy(update={"crop": "pad", "erase": EraseConfig(probability=0.5, fill="mean")}),
    "uncropped": EVERYTHING.model_copy(update={"crop": "none", "flip_mode": "random"}),
}
# Mean grey levels of an image. Equalize, solarize and auto-contrast amplify a difference of one level.
OF_MOST_IMAGES, OF_ANY_IMAGE = 0.4, 12.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return data sets of 72 images: npy of 61x80, and jpeg of several sizes, some smaller than SIZE."""
    several = photos(160, 240, 24) + photos(40, 41, 24) + photos(97, 48, 24)
    folder = tmp_path_factory.mktemp("sets")
    return {
        "npy": converted(folder / "npy" / "tiny", photos(61, 80, STEPS * BATCH), "npy"),
        "jpeg": converted(folder / "jpeg" / "tiny", several, "jpeg"),
    }


@lru_cache
def loaders(folder: Path, name: str) -> tuple[TrainLoader, TrainLoader]:
    """Return a loader with the DALI graph, as on a GPU, and one with the CPU graph."""
    data = DataConfig(path=str(folder), batch_size=BATCH, image_size=SIZE, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        use_dali(patch)
        dalis = build_train_loader(data, AUGS[name], seed=7, device="cpu")
    return dalis, build_train_loader(data, AUGS[name], seed=7, device="cpu")


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(0, 1000), st.integers(0, STEPS - 1))
@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
@pytest.mark.parametrize("name", AUGS)
def test_dali_and_cpu_graph_give_same_batches(
    name: str, encoding: str, folders: dict[str, Path], epoch: int, step: int
) -> None:
    batches = []
    for loader in loaders(folders[encoding], name):
        loader.position = Position(epoch, step)
        images, labels = next(iter(loader))
        batches.append((images.permute(0, 2, 3, 1).numpy().astype(int), labels))
    (dalis, dalis_labels), (own, own_labels) = batches
    assert torch.equal(dalis_labels, own_labels)
    of_images = np.abs(dalis - own).mean(axis=(1, 2, 3))
    assert np.quantile(of_images, 0.75) < OF_MOST_IMAGES
    assert of_images.max() < OF_ANY_IMAGE
