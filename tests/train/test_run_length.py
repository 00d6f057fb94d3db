"""Runs that end early, keep checkpoints of epochs, or choose the best one by another result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train.trainer
from helpers import recorded_runs
from helpers.launches import end_of_commands
from helpers.training import DIGITS, Run, run_here, strict_lines
from tools.runs.records import read_run
from train.checkpoint import store
from train.engine.evaluate import Evaluation

# Trained on the 360 digits of val: 7 steps of 48 samples per epoch. Everything that a run may keep beside its weights.
STEPS = 7
OPTIONS = ["data.train_split=val", "data.batch_size=48", "train.save_every_steps=3", "train.ema.decay=0.9",
           "train.lookahead.every_steps=3", "train.warmup_epochs=0.5", "aug.flip=0.5"]  # fmt: skip
PARTS = ("model", "optimizer", "ema", "lookahead", "sums", "position", "progress")
RESULTS = ("epoch", "step", "lr", "train_loss", "val_loss", "ema_val_loss")


def arguments(data: Path, output: Path, *options: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", "--opts", *OPTIONS, *options]


def folder_of(output: Path) -> Path:
    return output / "digits_lenet"


def saved_position(output: Path) -> tuple[int, int]:
    return recorded_runs.saved_position(folder_of(output))


def lines_of(output: Path, *keys: str) -> list[dict[str, Any]]:
    lines = strict_lines(folder_of(output) / "metrics.jsonl")
    return [{key: line.get(key) for key in keys} for line in lines] if keys else lines


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Compare the last checkpoints bitwise, and the metrics of all epochs."""
    one, other = (store.load(folder_of(output) / "last.pt") for output in (ours, theirs))
    for part in PARTS:
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert lines_of(ours, *RESULTS) == lines_of(theirs, *RESULTS)


@pytest.fixture(scope="module")
def whole(digits_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an unbroken run of three epochs; read only."""
    output = tmp_path_factory.mktemp("whole")
    run_here(*arguments(digits_run.data, output, "train.epochs=3"))
    return output


# train.max_steps


def test_max_steps_stops_within_an_epoch_evaluates_and_continues_bitwise(
    whole: Path, digits_run: Run, tmp_path: Path
) -> None:
    run_here(*arguments(digits_run.data, tmp_path, "train.epochs=3", "train.max_steps=10"))
    content = store.load(folder_of(tmp_path) / "last.pt")
    assert (content["position"], content["progress"]["stopped_at"]) == ({"epoch": 1, "step": 3}, 10)
    lines, unbroken = lines_of(tmp_path), lines_of(whole)
    assert [(line["epoch"], line["step"], line.get("stopped_early")) for line in lines] == [(0, 7, None), (1, 10, 1)]
    assert lines[1]["val_top1"] is not None
    assert unbroken[1]["lr"] < lines[1]["lr"] < unbroken[0]["lr"]  # on the schedule of three epochs
    assert read_run(folder_of(tmp_path)).is_finished
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert "stopped early: 10 steps are done (train.max_steps=10)" in log

    run_here(*arguments(digits_run.data, tmp_path, "train.epochs=3", "train.max_steps=10"))
    assert "nothing to do" in (folder_of(tmp_path) / "log.txt").read_text()
    assert lines_of(tmp_path) == lines
    run_here(*arguments(digits_run.data, tmp_path, "train.epochs=3"))
    assert_same_run(tmp_path, whole)


def test_run_killed_before_max_steps_ends_like_an_unbroken_one(digits_run: Run, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    limit = ["train.epochs=3", "train.max_steps=11"]
    run_here(*arguments(digits_run.data, unbroken, *limit))
    run_here(*arguments(digits_run.data, broken, *limit), stop_at={"epoch": 1, "step": 2})
    run_here(*arguments(digits_run.data, broken, *limit))
    assert_same_run(broken, unbroken)


def test_max_steps_at_the_end_of_an_epoch_saves_that_epoch(digits_run: Run, tmp_path: Path) -> None:
    options = [
        "train.epochs=9",
        f"train.max_steps={2 * STEPS}",
        "train.save_every_epochs=5",
        "train.eval_every_epochs=5",
    ]
    run_here(*arguments(digits_run.data, tmp_path, *options))
    assert store.load(folder_of(tmp_path) / "last.pt")["position"] == {"epoch": 2, "step": 0}
    assert [line["val_top1"] is not None for line in lines_of(tmp_path)] == [False, True]


# train.patience


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Top-1 accuracies of the next evaluations. The loss has the same value, and top5 is constant."""
    values: list[float] = []
    monkeypatch.setattr(train.trainer, "evaluate", lambda *_: Evaluation(values[0], values.pop(0), 0.9, 360))
    return values


def without_average(*options: str) -> list[str]:
    return ["train.ema.decay=null", *options]


def test_run_stops_after_epochs_without_improvement_also_if_resumed(
    digits_run: Run, tmp_path: Path, accuracies: list[float]
) -> None:
    options = without_average("train.epochs=20", "train.patience=2", "train.save_every_epochs=4")
    accuracies += [0.5, 0.6, 0.6, 0.7, 0.7, 0.1]
    run_here(*arguments(digits_run.data, tmp_path, *options))
    assert accuracies == []
    assert len(lines_of(tmp_path)) == 6
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert "stopped early: no better val top1 in 2 epochs (train.patience=2)" in log
    assert read_run(folder_of(tmp_path)).is_finished
    assert store.load(folder_of(tmp_path) / "best.pt")["position"]["epoch"] == 4
    assert store.load(folder_of(tmp_path) / "last.pt")["progress"] == {"best_top1": 0.7, "stale_epochs": 2}

    broken = tmp_path / "broken"
    accuracies += [0.5, 0.6, 0.6, 0.7, 0.7]
    run_here(*arguments(digits_run.data, broken, *options), stop_at={"epoch": 5, "step": 4})
    assert store.load(folder_of(broken) / "last.pt")["progress"] == {"best_top1": 0.7, "stale_epochs": 1}
    accuracies += [0.1]
    run_here(*arguments(digits_run.data, broken, *options))
    assert_same_run(broken, tmp_path)

    run_here(*arguments(digits_run.data, broken, *options))
    assert "nothing to do" in (folder_of(broken) / "log.txt").read_text()
    accuracies += [0.1, 0.1]
    longer = [option.replace("patience=2", "patience=4") for option in options]
    run_here(*arguments(digits_run.data, broken, *longer))
    assert len(lines_of(broken)) == 8


@pytest.mark.parametrize(("every", "epochs"), [(1, 4), (2, 6)])
def test_patience_counts_epochs_not_evaluations(
    every: int, epochs: int, digits_run: Run, tmp_path: Path, accuracies: list[float]
) -> None:
    accuracies += [0.5] * 20
    options = without_average("train.epochs=20", "train.patience=3", f"train.eval_every_epochs={every}")
    run_here(*arguments(digits_run.data, tmp_path, *options))
    assert len(lines_of(tmp_path)) == epochs


# eval.best_by


@pytest.mark.parametrize(("best_by", "epoch"), [("top1", 1), ("loss", 3), ("top5", 1)])
def test_best_checkpoint_is_chosen_by_the_given_result(
    best_by: str, epoch: int, digits_run: Run, tmp_path: Path, accuracies: list[float]
) -> None:
    accuracies += [0.5, 0.4, 0.3]  # also the losses
    run_here(*arguments(digits_run.data, tmp_path, *without_average("train.epochs=3", f"eval.best_by={best_by}")))
    assert store.load(folder_of(tmp_path) / "best.pt")["position"]["epoch"] == epoch
    progress = store.load(folder_of(tmp_path) / "last.pt")["progress"]
    best = {"top1": {}, "loss": {"best_value": 0.3}, "top5": {"best_value": 0.9}}[best_by]
    assert progress == {"best_top1": 0.5, **best}


# train.keep_checkpoints


def test_kept_checkpoints_are_whole_and_continue_like_the_run(whole: Path, digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path, "train.epochs=3", "train.keep_checkpoints=every:2"))
    folder = folder_of(tmp_path)
    assert store.epoch_files(folder) == [folder / "epoch-2.pt"]
    assert store.load(folder / "epoch-2.pt")["position"] == {"epoch": 2, "step": 0}
    assert_same_run(tmp_path, whole)
    command = arguments(digits_run.data, tmp_path, "train.epochs=3", "train.keep_checkpoints=every:2")
    command[command.index("auto")] = folder / "epoch-2.pt"
    run_here(*command)
    assert_same_run(tmp_path, whole)
    for name in ("last.pt", "previous.pt", "best.pt"):
        (folder / name).unlink()
    run_here(*arguments(digits_run.data, tmp_path, "train.epochs=3"))
    assert f"resumed from {folder / 'epoch-2.pt'}" in (folder / "log.txt").read_text()
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_killed_run_of_four_epochs_ends_like_an_unbroken_one(digits_run: Run, tmp_path: Path) -> None:
    options = ["train.epochs=4", "train.save_every_steps=1", "data.limit=200", "data.train_split=train",
               "train.class_weights=balanced", "train.patience=3", "train.keep_checkpoints=every:2",
               "eval.best_by=loss"]  # fmt: skip
    outputs = [tmp_path / name for name in ("unbroken", "killed")]
    for output in outputs:
        output.mkdir()
    command, broken = (arguments(digits_run.data, output, *options) for output in outputs)
    assert recorded_runs.run(command, outputs[0] / "notes") == 0
    for position in ((0, 2), (2, 1)):  # of 4 steps per epoch
        process = recorded_runs.start(broken, outputs[1] / "notes", step_s=0.1)
        assert recorded_runs.kill_when(lambda at=position: saved_position(outputs[1]) >= at, process)
    assert recorded_runs.run(broken, outputs[1] / "notes") == 0, recorded_runs.printed(outputs[1] / "notes")
    assert recorded_runs.differences(folder_of(outputs[1]), folder_of(outputs[0])) == []
    samples = [recorded_runs.samples_of(output / "notes") for output in outputs]
    assert samples[0] == samples[1]
    assert len({sample.split()[0] for sample in samples[0].values()}) <= 200
    for output in outputs:
        assert [path.name for path in store.epoch_files(folder_of(output))] == ["epoch-4.pt", "epoch-2.pt"]


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(whole: Path, digits_run: Run, tmp_path: Path) -> None:
    halves = [option.replace("batch_size=48", "batch_size=24") for option in OPTIONS]
    command = ["--cfg", DIGITS, "--data-path", digits_run.data, "--output", tmp_path, "--opts", *halves]
    options = ["train.epochs=3", "train.max_steps=10", "train.patience=5"]
    ended = end_of_commands(tmp_path, [[*map(str, command), *options]] * 2)
    assert ended.codes == [0, 0], ended.printed
    assert store.load(folder_of(tmp_path) / "last.pt")["position"] == {"epoch": 1, "step": 3}
    assert lines_of(tmp_path)[0]["train_loss"] == pytest.approx(lines_of(whole)[0]["train_loss"], rel=1e-3)
