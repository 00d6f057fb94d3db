"""Speedrun networks: whitening, identity initialisation, shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.utils.errors import UserError
from models import build_model
from models.speedrun import SpeedrunNet, Whitening, find_whitening, fit_whitening, identity_conv

NAMES = {"speedrun94": 1_972_504, "speedrun95": 4_606_232, "speedrun96": 9_918_488, "speedrun96_proxy": 146_456}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def smooth_images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return images [N, 3, 20, 20] with correlated pixels and channels, as in photos, and means near 0."""
    noise = torch.randn(count, 1, 24, 24, dtype=dtype) + 0.3 * torch.randn(count, 3, 24, 24, dtype=dtype)
    return F.avg_pool2d(noise, 5, stride=1)


def fitted(images: Tensor, **settings: float) -> Whitening:
    layer = Whitening(zero_bias=True).to(images.dtype)
    layer.fit(images, **settings)
    return layer


def test_whitened_patches_have_identity_covariance() -> None:
    images = smooth_images(50)
    responses = fitted(images, eps=0.0)(images).permute(0, 2, 3, 1).flatten(0, 2)
    half = responses[:, :12]
    torch.testing.assert_close(half.T @ half / len(half), torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(responses[:, 12:], -half)


def test_epsilon_limits_weak_directions_of_whitening() -> None:
    images = smooth_images(20) * 1e-3
    assert fitted(images)(images).square().mean() < 0.2


def test_whitening_is_independent_of_memory_format() -> None:
    images = smooth_images(20)
    torch.testing.assert_close(
        fitted(images).weight, fitted(images.contiguous(memory_format=torch.channels_last)).weight
    )


def test_whitening_is_fitted_to_normalised_pixels() -> None:
    model = build_model("speedrun96_proxy", 10, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    fit_whitening(model, pixels)
    normalised = (pixels / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(
        3, 1, 1
    )
    expected = Whitening(zero_bias=True)
    expected.fit(normalised)
    layer = find_whitening(model)
    assert layer is not None
    torch.testing.assert_close(layer.weight, expected.weight, rtol=1e-3, atol=1e-4)
    assert find_whitening(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (4, 9), (9, 4)])
def test_identity_convolution_passes_channels_through(inputs: int, outputs: int) -> None:
    features = torch.randn(2, inputs, 7, 7)
    result = identity_conv(inputs, outputs)(features)
    shared = min(inputs, outputs)
    assert torch.equal(result[:, :shared], features[:, :shared])
    assert outputs <= inputs or result[:, inputs:].abs().mean() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_match_and_norm_scales_are_frozen(name: str) -> None:
    model = build_model(name, 10)
    assert sum(p.numel() for p in model.parameters()) == NAMES[name]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    norms = {n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert frozen == {f"{n}.weight" for n in norms}
    assert "whitening.weight" in dict(model.named_buffers())


@pytest.mark.parametrize("side", [25, 32, 48])
def test_sizes_from_25_to_48_are_accepted(side: int) -> None:
    model = build_model("speedrun96_proxy", 7, image_size=side)
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)
    for wrong in (24, 49):
        with pytest.raises(UserError, match="from 25 to 48"):
            build_model("speedrun96_proxy", 7, image_size=wrong)


def plain_forward(model: SpeedrunNet, x: Tensor) -> Tensor:
    """Return the logits, layer by layer as published."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-12).sqrt() + state[f"{name}.bias"].view(1, -1, 1, 1)

    x = F.gelu(F.conv2d(x, state["whitening.weight"], state["whitening.bias"]))
    for group in range(3):
        at = f"groups.{group}"
        x = F.conv2d(x, state[f"{at}.conv1.weight"], padding="same")
        first = x = F.gelu(norm(F.max_pool2d(x, 2), f"{at}.norm1"))
        x = F.gelu(norm(F.conv2d(x, state[f"{at}.conv2.weight"], padding="same"), f"{at}.norm2"))
        if f"{at}.conv3.weight" in state:
            x = F.gelu(norm(F.conv2d(x, state[f"{at}.conv3.weight"], padding="same"), f"{at}.norm3") + first)
    return F.max_pool2d(x, 3).flatten(1) @ state["head.weight"].T / 9


@pytest.mark.parametrize("depth", [2, 3])
def test_network_equals_layers_in_published_order(depth: int) -> None:
    model = SpeedrunNet(10, (24, 30, 30), depth=depth).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(images), plain_forward(model, images))


def test_speedrun94_has_unit_head_weights_and_tiny_logits() -> None:
    model = build_model("speedrun94", 10)
    assert isinstance(model, SpeedrunNet)
    assert float(model.head.weight.detach().std()) == pytest.approx(1)
    assert model.logit_scale == 1 / 256
    assert float(model.whitening.bias.detach().abs().max()) > 0
    other = build_model("speedrun95", 10)
    assert isinstance(other, SpeedrunNet)
    assert float(other.whitening.bias.detach().abs().max()) == 0


def test_logits_are_float32_under_autocast() -> None:
    model = build_model("speedrun96_proxy", 10).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32)).dtype == torch.float32
