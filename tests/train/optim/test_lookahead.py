"""Lookahead, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.schema import LookaheadConfig
from train.optim.averaging import Lookahead, build_lookahead, kept_share


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_it_equals_its_formula_for_weights_and_statistics_and_ends_with_the_slow_copy() -> None:
    ours, config = network(), LookaheadConfig(every_steps=3, decay=0.8)
    lookahead = Lookahead(ours, config)
    fast = {name: value.clone() for name, value in network().state_dict().items() if value.is_floating_point()}
    slow = {name: value.clone() for name, value in fast.items()}
    updates = 10
    for update in range(updates):
        for number, (name, value) in enumerate(fast.items()):
            change = 0.01 * (update + 1) * (number + 1)
            value += change
            ours.state_dict()[name].add_(change)
        lookahead.update(update, updates)
        if update in (2, 5, 8):
            kept = 0.8 * ((update + 1) / updates) ** 3
            for name in fast:
                slow[name] = kept * slow[name] + (1 - kept) * fast[name]
                fast[name] = slow[name].clone()
    for name in fast:
        torch.testing.assert_close(ours.state_dict()[name], slow[name])
        assert not torch.allclose(fast[name], slow[name])  # the last update was taken back


def test_the_decay_grows_with_the_cube_of_the_progress_to_its_setting() -> None:
    config = LookaheadConfig(every_steps=1, decay=0.8)
    assert [kept_share(progress, config) for progress in (0, 0.5, 1)] == pytest.approx([0, 0.1, 0.8])


def test_without_a_number_of_steps_there_is_none() -> None:
    assert build_lookahead(network(), LookaheadConfig()) is None
