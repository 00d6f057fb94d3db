"""The proxy network that selects hard samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from configs.schema import ProxyConfig, TrainConfig
from configs.utils.errors import UserError
from helpers.training import CPU, alone, lenet, make_state, random_batch
from models import build_model
from models.speedrun import find_whitening
from train.engine.execution import build_plan
from train.engine.hard_samples import HardSampleSelector, build_proxy, check_proxy

SGD = {"name": "sgd", "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def new_proxy(keep: float = 0.5) -> HardSampleSelector:
    config = ProxyConfig(model="lenet", keep=keep, every_steps=4)
    return HardSampleSelector(make_state(lenet(), SGD, lr=0.1, label_smoothing=0.2), config)


def test_proxy_ignores_layer_settings_of_model() -> None:
    settings = {"lr_scales": {"layer1.*": 0.1}, "layer_decay": 0.5}
    config = TrainConfig.model_validate({"proxy": {"model": "lenet"}, "optimizer": settings})
    proxy = build_proxy(config, build_plan(config, CPU), lambda _: lenet())
    assert proxy is not None
    assert {group["lr_scale"] for group in proxy.state.optimizer.param_groups} == {1.0}


@pytest.mark.parametrize(("keep", "count"), [(0.5, 8), (0.3, 5), (1.0, 16), (0.01, 1)])
def test_selector_returns_samples_of_highest_loss(keep: float, count: int) -> None:
    batch = random_batch(16)
    chosen = new_proxy(keep).select(batch, step=1)
    losses = F.cross_entropy(lenet()(batch.images), batch.labels, label_smoothing=0.2, reduction="none")
    hardest = set(losses.argsort(descending=True)[:count].tolist())
    found = {
        next(i for i in range(16) if torch.equal(batch.images[i], image) and batch.labels[i] == label)
        for image, label in zip(*chosen, strict=True)
    }
    assert found == hardest
    assert chosen.images.is_contiguous(memory_format=torch.channels_last)


def test_proxy_trains_every_fourth_step_only() -> None:
    proxy, batch = new_proxy(), random_batch(16)
    network = proxy.state.network
    for update in range(6):
        before = copy.deepcopy(network)
        chosen = proxy.select(batch, update)
        parameters = list(before.parameters())
        loss = F.cross_entropy(before(chosen.images), chosen.labels, label_smoothing=0.2)
        gradients = torch.autograd.grad(loss, parameters)
        for old, new, gradient in zip(parameters, network.parameters(), gradients, strict=True):
            learnt = 0.1 * gradient if update % 4 == 0 else torch.zeros_like(old)
            torch.testing.assert_close(new.detach(), old.detach() - learnt, rtol=1e-4, atol=1e-6)


def test_proxy_skips_non_finite_step_like_model() -> None:
    config = ProxyConfig(model="lenet", keep=0.5, every_steps=1)
    proxy = HardSampleSelector(make_state(lenet(), SGD, lr=0.1, on_nonfinite="skip"), config)
    network, batch = proxy.state.network, random_batch(16)
    before = copy.deepcopy(network.state_dict())
    proxy.select(batch._replace(images=batch.images.float() * float("inf")), step=0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    proxy.select(batch, step=1)
    assert not all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in network.state_dict().values())


def test_proxy_whitening_bias_is_not_trained() -> None:
    def build(name: str) -> torch.nn.Module:
        return build_model(name, 10, mean=[0.5] * 3, std=[0.5] * 3)

    plan = build_plan(TrainConfig(), CPU)
    proxy = build_proxy(TrainConfig(proxy=ProxyConfig(model="speedrun96_proxy")), plan, build)
    assert proxy is not None
    whitening = find_whitening(proxy.state.network)
    assert whitening is not None
    assert not whitening.bias.requires_grad
    assert build_proxy(TrainConfig(), plan, build) is None


@pytest.mark.parametrize(("world_size", "accumulation", "named"), [(2, 1, "world_size=2"), (1, 3, "steps=3")])
def test_proxy_refuses_several_ranks_or_micro_steps(world_size: int, accumulation: int, named: str) -> None:
    config = TrainConfig(proxy=ProxyConfig(model="lenet"), accumulation_steps=accumulation)
    with pytest.raises(UserError, match=rf"train\.proxy\.model=lenet .*{named}; use 1 or set"):
        check_proxy(config, world_size)
    check_proxy(TrainConfig(accumulation_steps=accumulation), world_size)
    check_proxy(TrainConfig(proxy=ProxyConfig(model="lenet")), 1)


@pytest.mark.parametrize(("loss", "mixes", "named"), [("cross-entropy", True, r"aug\.mix"), ("bce", False, "loss=bce")])
def test_proxy_refuses_mixed_samples_and_other_losses(loss: str, mixes: bool, named: str) -> None:
    config = TrainConfig(proxy=ProxyConfig(model="lenet"), loss=loss)
    with pytest.raises(UserError, match=rf"train\.proxy\.model=lenet .*{named}.*; train them with .* or set train"):
        check_proxy(config, 1, mixes)
    check_proxy(TrainConfig(loss=loss), 1, mixes)
    weighted = TrainConfig(proxy=ProxyConfig(model="lenet"), class_weights="balanced")
    with pytest.raises(UserError, match=r"but train\.class_weights weights them; train them with plain cross-entropy"):
        check_proxy(weighted, 1)
