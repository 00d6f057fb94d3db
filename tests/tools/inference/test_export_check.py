"""Tests of tools.inference.export_check."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.inference import export_check


def test_comparison_covers_each_image_once_in_all_batch_sizes() -> None:
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 2, 2)
    seen: list[Tensor] = []

    def predict(batch: Tensor) -> Tensor:
        seen.append(batch[:, 0, 0, 0])
        return batch.flatten(1).float()

    logits = images.flatten(1).float()
    result = export_check.compare_logits(predict, export_check.ExpectedLogits(images, logits, "", ""))
    assert [len(batch) for batch in seen] == [1, 7, 64, 1, 7, 64, 1, 7, 48]
    assert torch.equal(torch.cat(seen), images[:, 0, 0, 0])
    assert (result.max_difference, result.same_top1) == (0.0, 200)
    logits = logits.clone()
    logits[199, 5] -= 500
    assert (
        export_check.compare_logits(predict, export_check.ExpectedLogits(images, logits, "", "")).max_difference == 500
    )
