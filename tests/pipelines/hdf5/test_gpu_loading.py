"""An HDF5 file read in place on a GPU, with each backend and placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.schema import AugConfig
from helpers.hdf5_files import Storage, converted, write_hdf5
from helpers.loaders import NO_AUG, assert_same, data_of
from pipelines import build_train_loader
from pipelines.loader.batches import Batch

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("placement", ["host", "device"])]
AUGS = pytest.mark.parametrize(
    "aug",
    [NO_AUG, AugConfig(crop="pad", flip=0.5), AugConfig(crop="random-resized", flip=0.5)],
    ids=["copy", "triton", "dali"],
)
FILES = pytest.mark.parametrize(
    ("layout", "storage"),
    [("channels first", {}), ("channels last", {}), ("channels first", {"compression": "gzip", "chunks": True})],
    ids=["planes", "pixels", "gzip"],
)


def batches(path: Path, aug: AugConfig, placement: str) -> list[Batch]:
    loader = build_train_loader(data_of(path, placement=placement), aug, seed=3, device="cuda")
    return [Batch(images.cpu(), labels.cpu()) for images, labels in loader]


@AUGS
@FILES
def test_all_batches_arrive(placement: str, aug: AugConfig, layout: str, storage: Storage, tmp_path: Path) -> None:
    found = batches(write_hdf5(tmp_path / "x.hdf5", layout, storage), aug, placement)
    assert [(batch.images.shape, batch.images.dtype) for batch in found] == [((24, 3, 32, 32), torch.uint8)] * 8


@pytest.mark.gpu_values
@AUGS
@FILES
def test_batches_are_those_of_the_conversion(
    placement: str, aug: AugConfig, layout: str, storage: Storage, tmp_path: Path
) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", layout, storage)
    assert_same(batches(path, aug, placement), batches(converted(path), aug, placement))
