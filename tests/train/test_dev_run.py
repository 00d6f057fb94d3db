"""--fast-dev-run: everything that a run does, in a few steps, with nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train.trainer
from helpers.launches import end_of_commands
from helpers.training import DIGITS, Run, after_each_save
from train.engine.evaluate import evaluate
from train.reporting.run_log import RunLog

WORKED = (
    "fast dev run: trained 2 steps, evaluated, saved, resumed, trained 2 more steps and evaluated again; all worked, "
    "and nothing was kept\n"
)
Call = Callable[..., tuple[int, str, str]]


def arguments(data: Path, output: Path, *options: str) -> list[str | Path]:
    return [
        "--cfg",
        DIGITS,
        "--data-path",
        data,
        "--output",
        output,
        "--fast-dev-run",
        "--opts",
        "log.images=false",
        *options,
    ]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["train.epochs=1", "train.warmup_epochs=0", "train.patience=1", "data.batch_size=256"],
        ["data.stages=[{epoch: 1, batch_size: 16}]", "train.accumulation_steps=2", "train.ema.decay=0.9"],
        ["train.first_epoch=3", "data.limit=0.5", "log.tensorboard=true", "log.wandb.project=zhu"],
    ],
    ids=["plain", "short", "stages", "trackers"],
)
def test_dev_run_trains_evaluates_saves_and_resumes_without_a_trace(
    options: list[str], digits_run: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counted(state: Any, loader: Any, samples: int, *others: Any) -> Any:
        evaluated.append(samples)
        return evaluate(state, loader, samples, *others)

    monkeypatch.setattr(train.trainer, "evaluate", counted)
    steps: list[int] = []
    monkeypatch.setattr(RunLog, "log_step", lambda _, values, step: steps.append(step))
    saved: list[dict[str, int]] = []
    with after_each_save(lambda name, position: saved.append(position) if name == "last.pt" else None):
        code, out, err = call(*arguments(digits_run.data, tmp_path / "new" / "output", *options))
    assert (code, err) == (0, "")
    assert out.endswith(WORKED)
    assert out.count("resumed from") == 1
    assert "zhu show" not in out
    assert "the run is in" not in out
    assert steps == [1, 2, 3, 4]
    assert len(saved) == 2
    assert len(evaluated) in (2, 4)  # four with a moving average
    assert max(evaluated) <= 2 * 256
    assert list(tmp_path.iterdir()) == []


def test_failed_dev_run_leaves_nothing(
    digits_run: Run, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("a bug in the evaluation")

    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "earlier").touch()
    monkeypatch.setattr(train.trainer, "evaluate", fail)
    with pytest.raises(ValueError, match="a bug in the evaluation"):
        call(*arguments(digits_run.data, tmp_path / "output"))
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["earlier"]


def test_dev_run_is_refused_with_other_purposes_and_unusable_output(
    digits_run: Run, tmp_path: Path, call: Call
) -> None:
    for flags in (["--resume", "auto"], ["--throughput"]):
        code, _, err = call(*flags, *arguments(digits_run.data, tmp_path))
        assert (code, "--fast-dev-run starts a run of its own; leave out" in err) == (2, True)
    code, _, err = call(*arguments(digits_run.data, DIGITS))
    assert (code, err.startswith(f"error: cannot write to {DIGITS}: ")) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dev_run_works_on_two_ranks(digits_run: Run, tmp_path: Path) -> None:
    command = [*map(str, arguments(digits_run.data, tmp_path / "output", "data.batch_size=32"))]
    ended = end_of_commands(tmp_path, [command] * 2)
    assert ended.codes == [0, 0], ended.printed
    assert ended.printed.count(WORKED) == 1
    assert not (tmp_path / "output").exists()
