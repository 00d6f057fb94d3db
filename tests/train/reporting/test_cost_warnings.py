"""Warnings about the arithmetic and memory of models, and the counts behind them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.schema import ModelConfig, TrainConfig
from helpers.config_models import MEAN, STD
from helpers.training import CPU, DIGITS, Run, alone, make_state, run_here
from models import build_model
from tools.common.model_costs import count_costs
from train.engine.metrics import GIB
from train.engine.state import TrainState
from train.reporting import cost_warnings as module
from train.reporting.cost_warnings import STANDARD_GMACS, STANDARD_SIZE, cost_warnings, count_image, device_memory


def state_of(name: str, classes: int = 10, amp: str = "off", **options: object) -> TrainState:
    with alone():
        return make_state(build_model(name, classes, mean=MEAN, std=STD, **options), amp=amp)


def warn_about(name: str, gmacs: float, gib: float, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    """Return the warnings about a model with these costs per image, with batches of 256 images of 288 pixels."""
    monkeypatch.setattr(module, "count_image", lambda *_: (gmacs, int(gib * GIB)))
    monkeypatch.setattr(module, "device_memory", lambda *_: 80 * GIB)
    return cost_warnings(ModelConfig(name=name, options=options), state_of("lenet"), [(256, 288), (64, 32)], 1)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_counted_costs_of_an_image_are_those_of_the_summary(amp: str) -> None:
    state = state_of("resnet18", amp=amp, width=16, stem="half")
    dtype = torch.bfloat16 if amp == "bf16" else None
    gmacs, saved_bytes = count_image(state, 48)
    costs = count_costs(state.network, TrainConfig(), 8, 48, device=CPU, amp=dtype)
    assert gmacs == pytest.approx(costs.forward_flops / 16 / 1e9)
    assert saved_bytes == pytest.approx(costs.activation_bytes / 8, rel=0.01)  # those of the loss are left out


@pytest.mark.slow
@pytest.mark.parametrize("name", STANDARD_GMACS)
def test_standard_models_have_the_published_arithmetic(name: str) -> None:
    options = {} if name == "alexnet" else {"stem": "imagenet"}
    gmacs, _ = count_image(state_of(name, 1000, **options), STANDARD_SIZE)
    assert gmacs == pytest.approx(STANDARD_GMACS[name], abs=0.005)


def test_arithmetic_of_twenty_standard_models_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = warn_about("resnet50", 105.1, 0.1, monkeypatch)
    assert warning == (
        "resnet50 needs 105.1 GMACs (billions of multiply-adds) per image of 288 pixels, 26 times the 4.09 of the "
        "standard model at 224 pixels; use model.options.stem=imagenet, smaller images (data.image_size) or a narrower "
        "model"
    )
    (warning,) = warn_about("timm/resnet50.a1_in1k", 105.1, 0.1, monkeypatch)
    assert "use smaller images" in warning
    assert warn_about("resnet50", 81, 0.1, monkeypatch) == []
    assert warn_about("timm/vit_tiny_patch16_224", 105.1, 0.1, monkeypatch) == []


def test_more_memory_than_the_device_has_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = warn_about("resnet50", 6.8, 0.5, monkeypatch, stem="imagenet")
    assert warning == (
        "a step on 256 images of 288 pixels needs about 128 GiB of memory, but the machine has 80 GiB; use a smaller "
        "data.batch_size (with more train.accumulation_steps) or smaller images (data.image_size)"
    )
    assert warn_about("resnet50", 6.8, 0.3, monkeypatch, stem="imagenet") == []


def test_small_runs_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_memory", lambda *_: 16 * GIB)
    monkeypatch.setattr(module, "count_image", lambda *_: pytest.fail("counted"))
    assert cost_warnings(ModelConfig(name="resnet18"), state_of("lenet"), [(128, 32)], 1) == []


def test_processes_share_the_memory_of_a_machine_but_not_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_memory(CPU, 4) == device_memory(CPU, 1) / 4
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    assert device_memory(torch.device("cuda", 0), 4) == 80 * GIB


def test_run_logs_the_warning(digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_memory", lambda *_: 2**20)
    settings = ("train.epochs=1", "name=large")
    run_here("--cfg", DIGITS, "--data-path", digits_run.data, "--output", tmp_path, "--opts", *settings)
    assert "warning: a step on 64 images of 32 pixels needs about 0 GiB" in (tmp_path / "large" / "log.txt").read_text()
