"""Times of epochs and runs do not depend on how often a run is stopped and resumed."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.utils.errors import UserError
from helpers.training import DIGITS, Run, run_here, strict_lines
from train.checkpoint import store
from train.engine import epoch, metrics
from train.engine.evaluate import EvaluationInterrupted

UPDATES, BATCH = 7, 48  # of each of two epochs over the 360 digits of val
TIMED = ["epoch_time_s", "images_per_s", "data_wait_fraction"]


@pytest.fixture(autouse=True)
def _clock_that_counts_its_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock by one second per reading, so that times are exact."""
    readings = count(1.0)
    monkeypatch.setattr(
        metrics,
        "time",
        SimpleNamespace(perf_counter=lambda: next(readings), clock_gettime=lambda _: 0.0, CLOCK_BOOTTIME=0),
    )


def arguments(data: Path, output: Path, *opts: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--resume", "auto", "--opts",
            "data.train_split=val", f"data.batch_size={BATCH}", "train.epochs=2", "train.warmup_epochs=0",
            "train.save_every_steps=1", "log.every_steps=100", *opts]  # fmt: skip


def times_of(output: Path) -> list[tuple[float, float]]:
    lines = strict_lines(output / "digits_lenet" / "metrics.jsonl")
    return [(line["epoch_time_s"], line["images_per_s"]) for line in lines]


def training_s(output: Path) -> float:
    """Return the time of the run as its last start reports it."""
    text = (output / "digits_lenet" / "log.txt").read_text()
    return float(re.findall(r"epochs and last evaluation ([\d.]+) s", text)[-1])


@pytest.mark.parametrize(
    ("stops", "last_s"),
    [
        ([], UPDATES + 1),  # a reading at each checkpoint and one at the end of the epoch
        ([3], UPDATES + 1),
        ([2, 3, 6], UPDATES + 1),
        ([4, UPDATES], UPDATES),  # the second time before its evaluation
    ],
    ids=["unbroken", "once", "several times", "before the evaluation"],
)
def test_epoch_time_includes_all_starts(stops: list[int], last_s: int, digits_run: Run, tmp_path: Path) -> None:
    for step in stops:
        run_here(*arguments(digits_run.data, tmp_path), stop_at={"epoch": 1, "step": step})
    run_here(*arguments(digits_run.data, tmp_path))
    images = UPDATES * BATCH
    assert times_of(tmp_path) == [(UPDATES + 1, images / (UPDATES + 1)), (last_s, images / last_s)]
    assert training_s(tmp_path) == UPDATES + 1 + last_s + 1  # and the last evaluation


def test_resume_between_epochs_adds_earlier_times(digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path), stop_at={"epoch": 1, "step": 0})
    run_here(*arguments(digits_run.data, tmp_path))
    assert [seconds for seconds, _ in times_of(tmp_path)] == [UPDATES + 1] * 2
    assert training_s(tmp_path) == 2 * (UPDATES + 1) + 1


def test_rewind_restores_times_of_checkpoint(digits_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_step: Callable[..., None] = epoch.run_step

    def fail_once(state: Any, batch: Any, number: int, *, optimizer_step: bool) -> None:
        run_step(state, batch, number, optimizer_step=optimizer_step)
        if number == 2 * UPDATES - 2:
            state.sums.fill_(float("nan"))

    monkeypatch.setattr(epoch, "run_step", fail_once)
    run_here(*arguments(digits_run.data, tmp_path, "train.save_every_steps=10", "train.on_nonfinite=rewind"))
    assert "rewound to" in (tmp_path / "digits_lenet" / "log.txt").read_text()
    # the checkpoint of step 10 and the end of the epoch; steps after that checkpoint do not count
    assert [seconds for seconds, _ in times_of(tmp_path)] == [1, 2]


def test_epoch_of_older_checkpoint_has_no_time(digits_run: Run, tmp_path: Path) -> None:
    run_here(*arguments(digits_run.data, tmp_path), stop_at={"epoch": 0, "step": 3})
    last = tmp_path / "digits_lenet" / "last.pt"
    content = store.load(last)
    assert content.pop("times") == {
        "training_s": pytest.approx(0, abs=1), "epoch_time_s": 3, "epoch_images": 3 * BATCH,
        "epoch_wait_s": pytest.approx(0, abs=60),
    }  # fmt: skip
    store.write(last, content)
    run_here(*arguments(digits_run.data, tmp_path))
    first, second = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [first[name] for name in TIMED] == [None] * 3
    assert (second["epoch_time_s"], second["images_per_s"]) == (UPDATES + 1, UPDATES * BATCH / (UPDATES + 1))
    assert "epochs and last evaluation" not in (tmp_path / "digits_lenet" / "log.txt").read_text()


def test_checkpoint_with_non_numeric_times_is_refused(digits_run: Run, tmp_path: Path) -> None:
    content = store.load(digits_run.folder / "last.pt")
    for times in ({"training_s": "long"}, {"epoch_time_s": True}, [1.0]):
        store.write(tmp_path / "last.pt", content | {"times": times})
        with pytest.raises(UserError, match=r"cannot be read \(its 'times' is not what train/ddp.py writes\)"):
            store.load(tmp_path / "last.pt")


def test_interrupted_evaluation_time_is_not_counted() -> None:
    timed = metrics.RunTimer()
    with pytest.raises(EvaluationInterrupted), timed:
        raise EvaluationInterrupted
    assert timed.training_s == 0
    with timed:
        pass
    assert timed.training_s == 1
