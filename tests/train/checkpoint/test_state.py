"""The contents of checkpoints: the copy in host memory, and the types of entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.utils.errors import UserError
from helpers.checkpoints import STATE, stepped_training
from helpers.training import random_batch
from helpers.trees import assert_equal_trees
from train.checkpoint import format, store
from train.checkpoint.state import collect_state, to_host
from train.engine.step import train_step

pytestmark = pytest.mark.usefixtures("group_unless_gpu")


@pytest.mark.parametrize(
    "crafted",
    [
        {"model": [1]},
        {"model": {"weight": 3}},
        {"model": {3: torch.zeros(3)}},
        {"optimizer": []},
        {"scaler": 1},
        {"sums": [0.0] * 3},
        {"lookahead": None},
        {"ema": {"weight": "much"}},
        {"proxy": "none"},
        {"position": {}},
        {"position": {"epoch": -1, "step": 0}},
        {"position": {"epoch": 1.5, "step": 0}},
        {"position": None},
        {"progress": 0.5},
        {"stream": "a"},
        {"config": {"seed": 0}},
        {"dataset": ["cat"]},
    ],
    ids=str,
)
def test_entry_of_wrong_type_is_named(crafted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"
    store.write(path, {"format": format.FORMAT, "model": {}, **STATE, **crafted})
    with pytest.raises(UserError, match=rf"crafted\.pt cannot be read \(its '{next(iter(crafted))}' is not what"):
        store.load(path)


def test_host_copy_is_independent_and_keeps_strides_and_versions() -> None:
    state = stepped_training()
    weights = state.network.state_dict()
    weights["filters"] = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    content = collect_state(state, state.sums, extra={"weights": weights, 3: (1, None, True, "text")})
    copied = to_host(content)
    assert_equal_trees(copied, content)
    assert copied["extra"]["weights"]["filters"].is_contiguous(memory_format=torch.channels_last)
    assert copied["model"]._metadata == state.network.state_dict()._metadata
    before = state.network.state_dict()["network.fc3.weight"].clone()
    train_step(state, random_batch(8, seed=1))
    assert torch.equal(copied["model"]["network.fc3.weight"], before)
    assert torch.equal(content["model"]["network.fc3.weight"], state.network.state_dict()["network.fc3.weight"])
    assert not torch.equal(content["model"]["network.fc3.weight"], before)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_copy_from_gpu_is_pinned_complete_and_keeps_strides() -> None:
    filters = torch.rand(64, 64, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    expected = filters.cpu()
    copied = to_host({"model": {"filters": filters, "count": torch.tensor(3, device="cuda")}})["model"]
    filters.zero_()
    assert torch.equal(copied["filters"], expected)
    assert copied["filters"].is_pinned()
    assert copied["filters"].stride() == filters.stride()
    assert int(copied["count"]) == 3


@pytest.mark.parametrize("value", [np.float64(0.5), Path("a"), {1, 2}, b"bytes"], ids=str)
def test_unloadable_values_are_not_saved(value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold a "):
        to_host({"progress": {"value": value}})
