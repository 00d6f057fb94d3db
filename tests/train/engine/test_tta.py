"""Test-time augmentation is the mean of explicit forward passes over views that torch makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.engine.evaluate import mean_logits, views


def images(height: int = 9, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, height, width, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def plain_views(pixels: Tensor, tta: str) -> list[tuple[float, Tensor]]:
    """By torch's own reflection padding."""
    height, width = pixels.shape[2:]
    padded = F.pad(pixels.double(), (1, 1, 1, 1), mode="reflect").to(pixels.dtype)
    right_down, left_up = padded[:, :, :height, :width], padded[:, :, 2:, 2:]
    if tta == "none":
        return [(1.0, pixels)]
    if tta == "flip":
        return [(0.5, pixels), (0.5, pixels.flip(3))]
    return [(0.25, pixels), (0.25, pixels.flip(3))] + [
        (0.125, view) for shifted in (left_up, right_down) for view in (shifted, shifted.flip(3))
    ]


MODES = pytest.mark.parametrize("tta", ["none", "flip", "flip-translate"])


@MODES
def test_views_are_torchs_and_keep_shape_type_and_memory_format(tta: str) -> None:
    ours, theirs = list(views(images(), tta)), plain_views(images(), tta)
    assert [weight for weight, _ in ours] == [weight for weight, _ in theirs]
    assert sum(weight for weight, _ in ours) == 1
    for (_, view), (_, expected) in zip(ours, theirs, strict=True):
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, expected)


@MODES
def test_logits_are_the_weighted_mean_of_forward_passes_of_a_model_that_reuses_its_output(tta: str) -> None:
    weight = torch.randn(9 * 7 * 3, 5, generator=torch.Generator().manual_seed(1))
    output: Any = torch.empty(4, 5)

    def infer(view: Tensor) -> Tensor:
        torch.matmul(torch.sin(view.float()).flatten(1), weight, out=output)  # as replaying a CUDA graph does
        return output

    expected = sum(share * (torch.sin(view.float()).flatten(1) @ weight) for share, view in plain_views(images(), tta))
    torch.testing.assert_close(mean_logits(infer, images(), tta), expected)
