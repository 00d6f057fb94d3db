"""--extend: more epochs for a run, on every schedule, exact after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import parse_config
from configs.utils.errors import UserError
from helpers import recorded_runs
from helpers.training import DIGITS, Run, run_here, strict_lines
from train.checkpoint import store

# Trained on the 360 digits of val: 7 steps of 48 samples per epoch. Everything that a run may keep beside its weights.
OPTIONS = ["data.train_split=val", "data.batch_size=48", "train.save_every_steps=3", "train.ema.decay=0.9",
           "train.ema.warmup=true", "aug.flip=0.5", "aug.flip_mode=alternating", "train.warmup_epochs=0"]  # fmt: skip
SCHEDULES = {
    "cosine": ["train.lookahead.every_steps=3"],
    "linear": ["train.warmup_epochs=1", "train.min_lr=1e-4"],
    "polynomial": ["train.schedule_options.power=2", "train.schedule_options.per_epoch=true"],
    "one-cycle": ["train.optimizer.name=sgd"],
    "constant": [],
    "step": ["train.schedule_options.epochs=1.5"],
    "multistep": ["train.schedule_options.milestones=[1, 3]"],
    "exponential": ["train.warmup_epochs=0.5"],
    "plateau": ["train.schedule_options.patience=0", "train.schedule_options.threshold=1"],
}
SPANNING = ("cosine", "linear", "polynomial", "one-cycle")  # their rates depend on the number of epochs
PARTS = ("model", "optimizer", "ema", "lookahead", "sums", "position", "progress")
RESULTS = ("epoch", "step", "lr", "train_loss", "val_loss", "ema_val_loss")


def options_of(schedule: str, epochs: int) -> list[str]:
    return [*OPTIONS, f"train.schedule={schedule}", *SCHEDULES[schedule], f"train.epochs={epochs}"]


def train(data: Path, output: Path, options: list[str], *flags: str, stop_at: dict[str, int] | None = None) -> None:
    command = ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", *flags, "--opts"]
    run_here(*command, *options, stop_at=stop_at)


def folder_of(output: Path) -> Path:
    return output / "digits_lenet"


def content_of(output: Path, name: str = "last.pt") -> Any:
    return store.load(folder_of(output) / name)


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in RESULTS} for line in strict_lines(folder_of(output) / "metrics.jsonl")]


def assert_same_state(ours: Any, theirs: Any) -> None:
    for part in PARTS:
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


FAST = ("cosine", "plateau")  # one of each kind
PARAMETERS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SCHEDULES]


@pytest.fixture(scope="module", params=PARAMETERS)
def short(
    request: pytest.FixtureRequest, digits_run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A schedule, and the output folder of a finished run of two epochs; to be copied."""
    output = tmp_path_factory.mktemp("short")
    train(digits_run.data, output, options_of(request.param, 2))
    return request.param, output


def test_extended_run_continues_its_state_on_the_schedule_of_a_longer_one(
    short: tuple[str, Path], digits_run: Run, tmp_path: Path
) -> None:
    schedule, finished = short
    whole, ours, killed = tmp_path / "whole", tmp_path / "ours", tmp_path / "killed"
    train(digits_run.data, whole, options_of(schedule, 4))
    for output in (ours, killed):
        shutil.copytree(finished, output)
    train(digits_run.data, ours, options_of(schedule, 4), "--extend")
    expected, found = lines_of(whole), lines_of(ours)
    assert [line["step"] for line in found] == [7, 14, 21, 28]
    assert found[:2] == lines_of(finished)
    assert [line["lr"] for line in found[2:]] == [line["lr"] for line in expected[2:]]
    if schedule not in SPANNING:  # nothing depends on the number of epochs: the run is that of four epochs
        assert found == expected
        assert_same_state(content_of(ours), content_of(whole))

    # Killed right after the extension, and again within an epoch; resumed without --extend.
    train(digits_run.data, killed, options_of(schedule, 4), "--extend", stop_at={"epoch": 2, "step": 0})
    assert_same_state(content_of(killed), content_of(finished))
    assert parse_config(content_of(killed)["config"], "").train.epochs == 4
    train(digits_run.data, killed, options_of(schedule, 4), stop_at={"epoch": 3, "step": 3})
    train(digits_run.data, killed, options_of(schedule, 4))
    assert lines_of(killed) == found
    assert_same_state(content_of(killed), content_of(ours))
    log = (folder_of(killed) / "log.txt").read_text()
    assert log.count(f"extended from 2 to 4 epochs: the {schedule} schedule ") == 1


@pytest.mark.slow
def test_extended_run_that_is_killed_ends_like_an_extended_one(digits_run: Run, tmp_path: Path) -> None:
    outputs = [tmp_path / "unbroken", tmp_path / "killed"]
    train(digits_run.data, outputs[0], options_of("cosine", 2))
    shutil.copytree(*outputs)
    command, broken = (
        ["--cfg", DIGITS, "--data-path", digits_run.data, "--output", output, "--resume", "auto", "--opts",
         *options_of("cosine", 4), "train.save_every_steps=1"]
        for output in outputs
    )  # fmt: skip
    assert recorded_runs.run([*command, "--extend"], outputs[0] / "notes") == 0
    process = recorded_runs.start([*broken, "--extend"], outputs[1] / "notes", step_s=0.05)
    assert recorded_runs.kill_when(lambda: recorded_runs.saved_position(folder_of(outputs[1])) >= (3, 1), process)
    assert recorded_runs.run(broken, outputs[1] / "notes") == 0, recorded_runs.printed(outputs[1] / "notes")
    assert recorded_runs.differences(folder_of(outputs[1]), folder_of(outputs[0])) == []
    assert_same_state(content_of(outputs[1]), content_of(outputs[0]))


def test_extension_says_where_the_learning_rate_goes(digits_run: Run, tmp_path: Path) -> None:
    options = [*OPTIONS, "train.lr=0.01", "train.warmup_epochs=2", "train.schedule=linear", "train.ema.decay=null"]
    train(digits_run.data, tmp_path, [*options, "train.epochs=1"])
    train(digits_run.data, tmp_path, [*options, "train.epochs=4"], "--extend")
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert (
        "extended from 1 to 4 epochs: the linear schedule had come to lr 0.01 and from step 8, epoch 2, on follows "
        "that of 4 epochs, which is there at lr 0.005714; the warm-up lasts 2 epochs instead of 1\n"
    ) in log  # 8 / 14 of the warm-up


def test_unfinished_run_is_extended_within_an_epoch(digits_run: Run, tmp_path: Path) -> None:
    whole, ours = tmp_path / "whole", tmp_path / "ours"
    train(digits_run.data, whole, options_of("multistep", 3))
    train(digits_run.data, ours, options_of("multistep", 2), stop_at={"epoch": 1, "step": 2})
    train(digits_run.data, ours, options_of("multistep", 3), "--extend")
    assert lines_of(ours) == lines_of(whole)
    assert_same_state(content_of(ours), content_of(whole))


def test_more_epochs_are_refused_without_extend_and_fewer_always(digits_run: Run, tmp_path: Path) -> None:
    train(digits_run.data, tmp_path, options_of("cosine", 2))
    before = {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir() if path.name != "lock"}
    for epochs, flags, message in (
        (3, [], r"train.epochs: 2 then, 3 now\).*; add --extend to train up to 3 epochs$"),
        (1, ["--extend"], r"train.epochs: 2 then, 1 now\).* without --resume$"),
    ):
        with pytest.raises(UserError, match=message):
            train(digits_run.data, tmp_path, options_of("cosine", epochs), *flags)
    with pytest.raises(UserError, match=r"differ \(seed: 0 then, 1 now\); restore"):
        train(digits_run.data, tmp_path, [*options_of("cosine", 3), "seed=1"], "--extend")
    assert {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir() if path.name != "lock"} == before
    with pytest.raises(UserError, match="--extend needs a run to train longer; give --resume"):
        run_here("--cfg", DIGITS, "--data-path", digits_run.data, "--output", tmp_path, "--extend")


def test_extend_of_a_run_with_these_epochs_changes_nothing(digits_run: Run, tmp_path: Path) -> None:
    train(digits_run.data, tmp_path, options_of("cosine", 2), "--extend")  # a new run
    train(digits_run.data, tmp_path, options_of("cosine", 2), "--extend")
    log = (folder_of(tmp_path) / "log.txt").read_text()
    assert "nothing to do" in log
    assert "extended" not in log
