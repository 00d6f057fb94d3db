"""A loss that becomes nan is found within one log interval on all ranks, and the good checkpoint stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from helpers.faults import command_with, content, digits_in, run_arguments, run_to_its_end
from helpers.training import strict_lines

NAN_AT = 36  # counted from 0; detected after 40 steps


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_in(tmp_path_factory.mktemp("nonfinite"))


def run(digits: Path, output: Path, *opts: str, processes: int = 0, **faults: object) -> tuple[int, str, str]:
    options = [f"data.batch_size={64 // max(processes, 1)}", *opts]
    command = command_with({"nan_at": [NAN_AT], **faults}, run_arguments(digits, output, *options), processes)
    done = run_to_its_end(command)
    return done.returncode, done.stdout, done.stderr


def weights_are_finite(folder: Path, name: str = "last.pt") -> bool:
    return all(bool(value.isfinite().all()) for value in content(folder / name)["model"].values())


def test_stop_ends_within_a_log_interval_and_keeps_the_checkpoint(digits: Path, tmp_path: Path) -> None:
    code, out, err = run(digits, tmp_path)
    folder = tmp_path / "digits_lenet"
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(
        f"error: the loss is not finite in steps 31 to 40; the last good checkpoint is {folder / 'last.pt'} of step 30;"
    )
    assert "step 40:" not in out
    assert content(folder / "last.pt")["position"] == {"epoch": 1, "step": 8}
    assert weights_are_finite(folder)


def test_rewind_skips_the_steps_and_completes(digits: Path, tmp_path: Path) -> None:
    code, out, err = run(digits, tmp_path, "train.on_nonfinite=rewind")
    folder = tmp_path / "digits_lenet"
    assert (code, err) == (0, "")
    assert f"rewound to {folder / 'last.pt'} of step 30; skipping steps 31 to 40" in out
    lines = strict_lines(folder / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert all(math.isfinite(line["train_loss"]) for line in lines)
    assert content(folder / "last.pt")["progress"]["passed_over"] == [[31, 40]]
    assert weights_are_finite(folder)
    assert lines[-1]["val_top1"] > 0.8


def test_skip_omits_only_that_step_and_completes(digits: Path, tmp_path: Path) -> None:
    code, out, err = run(digits, tmp_path, "train.on_nonfinite=skip")
    assert (code, err) == (0, "")
    assert "step 40: 1 of the last 10 steps skipped, since their gradients were not finite" in out
    assert content(tmp_path / "digits_lenet" / "last.pt")["progress"]["left_out"] == 1
    assert strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")[-1]["val_top1"] > 0.8


@pytest.mark.campaign
def test_nan_at_every_step_ends_the_run_in_all_modes(digits: Path, tmp_path: Path) -> None:
    always = {"nan_at": [*range(NAN_AT, 1000)]}
    code, _, err = run(digits, tmp_path / "rewind", "train.on_nonfinite=rewind", **always)
    assert code == 2
    assert "and the run has been rewound 5 times already; lower train.lr" in err
    code, _, err = run(digits, tmp_path / "skip", "train.on_nonfinite=skip", **always)
    assert code == 2
    assert "train.on_nonfinite=skip skipped all of them; the last good checkpoint is" in err
    for name in ("rewind", "skip"):
        assert weights_are_finite(tmp_path / name / "digits_lenet")


@pytest.mark.campaign
@pytest.mark.parametrize("setting", ["stop", "rewind", "skip"])
def test_nan_on_one_rank_is_found_by_all_three(setting: str, digits: Path, tmp_path: Path) -> None:
    code, out, err = run(digits, tmp_path, f"train.on_nonfinite={setting}", processes=3, rank=2)
    folder = tmp_path / "digits_lenet"
    assert weights_are_finite(folder)
    if setting == "stop":
        assert code != 0
        assert "the loss is not finite in steps 31 to 40" in err
        assert content(folder / "last.pt")["position"] == {"epoch": 1, "step": 8}
    else:
        assert code == 0, err
        assert ("rewound to" in out) == (setting == "rewind")
        assert len(strict_lines(folder / "metrics.jsonl")) == 6


@pytest.mark.campaign
def test_resumed_run_skips_the_same_steps(digits: Path, tmp_path: Path) -> None:
    code, _, _ = run(digits, tmp_path, "train.on_nonfinite=stop")
    assert code == 2
    options = ["train.on_nonfinite=rewind"]
    command = run_arguments(digits, tmp_path, *options)
    done = run_to_its_end(command_with({"nan_at": [NAN_AT]}, [*command, "--resume", "auto"]))
    assert (done.returncode, done.stderr) == (0, "")
    code, _, _ = run(digits, tmp_path / "at once", *options)
    assert code == 0
    ours, theirs = (content(at / "digits_lenet" / "last.pt")["model"] for at in (tmp_path, tmp_path / "at once"))
    assert all(bool((ours[name] == value).all()) for name, value in theirs.items())
