"""Non-finite losses, weights and optimizer states raise an error on all ranks."""

from __future__ import annotations

import pytest
import torch

from configs.schema import ProxyConfig
from helpers.training import alone, make_state, on_ranks, random_batch, small_net
from train.distributed.process_group import Ranks
from train.engine.hard_samples import HardSampleSelector
from train.engine.state import TrainState
from train.engine.step import train_step
from train.optim.nonfinite import FiniteCheck, NonFiniteError

STATE = "the weights or the optimizer's state are"


def stepped() -> TrainState:
    state = make_state(small_net())
    train_step(state, random_batch(8, classes=12))
    return state


def test_finite_sums_are_returned_unchanged() -> None:
    with alone():
        state = stepped()
        assert torch.equal(FiniteCheck(state).sums(1), state.sums)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["loss", "weights", "statistics", "momentum"])
def test_single_nonfinite_value_is_found(what: str, value: float) -> None:
    with alone():
        state = stepped()
        health = FiniteCheck(state)
        health.sums(10)
        place = {
            "loss": state.sums,
            "weights": state.network.get_parameter("head.weight").data.view(-1),
            "statistics": state.network.get_buffer("norm.running_var"),
            "momentum": next(iter(state.optimizer.state.values()))["exp_avg"].view(-1),
        }[what]
        place[0] = value
        with pytest.raises(NonFiniteError) as found:
            health.sums(20)
        assert found.value.what == ("the loss is" if what == "loss" else STATE)
        assert found.value.steps == "steps 11 to 20"


@pytest.mark.parametrize("what", ["weights", "momentum"])
def test_proxy_state_is_checked_too(what: str) -> None:
    with alone():
        state = stepped()
        state.proxy = HardSampleSelector(stepped(), ProxyConfig(model="lenet"))
        health, proxys = FiniteCheck(state), state.proxy.state
        health.sums(1)
        place = {
            "weights": next(proxys.network.parameters()).data,
            "momentum": next(iter(proxys.optimizer.state.values()))["exp_avg"],
        }[what]
        place.view(-1)[0] = float("inf")
        with pytest.raises(NonFiniteError, match=STATE):
            health.sums(2)


@pytest.mark.parametrize(("begin", "done", "steps"), [(0, 1, "step 1"), (7, 8, "step 8"), (7, 9, "steps 8 to 9")])
def test_error_names_steps_since_last_good_check(begin: int, done: int, steps: str) -> None:
    with alone():
        state = stepped()
        health = FiniteCheck(state)
        health.start(begin)
        state.sums[0] = float("nan")
        with pytest.raises(NonFiniteError) as found:
            health.sums(done)
        assert found.value.steps == steps


def found_on(ranks: Ranks, bad_rank: int, what: str) -> str:
    state = stepped()
    if ranks.rank == bad_rank:
        (state.sums if what == "loss" else state.network.get_buffer("norm.running_mean"))[0] = float("inf")
    try:
        FiniteCheck(state).sums(5)
    except NonFiniteError as found:
        return f"{found.what} {found.steps}"
    return "nothing"


@pytest.mark.parametrize("what", ["loss", "statistics"])
def test_nonfinite_value_on_one_rank_is_reported_on_all(what: str) -> None:
    expected = "the loss is steps 1 to 5" if what == "loss" else f"{STATE} steps 1 to 5"
    assert on_ranks(2, found_on, 1, what) == [expected] * 2
