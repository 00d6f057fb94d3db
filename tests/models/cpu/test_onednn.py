"""Narrow ResNets train with every instruction set, and changed layers keep their results.

Run as a script, this file prints the losses of narrow ResNets: native code may crash or hang, so the tests run it in a
separate process.
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.load import load_config
from helpers.training import CLEAN, ROOT, alone, make_state, random_batch, record_gradients
from models import build_model
from models.cpu import onednn
from models.cpu.onednn import avoid_narrow_strided_convs, block_channels, is_affected
from pipelines.loader.batches import Batch
from pipelines.storage.dataset import ModelDataset
from train.build import build_all
from train.engine.step import train_step

STEPS = 10
# width, batch size, pixels, channels_last
FEW = [
    (4, 16, 32, True),
    (6, 4, 64, False),
    (12, 1, 64, True),
]
ALL = list(itertools.product((4, 6, 8, 12), (1, 4, 16), (32, 64), (True, False)))
CASES = {"few": FEW, "all": ALL}
# Instruction sets sum in different orders, and every step enlarges the difference: 2e-4 of the loss after ten steps.
TOLERANCE = 1e-3
NOTHING: dict[str, Any] = {}
AVX512 = dict.fromkeys(("avx2", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), True)
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

needs_avx2 = pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="the CPU has no AVX2")


def print_losses(cases: list[tuple[int, int, int, bool]]) -> None:
    for width, samples, size, channels_last in cases:
        network = narrow(width)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        training = make_state(network, {"name": "sgd"}, lr=1e-3)
        gradients = record_gradients(training)
        images, labels = random_batch(samples)
        images = images.repeat_interleave(size // 32, 2).repeat_interleave(size // 32, 3)
        batch = Batch(images.contiguous(memory_format=torch.channels_last), labels)
        losses = []
        for _ in range(STEPS):
            before = training.sums[0].item()
            train_step(training, batch)
            losses.append((training.sums[0].item() - before) / samples)
        shortcuts = [gradient.norm().item() for gradient in gradients[0] if gradient.shape[2:] == (1, 1)]
        print(json.dumps([*losses, *shortcuts]), flush=True)


def losses_with(which: str, **limit: str) -> list[list[float]]:
    """Return the losses of the cases FEW or ALL, with two threads, since a single one cannot hang in a barrier."""
    kept = {name: value for name, value in CLEAN.items() if name not in LIMITS}
    # passive, since spinning threads make steps a hundred times slower on shared cores
    env = {
        **kept,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        **limit,
    }
    command = [sys.executable, __file__, which]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=200)
    assert done.returncode == 0, f"after {done.stdout.count(chr(10))} cases: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@needs_avx2
@pytest.mark.parametrize("which", ["few", pytest.param("all", marks=pytest.mark.campaign)])
def test_avx2_losses_of_narrow_resnet_match_default(which: str) -> None:
    default, avx2 = losses_with(which), losses_with(which, ONEDNN_MAX_CPU_ISA="AVX2")
    for case, expected, found in zip(CASES[which], default, avx2, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE), case


# Affected layers


@pytest.mark.parametrize(
    ("features", "limits", "channels"),
    [
        (AVX512, {}, 16),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 8),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "avx2_vnni"}, 8),
        (AVX512, {"DNNL_MAX_CPU_ISA": "AVX2"}, 8),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "DNNL_MAX_CPU_ISA": "SSE41"}, 16),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX"}, 0),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, 0),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "unknown"}, 16),
        ({"avx2": True, "avx512_f": True}, {}, 8),
        ({"avx2": True}, {}, 8),
        ({"avx2": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, 8),
        (NOTHING, {}, 0),
        (NOTHING, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, 0),
    ],
)
def test_block_channels_follow_cpu_and_onednn_limit(
    features: dict[str, Any], limits: dict[str, str], channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert block_channels() == channels
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert block_channels() == 0


@pytest.mark.parametrize(
    ("layer", "affected"),
    [
        (nn.Conv2d(7, 8, 1, stride=2), True),
        (nn.Conv2d(7, 8, 1, stride=2, bias=False, padding="valid"), True),
        (nn.Conv2d(2, 64, 1, stride=(1, 2)), True),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 1, stride=2, padding=1), False),
        (nn.Conv2d(4, 8, 1, stride=2, groups=2), False),
        (nn.Conv2d(4, 8, 2, stride=2), False),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), False),
        (nn.ConvTranspose2d(4, 8, 1, stride=2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_only_narrow_strided_1x1_convolutions_are_affected(layer: nn.Module, affected: bool) -> None:
    assert is_affected(layer, 8) is affected
    assert is_affected(layer, 0) is False


# Workaround


def narrow(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18", 10, width=width, mean=[0.5] * 3, std=[0.25] * 3)


def with_block(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    monkeypatch.setattr(onednn, "block_channels", lambda: channels)


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
def test_changed_layer_keeps_results_and_gradients(stride: int | tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 1, stride).double()  # float64 does not run in oneDNN
    changed = copy.deepcopy(nn.Sequential(plain))
    assert avoid_narrow_strided_convs(changed, channels=8) is not None
    changed = copy.deepcopy(changed)  # as a moving average does
    results = []
    for layer in (plain, changed):
        images = torch.linspace(-1, 1, 3 * 4 * size[0] * size[1], dtype=torch.float64).view(3, 4, *size)
        images.requires_grad_()
        out = layer(images)
        out.square().sum().backward()
        results.append([out, images.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*results)


def test_workaround_keeps_names_and_is_idempotent() -> None:
    plain, changed = narrow(), narrow()
    note = avoid_narrow_strided_convs(changed, channels=8)
    assert note is not None
    assert note.startswith("stride moved out of 1 of 20 convolutions (network.layer2.0.downsample.0): oneDNN's")
    assert avoid_narrow_strided_convs(changed, channels=8) is None
    assert [(name, type(module)) for name, module in changed.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert list(changed.state_dict()) == list(plain.state_dict())
    changed.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(("width", "channels"), [(4, 0), (8, 8), (16, 16)])
def test_other_cpus_and_wide_models_get_no_hooks(width: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = narrow(width)
    before = repr(model)
    assert avoid_narrow_strided_convs(model, channels) is None
    assert repr(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_log_names_changed_layers_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with_block(monkeypatch, 16)
    overrides = ["model.name=resnet18", "model.options={width: 4}", "model.freeze=[conv1.*]"]
    config = load_config(ROOT / "configs" / "digits_lenet.yaml", overrides)
    dataset = ModelDataset("plain", ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    with alone() as device:
        training = build_all(config, dataset, 32, device)
    assert [note.split(":")[0] for note in training.notes[:1]] == ["frozen"]
    assert training.notes[1].startswith("stride moved out of 2 of 20 convolutions")
    assert "corrupts memory on this CPU" in training.notes[1]


def test_evaluated_model_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_block(monkeypatch, 16)
    config = load_config(ROOT / "configs" / "digits_lenet.yaml", ["model.name=resnet18", "model.options={width: 4}"])
    dataset = ModelDataset("plain", ("a", "b"), (0.5,) * 3, (0.5,) * 3)
    with alone() as device:
        changed, plain = (build_all(config, dataset, 32, device, trains=trains) for trains in (True, False))
    assert any(module._forward_pre_hooks for module in changed.network.modules())
    assert not any(module._forward_pre_hooks for module in plain.network.modules())
    assert plain.notes == ()


def test_changed_model_can_be_exported() -> None:
    model = narrow().eval()
    images = random_batch(2).images
    expected: Tensor = model(images)
    avoid_narrow_strided_convs(model, channels=8)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), expected)


if __name__ == "__main__":
    with alone():
        print_losses(CASES[sys.argv[1]])
