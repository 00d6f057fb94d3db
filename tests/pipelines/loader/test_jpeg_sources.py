"""JPEG files decoded on the CPU: only the parts that the graph reads, exactly or fast."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import AugConfig, DataConfig, EvalConfig
from helpers.damage import damage, stray_bytes
from helpers.photos import converted, photos
from pipelines.build import build_eval_loader, build_train_loader
from pipelines.cpu.graph import CpuGraph, Draws, Parts, eval_graph, train_graph, whole_parts
from pipelines.loader.bad_samples import Undecodable
from pipelines.loader.buffers import SlotBuffers
from pipelines.loader.jpeg_sources import HostJpegs
from pipelines.storage.open import open_split

CROPPED = AugConfig(crop="random-resized", scale=(0.05, 1.0), flip=0.5)
SIDES = [(200, 300), (301, 200), (97, 111), (427, 640)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("jpeg") / "photos", [i for s in SIDES for i in photos(*s, 6)], "jpeg")


def batches(folder: Path, aug: AugConfig | None, size: int = 40, **data: Any) -> np.ndarray:
    """Return all images of three training epochs, or of an evaluation if `aug` is None: uint8 [N, H, W, 3]."""
    config = DataConfig(path=str(folder), batch_size=8, image_size=size, **data)
    if aug is None:
        loader: Any = build_eval_loader(config, EvalConfig(crop_fraction=0.875), device="cpu")
        return np.concatenate([images.permute(0, 2, 3, 1).numpy() for images, _ in loader])
    train = build_train_loader(config, aug, device="cpu")
    found = []
    for _ in range(3):
        found += [batch[0].permute(0, 2, 3, 1).numpy().copy() for batch in train]
    return np.concatenate(found)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "aug",
    [CROPPED, AugConfig(crop="squash"), AugConfig(crop="pad", padding=4), None],
    ids=["crop", "squash", "pad", "evaluation"],
)
def test_exact_decoding_of_parts_gives_the_pixels_of_whole_images(
    aug: AugConfig | None, antialias: bool, interpolation: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = batches(folder, aug, antialias=antialias, interpolation=interpolation)
    monkeypatch.setattr(CpuGraph, "parts", lambda graph, heights, widths, *_: whole_parts(heights, widths))
    np.testing.assert_array_equal(found, batches(folder, aug, antialias=antialias, interpolation=interpolation))


@pytest.mark.parametrize(("aug", "least"), [(CROPPED, 33), (None, 33)], ids=["training", "evaluation"])
def test_fast_decoding_is_close_to_exact_decoding(
    aug: AugConfig | None, least: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denominators: list[int] = []
    parts = CpuGraph.parts

    def recorded(graph: CpuGraph, heights: np.ndarray, widths: np.ndarray, draws: Draws, reduces: bool) -> Parts:
        found = parts(graph, heights, widths, draws, reduces)
        denominators.extend(found.denominators.tolist())
        return found

    exact = batches(folder, aug)
    monkeypatch.setattr(CpuGraph, "parts", recorded)
    fast = batches(folder, aug, jpeg_decode="fast")
    assert len(set(denominators)) >= 3
    error = ((fast.astype(float) - exact) ** 2).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error)).min() >= least  # dB


def test_reduced_images_are_never_enlarged() -> None:
    graph = eval_graph(None, 160, 1.0, "bilinear", True, False)
    assert graph is not None
    sides = np.array([640, 639, 400]), np.array([700, 640, 161])
    assert graph.parts(*sides, {}, True).denominators.tolist() == [4, 2, 1]
    assert graph.parts(*sides, {}, False).denominators.tolist() == [1, 1, 1]


def test_damage_below_the_crop_is_found_only_when_reading_to_the_end(folder: Path) -> None:
    split = open_split(folder, "train")
    cut = replace(split, size=split.size * 3 // 4)
    graph = train_graph(None, CROPPED, 40, "bilinear", True, None, (0.5, 0.5, 0.5))
    top = {"crop_start": np.zeros((8, 2), np.float32), "crop_end": np.full((8, 2), 20, np.float32)}
    buffers = SlotBuffers(1, 8, (40, 40, 3))
    HostJpegs(cut, buffers, graph, to_end=False).fill(0, np.arange(8), top)
    with pytest.raises(Undecodable, match=r"samples \[0\] cannot be decoded"):
        HostJpegs(cut, buffers, graph, to_end=True).fill(0, np.arange(8), top)


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_training_reads_to_the_end_if_bad_samples_are_replaced(choice: Any, folder: Path) -> None:
    """Otherwise, which samples are replaced after a restart would depend on the crops before it."""
    data = DataConfig(path=str(folder), batch_size=8, image_size=40, on_bad_sample=choice)
    source = build_train_loader(data, CROPPED, device="cpu").stage.source
    assert isinstance(source, HostJpegs)
    assert source.to_end == (choice == "skip")


def test_files_that_only_pillow_decodes_are_cut_and_reduced(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, 20, stray_bytes)  # libjpeg-turbo gives a warning
    for decode, least in (("exact", 99), ("fast", 30)):
        for aug in (CROPPED, None):
            expected, found = (batches(one, aug, jpeg_decode=decode, verify="off") for one in (folder, copy))
            error = ((found.astype(float) - expected) ** 2).mean()
            assert 10 * np.log10(255**2 / max(error, 1e-9)) > least
