"""Frozen parameters and norms stay unchanged in a step, in an epoch, and on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.utils.errors import UserError
from helpers.training import CPU, alone, make_state, on_ranks, random_batch
from models import build_model
from pipelines.interfaces import Position
from train.distributed.process_group import Ranks
from train.engine import epoch as loop
from train.engine import warm_up
from train.engine.epoch import set_whitening_bias_grad
from train.engine.step import train_step
from train.optim.freeze import freeze, set_training_mode


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet18", 10, width=16, mean=[0.5] * 3, std=[0.25] * 3)


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def _process_group() -> Iterator[None]:
    with alone():
        yield


# Patterns


def test_patterns_match_whole_names_with_or_without_the_prefix() -> None:
    names = set(dict(resnet().named_parameters()))
    for patterns, expected in (
        (["layer1.*"], {name for name in names if name.startswith("network.layer1.")}),
        (["network.layer1.*"], {name for name in names if name.startswith("network.layer1.")}),
        (["*.bn?.bias", "conv1.weight"],
         {name for name in names if ".bn" in name and name.endswith("bias")} - {"network.bn1.bias"}
         | {"network.conv1.weight"}),
        (["[!f]*"], {name for name in names if not name.startswith("network.fc")}),
    ):  # fmt: skip
        model = resnet()
        freeze(model, patterns)
        assert frozen_names(model) == expected


def test_message_counts_frozen_tensors_and_parameters() -> None:
    model = build_model("lenet", 10, mean=[0.5] * 3, std=[0.25] * 3)
    assert freeze(model, ["conv?.*"]) == "frozen: 4 of 10 tensors, 2,872 of 83,126 parameters"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["layer1.*", "layer9.*"],
            r"freeze=\['layer1.\*', 'layer9.\*'\]: 'layer9.\*' matches no parameter; close names",
        ),
        (["layer1"], r"'layer1' matches no parameter; did you mean layer1.\*\?"),
        (["conv1.wieght"], "close names: conv1.weight"),
        (["Conv1.*"], "matches no parameter"),
        (["*"], "leaves no parameter to train"),
        (["fc.*", "[!f]*"], "leaves no parameter to train"),
    ],
)
def test_patterns_that_match_nothing_or_all_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        freeze(resnet(), patterns)
    assert "\n" not in str(caught.value)


# Training


def test_only_fully_frozen_norms_stay_in_evaluation_mode() -> None:
    model = resnet()
    freeze(model, ["layer1.*", "layer2.0.bn1.weight"])
    model.eval()
    set_training_mode(model)
    still = {name for name, module in model.named_modules() if not module.training}
    assert still == {f"network.layer1.{block}.bn{number}" for block in (0, 1) for number in (1, 2)}
    model.train()
    assert all(module.training for module in model.modules())


def test_norms_without_frozen_parameters_keep_learning() -> None:
    for model in (nn.Sequential(nn.BatchNorm2d(3, affine=False)), build_model("speedrun96_proxy", 10)):
        set_training_mode(model)
        assert all(module.training for module in model.modules())


@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_step_changes_all_parameters_but_frozen_ones(optimizer: str) -> None:
    model = resnet()
    freeze(model, ["conv1.*", "bn1.*", "layer1.*"])
    state = make_state(model, {"name": optimizer}, clip_grad_norm=1.0)
    before = copy_of(model)
    set_training_mode(state.forward)
    for seed in range(2):
        train_step(state, random_batch(8, seed))
    untouched = {name for name in before if name.removeprefix("network.").startswith(("conv1.", "bn1.", "layer1."))}
    assert untouched | {"normalize.mean", "normalize.std"} == set(before) - changed(model, before)
    assert any("running_mean" in name for name in untouched)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in untouched)


@pytest.mark.usefixtures("_process_group")
def test_warm_up_leaves_frozen_norms_in_evaluation() -> None:
    model = resnet()
    freeze(model, ["layer1.*"])
    state = make_state(model)
    before = copy_of(model)
    warm_up.warm_up_training(state, random_batch(4))
    assert changed(model, before) == set()
    assert not model.network.layer1[0].bn1.training
    assert model.network.layer2[0].bn1.training


@pytest.mark.usefixtures("_process_group")
def test_frozen_whitening_bias_stays_frozen() -> None:
    for patterns, trained in ((["whitening.bias"], False), ((), True)):
        model = build_model("speedrun96_proxy", 10, mean=[0.5] * 3, std=[0.25] * 3)
        freeze(model, patterns)
        state = make_state(model, whiten_bias_epochs=1)
        set_whitening_bias_grad(state, 0)
        assert model.network.whitening.bias.requires_grad is trained


def test_training_mode_is_set_in_one_place_only() -> None:
    from helpers.training import ROOT

    for package in ("train", "tools"):
        for source in (ROOT / package).rglob("*.py"):
            assert "forward.train()" not in source.read_text(), source


def _steps(ranks: Ranks) -> tuple[set[str], dict[str, Tensor]]:
    model = resnet()
    freeze(model, ["conv1.*", "bn1.*", "layer1.*"])
    before = copy_of(model)
    state = make_state(model)
    set_training_mode(state.forward)
    for seed in range(2):
        train_step(state, random_batch(4, 10 * seed + ranks.rank))
    return changed(model, before), {name: one.detach() for name, one in model.named_parameters()}


def test_frozen_parameters_and_norms_stay_unchanged_on_two_ranks() -> None:
    (names, first), (other_names, second) = on_ranks(2, _steps)
    frozen = ("network.conv1.", "network.bn1.", "network.layer1.", "normalize.")
    assert names == other_names
    assert not any(name.startswith(frozen) for name in names)
    assert {name for name in first if not name.startswith(frozen)} <= names
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("_process_group")
def test_epoch_keeps_frozen_norms_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resnet()
    freeze(model, ["layer1.*"])
    state = make_state(model)

    class Empty:
        position = Position(0)
        wait_s = 0.0
        stages = (None,)

        def at(self, epoch: int) -> Any:
            return self

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[Any]:
            yield random_batch(4)

    model.eval()
    loop.train_epoch(state, Empty(), seed=0, rank=0)  # type: ignore[arg-type]
    assert not model.network.layer1[0].bn1.training
    assert model.network.layer1.training
    assert state.device == CPU
