"""Networks from the user's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.schema import ModelConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from helpers.own_code import write_own_code
from models import build_from_config, build_model

MORE = """
from torch import nn

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def fixed(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

def pair(num_classes):
    class Pair(nn.Module):
        def forward(self, images):
            return images, images
    return Pair()

def text(num_classes):
    return "net"

def broken(num_classes):
    return nn.Linear(num_classes, undefined)

def unlucky(num_classes):
    return nn.Linear(3, num_classes)

def flat(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))

def pooled(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def softmax(num_classes):
    return nn.Sequential(fixed(0), nn.Softmax(1))

class NoClasses(nn.Module):
    def __init__(self):
        super().__init__()

def dropout(num_classes, drop_rate=0.5, activation="relu"):
    return nn.Sequential(nn.Flatten(), nn.Dropout(drop_rate), nn.Linear(3072, num_classes))
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_code(tmp_path)
    write_own_code(tmp_path, MORE, "more.py")


def test_model_takes_pixels_like_a_built_in_one() -> None:
    config = ModelConfig(name="own.py:Net", options={"width": 6})
    model = build_from_config(config, 5, image_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    assert model.network.conv.out_channels == 6
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)


def test_run_changes_neither_weights_nor_random_numbers_nor_mode() -> None:
    torch.manual_seed(0)
    plain = build_model("own.py:Net", 5)
    after = torch.rand(1)
    torch.manual_seed(0)
    checked = build_model("own.py:Net", 5, image_size=33)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), checked.parameters(), strict=True))
    assert all(module.training for module in checked.modules())


def test_lazy_layers_are_initialized() -> None:
    assert build_model("more.py:lazy", 5, image_size=16)[1].weight.shape == (5, 3 * 16 * 16)


def test_probabilities_instead_of_logits_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    build_model("more.py:fixed", 7, image_size=32)
    assert "probabilities" not in capsys.readouterr().err
    warn.cache_clear()  # a warning is printed only once
    build_model("more.py:softmax", 7, image_size=32)
    assert "returns probabilities; return logits without softmax" in " ".join(capsys.readouterr().err.split())


def test_drop_rate_is_passed_to_a_model_that_takes_it() -> None:
    assert build_model("more.py:dropout", 5, drop_rate=0.25)[1].p == 0.25
    assert build_model("more.py:dropout", 5)[1].p == 0.5


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own.py:Net", {"image_size": 64}, r"64x64 is not supported by model 'own\.py:Net' \(RuntimeError: .*own\.py, "
         r"line 16\)\); fix the layer in that line, or set data\.image_size=35 \(sizes that work: from 32 to 35\)"),
        ("more.py:flat", {"image_size": 32}, r"; fix the layer in that line, or set data\.image_size=8 \(.*: only 8\)"),
        ("more.py:pooled", {"image_size": 2}, r"\); set data\.image_size=3 \(sizes that work: at least 3\)"),
        ("own.py:Net", {"wdth": 3}, r"has no argument 'wdth', only num_classes, width; leave out model\.options"),
        ("own.py:Net", {"drop_rate": 0.1}, r"no argument 'drop_rate', .*; leave out model\.drop_rate or add"),
        ("own.py:Ned", {}, r"own\.py has nothing named Ned; did you mean Net\?"),
        ("more.py:NoClasses", {}, r"has no argument 'num_classes', only none; it is called with"),
        ("more.py:fixed", {"image_size": 32}, r"returns \[2, 7\] of torch\.float32 for 2 images, .* float \[2, 5\]"),
        ("more.py:pair", {"image_size": 32}, r"returns tuple for 2 images"),
        ("more.py:text", {}, r"is a str, but must be a torch\.nn\.Module"),
        ("more.py:broken", {}, r"cannot be built with \{'num_classes': 5\}: NameError: .*more\.py, line 20\)"),
        ("more.py:unlucky", {"image_size": 32}, r"fails on images \[2, 3, 32, 32\]: RuntimeError: "),
    ],
)  # fmt: skip
def test_unsuitable_models_are_explained(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(name, 5, **arguments)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("AlexNet", "did you mean alexnet? use one of alexnet, "),
        ("ResNet-18", "did you mean resnet18? "),
        ("resnet19", "did you mean resnet18 or "),
        ("vit_tiny_patch16_224", "did you mean timm/vit_tiny_patch16_224? "),
        ("own.py", "did you mean own.py:NAME, "),
        ("own.AlexNet", "did you mean own:AlexNet? "),
        ("xyz", "unknown; use one of alexnet, "),
    ],
)
def test_unknown_names_suggest_the_nearest(name: str, guess: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(name, 10)
    assert guess in str(caught.value)
