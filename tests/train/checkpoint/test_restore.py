"""Restoring a checkpoint into a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils.errors import UserError
from helpers.checkpoints import STATE, stepped_training
from helpers.training import lenet, make_state, random_batch, small_net
from helpers.trees import assert_equal_trees
from models import build_model
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.engine.step import train_step
from train.optim.factory import set_learning_rate

pytestmark = pytest.mark.usefixtures("group_unless_gpu")


def test_saved_state_is_restored_bitwise(intact: Path) -> None:
    saved, content = stepped_training(), store.load(intact)
    assert {key: content[key] for key in STATE} == STATE
    restored = make_state(lenet(seed=1))
    restore_state(restored, content, intact)
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())
    assert_equal_trees(restored.optimizer.state_dict(), saved.optimizer.state_dict())
    assert torch.equal(restored.sums, saved.sums)
    for state in (saved, restored):
        train_step(state, random_batch(8, seed=1))
    assert_equal_trees(restored.network.state_dict(), saved.network.state_dict())


def test_last_learning_rate_is_restored(tmp_path: Path) -> None:
    saved, restored = stepped_training(), make_state(lenet(seed=1))
    set_learning_rate(saved.optimizer, 1.25e-7)
    store.save(tmp_path / "last.pt", saved, saved.sums, **STATE)
    restore_state(restored, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert {group["lr"] for group in restored.optimizer.param_groups} == {1.25e-7}


@pytest.mark.parametrize(
    "crafted",
    [
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"sums": torch.zeros(2)},
        {"optimizer": {"state": {}, "param_groups": [3]}},
        {"optimizer": {"state": 3, "param_groups": 3}},
        {"model": {}},
        {"optimizer": "shapes"},
    ],
    ids=str,
)
def test_invalid_state_is_one_user_error(crafted: dict[str, Any], intact: Path) -> None:
    content = store.load(intact)
    if crafted == {"optimizer": "shapes"}:
        content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7, 7)
        crafted = {}
    with pytest.raises(UserError, match=r"last\.pt does not fit") as error:
        restore_state(make_state(lenet()), content | crafted, intact)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "sums"])
def test_missing_entry_is_named(part: str, intact: Path) -> None:
    content = store.load(intact)
    del content[part]
    with pytest.raises(UserError, match=rf"last\.pt has no {part}"):
        restore_state(make_state(lenet()), content, intact)


def test_checkpoint_of_another_model_is_a_user_error(intact: Path) -> None:
    other = make_state(build_model("lenet", 7, mean=[0.5] * 3, std=[0.5] * 3))
    with pytest.raises(UserError, match=r"does not fit the model of this config: .*fc3") as error:
        restore_state(other, store.load(intact), intact)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("then", "now"), [("off", "fp16"), ("fp16", "off")])
def test_run_may_resume_in_another_precision(then: str, now: str, tmp_path: Path) -> None:
    saved = stepped_training(amp=then)
    store.save(tmp_path / "last.pt", saved, saved.sums)
    state = make_state(lenet(seed=1), amp=now)
    restore_state(state, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert_equal_trees(state.network.state_dict(), saved.network.state_dict())
    train_step(state, random_batch(8))


def test_scale_of_float16_gradients_is_restored(tmp_path: Path) -> None:
    saved = stepped_training(amp="fp16")
    saved.scaler.update(2.0**7)
    store.save(tmp_path / "last.pt", saved, saved.sums)
    state = make_state(lenet(), amp="fp16")
    restore_state(state, store.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    assert state.scaler.get_scale() == 2.0**7


def test_optimizer_with_other_groups_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    saved, other = make_state(small_net()), make_state(small_net(), {"layer_decay": 0.5})
    for first, second in ((saved, other), (other, saved)):
        store.save(path, first, first.sums)
        with pytest.raises(UserError, match=r"last\.pt does not fit the optimizer of this config \(.*; start a new"):
            restore_state(second, store.load(path), path)
