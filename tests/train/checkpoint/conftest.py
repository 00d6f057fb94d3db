"""A process group and a checkpoint for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Config
from helpers.checkpoints import STATE, stepped_training
from helpers.training import DIGITS, alone
from train.checkpoint import store


@pytest.fixture
def group_unless_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Create a process group of one rank, except for tests on a GPU."""
    with nullcontext() if request.node.get_closest_marker("gpu") else alone():
        yield


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one step. Do not modify."""
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    with alone():
        state = stepped_training()
        store.save(path, state, state.sums, **STATE)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(DIGITS, ["name=net"], output=str(tmp_path))
