"""Compare the fused kernel with NumPy; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import AugConfig, DataConfig, EraseConfig, PaddingMode
from pipelines import build_train_loader
from pipelines.loader.backend import LoaderSpec

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
PADDING = 4
CUTOUT = 3
COLOR = (17, 130, 255)


def reference(
    images: np.ndarray, indices: np.ndarray, draws: dict[str, np.ndarray], size: int, padding_mode: PaddingMode
) -> np.ndarray:
    """Pad, crop, flip, erase and cut out image by image: uint8 [N, H, W, 3] to uint8 [B, size, size, 3]."""
    out = np.zeros((len(indices), size, size, 3), np.uint8)
    for number, index in enumerate(indices):
        top, left = draws["offset"][number] if "offset" in draws else (0, 0)
        padded = np.pad(images[index], ((PADDING, PADDING), (PADDING, PADDING), (0, 0)), mode=padding_mode.value)
        crop = padded[PADDING + top : PADDING + top + size, PADDING + left : PADDING + left + size]
        out[number] = crop[:, ::-1] if "flip" in draws and draws["flip"][number] else crop
        if "erase_box" in draws:
            top, left, height, width = draws["erase_box"][number]
            out[number, top : top + height, left : left + width] = draws["erase_color"][number]
        if "cutout" in draws:
            top, left = draws["cutout"][number].astype(int)
            out[number, top : top + CUTOUT, left : left + CUTOUT] = COLOR
    return out


def drawn(samples: int, size: int, *names: str) -> dict[str, np.ndarray]:
    """Return draws by name: offsets in -PADDING..PADDING with both ends, flips, boxes with colors, and cutouts."""
    random = np.random.default_rng(0)
    offsets = random.integers(-PADDING, PADDING, (samples, 2), dtype=np.int32, endpoint=True)
    offsets[0], offsets[-1] = (-PADDING, PADDING), (PADDING, -PADDING)
    corners = random.integers(0, size, (samples, 2))
    boxes = np.concatenate([corners, random.integers(0, size - corners, endpoint=True)], axis=1).astype(np.int32)
    all_draws = {
        "offset": offsets,
        "flip": random.integers(0, 2, samples, dtype=np.int32),
        "erase_box": boxes,
        "erase_color": random.integers(0, 256, (samples, 3), dtype=np.uint8),
        "cutout": random.integers(0, size - CUTOUT, (samples, 2), endpoint=True).astype(np.float32),
    }
    return {name: all_draws[name] for name in names}


def compare(device: str) -> None:
    """Compare all variants with the reference. Runs in a separate process, since Triton reads its mode once."""
    from pipelines.gpu.triton_ops import ResidentTransforms, TransformingRunner, draw_table

    random = np.random.default_rng(1)
    every = ("offset", "flip", "erase_box", "erase_color", "cutout")
    for shape, size in (((32, 32, 3), 32), ((9, 11, 3), 9), ((8, 8, 3), 6)):
        images = random.integers(0, 256, (7, *shape), dtype=np.uint8)
        pixels = torch.from_numpy(images.reshape(7, -1)).to(device)
        for padding_mode in PaddingMode:
            for names in (("flip",), ("offset",), ("offset", "flip"), ("flip", "cutout"), every[:-1], every):
                transforms = ResidentTransforms(pixels, shape, size, batch_size=6, slots=2, padding_mode=padding_mode)
                for slot, samples in ((0, 6), (1, 5)):  # a full batch and a smaller one
                    indices = random.integers(0, 7, samples)
                    draws = drawn(samples, size, *names)
                    table = draw_table(draws, CUTOUT if "cutout" in names else 0, COLOR)
                    ours = transforms.fill(slot, indices, {"table": table})
                    assert ours.shape == (samples, size, size, 3)
                    expected = reference(images, indices, draws, size, padding_mode)
                    np.testing.assert_array_equal(ours.cpu().numpy(), expected, str((shape, size, padding_mode, names)))
                runner = TransformingRunner(torch.device(device), None, size, padding_mode, views=2)
                draws = drawn(14, size, *names)
                tables = runner.tables({"table": draw_table(draws, CUTOUT if "cutout" in names else 0, COLOR)})
                ours = runner.transform(
                    pixels.view(7, *shape), [torch.from_numpy(table).to(device) for table in tables]
                )
                expected = reference(images, np.arange(7).repeat(2), draws, size, padding_mode)
                np.testing.assert_array_equal(ours.cpu().numpy(), expected)


def test_kernel_equals_numpy_when_interpreted() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}",
    }
    program = "from test_triton_ops import compare; compare('cpu')"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_kernel_equals_numpy_on_gpu() -> None:
    compare("cuda")


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("padding_mode", list(PaddingMode))
@pytest.mark.parametrize(
    "changes",
    [{"crop": "none"}, {"crop": "pad"}, {"crop": "pad", "cutout": 5}, {"erase": EraseConfig(probability=0.7)}],
    ids=["flip", "crop", "cutout", "erase"],
)
def test_kernel_equals_dali_and_cpu_graph(
    changes: dict[str, Any], padding_mode: PaddingMode, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aug = AugConfig(padding=PADDING, padding_mode=padding_mode, flip=0.5).model_copy(update=changes)

    def batches(device: str, placement: Any) -> list[torch.Tensor]:
        section = DataConfig(path=str(npy_data), batch_size=64, placement=placement)
        return [batch.images.cpu() for batch in build_train_loader(section, aug, seed=5, device=device)]

    resident, copied, on_cpu = batches("cuda", "device"), batches("cuda", "host"), batches("cpu", "host")
    monkeypatch.setattr(LoaderSpec, "only_crops_flips_and_erases", False)
    by_dali = batches("cuda", "host")
    assert len(resident) == len(copied) == len(on_cpu) == len(by_dali) > 0
    for number, expected in enumerate(on_cpu):
        assert torch.equal(resident[number], expected)
        assert torch.equal(copied[number], expected)
        assert torch.equal(by_dali[number], expected)
