"""Tests of tools.visualize.samples."""

from __future__ import annotations

import torch

from tools.visualize.samples import sample_figure


def test_images_of_one_sample_share_a_column() -> None:
    def marked(row: int) -> torch.Tensor:
        return (torch.arange(13, dtype=torch.uint8) + 20 * row)[:, None, None, None].expand(13, 3, 4, 4)

    figure = sample_figure(marked(0), [marked(1), marked(2)], [7, 9], [f"name {n}" for n in range(13)], "test")
    shown = [int(axis.get_images()[0].get_array()[0, 0, 0]) for axis in figure.axes if axis.get_images()]
    blank = [255] * 7
    assert shown[:30] == [*range(10), *range(20, 30), *range(40, 50)]
    assert shown[30:] == [10, 11, 12, *blank, 30, 31, 32, *blank, 50, 51, 52, *blank]
    assert [axis.get_title() for axis in figure.axes][30:34] == ["name 10", "name 11", "name 12", ""]
    assert figure.axes[50].get_title() == "epoch 10"
