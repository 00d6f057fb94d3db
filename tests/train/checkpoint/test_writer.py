"""Background writes: their contents, what training waits for, and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.utils.errors import UserError
from helpers.training import alone, make_state, random_batch, small_net
from pipelines.interfaces import Position
from train.checkpoint import store
from train.checkpoint.progress import RunInfo
from train.checkpoint.writer import CheckpointWriter
from train.engine.state import TrainState
from train.engine.step import train_step

POSITION = Position(0, 1)
RUN = RunInfo({}, "a", {})


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def state() -> TrainState:
    state = make_state(small_net())
    train_step(state, random_batch(8, classes=12))
    return state


def save(saving: CheckpointWriter, state: TrainState, *names: str, steps: int = 1) -> None:
    saving.save(names or ("last.pt",), POSITION, state.sums, steps)


class Held:
    """Replaces store.write, and waits for permission."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[dict[str, Any]] = []
        self.may_write, self._write = threading.Event(), store.write
        monkeypatch.setattr(store, "write", self)

    def __call__(self, path: Path, content: dict[str, Any]) -> None:
        assert self.may_write.wait(timeout=60)
        self._write(path, content)
        self.written.append(content)


def test_background_write_saves_the_state_at_the_call(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    before = {name: value.clone() for name, value in state.network.state_dict().items()}
    with CheckpointWriter(tmp_path, state, RUN) as saving:
        save(saving, state, "best.pt")
        assert held.written == []  # save has returned before the write
        for seed in range(3):
            train_step(state, random_batch(8, seed=seed, classes=12))
        held.may_write.set()
        saving.wait()
    content = store.load(tmp_path / "best.pt")
    assert (content["config"], content["position"]) == ("a", asdict(POSITION))
    assert all(torch.equal(content["model"][name], value) for name, value in before.items())
    assert not torch.equal(state.network.state_dict()["head.weight"], before["head.weight"])


def test_one_checkpoint_is_written_at_a_time(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with CheckpointWriter(tmp_path, state, RUN) as saving:
        save(saving, state, "best.pt")
        threading.Timer(0.1, held.may_write.set).start()
        save(saving, state, "best.pt")
        assert len(held.written) >= 1  # the first is complete before the second starts
    assert len(held.written) == 2


def test_previous_checkpoint_is_kept_beside_best(state: TrainState, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, state, RUN) as saving:
        for number in range(3):
            saving.save(("best.pt", "last.pt"), Position(number), state.sums, number)
    positions = {path.name: store.load(path)["position"]["epoch"] for path in tmp_path.iterdir()}
    assert positions == {"last.pt": 2, "previous.pt": 1, "best.pt": 2}
    assert (saving.newest, saving.steps) == (tmp_path / "last.pt", 2)


@pytest.mark.parametrize("through", ["check", "wait", "save"])
def test_write_error_is_raised_once_by_the_next_call(
    through: str, state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, _: Any) -> None:
        raise UserError(f"cannot write {path}")

    with monkeypatch.context() as patch, CheckpointWriter(tmp_path, state, RUN) as saving:
        patch.setattr(store, "write", fail)
        save(saving, state, "best.pt")
        assert saving._write is not None
        saving._write.exception(timeout=60)  # wait for the failure
        with pytest.raises(UserError, match="cannot write"):
            save(saving, state) if through == "save" else getattr(saving, through)()
        saving.check()
        saving.wait()


def test_exit_waits_for_a_write_in_progress(state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)

    def save_and_fail() -> None:
        with CheckpointWriter(tmp_path, state, RUN) as saving:
            save(saving, state)
            threading.Timer(0.1, held.may_write.set).start()
            raise KeyError  # any error that ends a run

    with pytest.raises(KeyError):
        save_and_fail()
    assert store.load(tmp_path / "last.pt")["position"] == asdict(POSITION)
