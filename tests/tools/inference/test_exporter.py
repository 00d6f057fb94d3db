"""Tests of tools.inference.exporter."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.utils.errors import UserError
from models import Normalize, PixelClassifier
from tools.inference import export_check, exporter
from tools.inference.export_formats import FORMATS, Exportable


@pytest.mark.parametrize(
    ("largest", "differs_by", "fits"), [(1.0, 2e-4, False), (500.0, 2e-4, True), (500.0, 2e-3, False)]
)
def test_tolerance_is_at_least_a_millionth_of_the_largest_logit(
    largest: float, differs_by: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.full((3, 10), largest)
    wrong = replace(
        FORMATS["onnx"], write=lambda *_: "", load=lambda _: lambda images: logits[: len(images)] + differs_by
    )
    monkeypatch.setitem(FORMATS, "onnx", wrong)
    expected = export_check.ExpectedLogits(torch.zeros((3, 3, 2, 2), dtype=torch.uint8), logits, "", "")
    outcome = nullcontext() if fits else pytest.raises(UserError, match="is allowed")
    with outcome:
        exporter.export_format("onnx", None, expected, 1e-4, tmp_path)  # type: ignore[arg-type]


class DataDependent(nn.Module):
    """Network with a Python branch on pixel values, which cannot be traced."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :10]
        return -logits if images.mean() > 0 else logits


class TwoImages(nn.Module):
    """Network that only takes batches of the example's size."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(2, -1)[:, :10]


def exportable(network: nn.Module) -> Exportable:
    model = PixelClassifier(Normalize((0.5,) * 3, (0.5,) * 3), network).eval()
    return Exportable(model, "own", tuple("0123456789"), 4, "bilinear", "center", 1.0, {})


@pytest.mark.parametrize("name", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("network", "why"), [(DataDependent(), "data-dependent"), (TwoImages(), r"constant \(2\)")], ids=["data", "two"]
)
def test_untraceable_network_is_a_one_line_error(
    name: str, network: nn.Module, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = torch.zeros(9, 3, 4, 4, dtype=torch.uint8)
    expected = export_check.ExpectedLogits(images, torch.zeros(9, 10), "random pixels", "9 images")
    with pytest.raises(UserError, match=f"^format {name} cannot be exported: .*{why}") as caught:
        exporter.export_format(name, exportable(network), expected, 1e-4, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
