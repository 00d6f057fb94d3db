"""tools/find_lr.py: suggestions for loss curves, and steps equal to those of training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load_config
from configs.schema.optim import LookaheadConfig
from configs.utils.errors import UserError
from helpers.training import DIGITS, Run, alone, make_state, random_batch
from helpers.training import lenet as lenet_of
from pipelines.loader.batches import Batch, EvalBatches
from tools import find_lr
from tools.runs import find_lr_command
from tools.runs.find_lr_command import options_for, range_test
from tools.runs.lr_range import DELAY_DECADES, LossCurve, divergence_index, smooth_losses, suggest_lr
from train.engine.step import run_step
from train.optim.averaging import build_lookahead
from train.optim.schedule import scale_learning_rates

RATES = np.geomspace(1e-6, 10, 150)


def curve_of(losses: np.ndarray) -> LossCurve:
    rates = RATES[: len(losses)]
    return LossCurve(rates, losses, smooth_losses(list(losses), rates))


def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.03, len(RATES))


def descent(at: float) -> np.ndarray:
    """Return losses from 2.3 to 0.5, steepest at rate `at`, within about a decade. They rise from rate 1 on."""
    decades = np.log10(RATES)
    fall = 1.8 / (1 + np.exp(-6 * (decades - np.log10(at))))
    return 2.3 - fall + np.clip(decades, 0, None) ** 2 * 5


@pytest.mark.parametrize("at", [1e-4, 3e-3, 0.05])
def test_suggestion_is_where_loss_falls_most_steeply(at: float) -> None:
    suggestion = suggest_lr(curve_of(descent(at) + noise()))
    assert suggestion.lr is not None
    assert at / 1.5 < suggestion.lr < at * 3  # the smoothed loss lags a quarter of a decade behind
    assert suggestion.lr_at_minimum is not None
    assert suggestion.lr < suggestion.lr_at_minimum
    assert suggestion.tenth_of_minimum == suggestion.lr_at_minimum / 10


@pytest.mark.parametrize(
    "losses",
    [
        2.3 + noise(),
        2.3 + noise() + np.linspace(0, 3, len(RATES)),
        np.full(150, np.nan),
        np.full(150, np.inf),
        np.array([2.3, 2.2, 2.1]),
    ],
    ids=["flat", "rising", "nan", "infinite", "too short"],
)
def test_curve_without_clear_descent_gives_no_suggestion(losses: np.ndarray) -> None:
    suggestion = suggest_lr(curve_of(losses))
    assert (suggestion.lr, suggestion.tenth_of_minimum) == (None, None)
    assert suggestion.reason


def test_nonfinite_losses_at_the_end_are_ignored() -> None:
    losses = descent(1e-3) + noise()
    whole = suggest_lr(curve_of(losses))
    assert whole.lr is not None
    losses[-10:] = np.nan
    assert suggest_lr(curve_of(losses)) == whole


def test_smoothing_is_unbiased_and_lags_by_a_fixed_share() -> None:
    for count in (50, 500):
        rates = np.geomspace(1e-6, 10, count)
        assert smooth_losses([2.0] * count, rates) == pytest.approx(2.0)
        decades = np.log10(rates)
        assert decades[-1] - smooth_losses(list(decades), rates)[-1] == pytest.approx(DELAY_DECADES, rel=1e-3)


def test_divergence_is_the_first_loss_out_of_bounds() -> None:
    assert divergence_index(np.array([3.0, 2.0, 1.0, 3.9, 4.1, 1.0])) == 4
    assert divergence_index(np.array([3.0, 2.0, np.nan, 1.0])) == 2
    assert divergence_index(np.array([3.0, np.inf, 1.0])) == 1
    assert divergence_index(np.array([np.inf, 1.0, 1.0])) == divergence_index(np.array([np.nan, 1.0])) == 0
    assert divergence_index(np.array([3.0, 2.0, 7.9])) is None


class Repeated:
    """Loader that yields one batch twice per epoch."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.stages = (self,)
        self.plan = EvalBatches(0, 2 * len(batch.labels), len(batch.labels))

    def at(self, epoch: int) -> Repeated:
        return self

    def __len__(self) -> int:
        return 2

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([self._batch, self._batch])


def test_every_step_runs_at_its_rate_and_reports_its_loss() -> None:
    batch, rates = random_batch(16), np.geomspace(1e-3, 1e-2, 23)
    with alone():
        tested = make_state(lenet_of(), {"linear_lr": 2e-3}, lr=1e-3, accumulation_steps=2)
        curve = range_test(tested, Repeated(batch), rates)  # type: ignore[arg-type]
        by_hand = make_state(lenet_of(), {"linear_lr": 2e-3}, lr=1e-3, accumulation_steps=2)
        losses = []
        for lr in rates:
            for group in by_hand.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            by_hand.sums.zero_()
            for last in (False, True):
                run_step(by_hand, batch, 0, optimizer_step=last)
            losses.append(float(by_hand.sums[0] / by_hand.sums[2]))
    assert {group["lr_scale"] for group in by_hand.optimizer.param_groups} == {1.0, 2.0}
    assert curve.loss == pytest.approx(losses)
    for ours, theirs in zip(tested.network.parameters(), by_hand.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_range_test_may_be_longer_than_the_run() -> None:
    """Lookahead has no share beyond the end of a run. At the start, it keeps nothing of the slow weights."""
    batch, rates = random_batch(16), np.geomspace(1e-4, 1e-3, 12)
    with alone():
        tested, plain = (make_state(lenet_of(), lr=1e-3, epochs=1) for _ in range(2))
        tested.lookahead = build_lookahead(tested.network, LookaheadConfig(every_steps=1))
        for state in (tested, plain):
            range_test(state, Repeated(batch), rates)  # type: ignore[arg-type]
    for ours, theirs in zip(tested.network.parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_range_test_stops_when_the_loss_diverges() -> None:
    with alone():
        training = make_state(lenet_of(), lr=1e-3)
        curve = range_test(training, Repeated(random_batch(16)), np.geomspace(1e-2, 1e6, 200))  # type: ignore[arg-type]
    assert len(curve.loss) == len(curve.lr) < 200
    assert divergence_index(curve.smoothed) == len(curve.lr) - 1


def test_range_test_whose_first_loss_is_infinite_has_no_suggestion() -> None:
    with alone():
        state = make_state(lenet_of(), lr=1e-3)
        state.network.register_forward_hook(lambda module, images, logits: logits * float("inf"))
        curve = range_test(state, Repeated(random_batch(16)), np.geomspace(1e-3, 1e-2, 100))  # type: ignore[arg-type]
    assert len(curve.loss) == len(curve.lr) == len(curve.smoothed) == 1
    assert suggest_lr(curve).lr is None


def test_separate_learning_rates_scale_with_the_suggestion() -> None:
    overrides = ["train.optimizer.bias_lr=0.06", "train.min_lr=6e-5"]
    config = load_config(DIGITS, overrides)
    options = options_for(config, 0.012)
    assert options == "train.lr=0.012 train.min_lr=0.00012 train.optimizer.bias_lr=0.12"
    assert load_config(DIGITS, [*overrides, *options.split()]).train.lr == 0.012


def test_suggestion_is_for_the_reference_batch_size() -> None:
    overrides = ["train.lr_batch_size=256", "train.min_lr=6e-5", "data.batch_size=64", "train.accumulation_steps=2"]
    options = options_for(load_config(DIGITS, overrides), 0.012)  # tested at half of that batch
    assert options == "train.lr=0.024 train.min_lr=0.00024"
    config = load_config(DIGITS, [*overrides, *options.split()])
    assert scale_learning_rates(config.train, 128).lr == 0.012


def test_suggestion_for_digits_is_near_the_configs_rate(
    digits_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "found"
    find_lr.main([str(DIGITS), "--data-path", str(digits_run.data), "--out", str(out), "--opts", "seed", "1"])
    facts = json.loads((out / "find_lr.json").read_text())
    assert 6e-4 <= facts["suggestion"]["lr"] <= 6e-2
    assert facts["diverged"]
    assert facts["updates"] < find_lr_command.MIN_STEPS
    command = f"zhu train {DIGITS} --data-path {digits_run.data} seed=1 train.lr={facts['suggestion']['lr']:.2g}"
    assert f"suggestion (steepest descent): {command}\n" in capsys.readouterr().out
    with (out / "find_lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == facts["updates"]
    assert any(float(row["lr"]) == facts["suggestion"]["lr"] for row in rows)
    assert (out / "find_lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["--from", "1", "--to", "0.1"], "ascending"), (["--from", "0"], "positive"), (["--steps", "3"], "at least 20")],
)
def test_invalid_ranges_are_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        find_lr.main(["--cfg", str(DIGITS), *arguments])


def test_run_folder_is_not_overwritten(digits_run: Run) -> None:
    with pytest.raises(UserError, match="folder of a run"):
        find_lr.main(["--cfg", str(DIGITS), "--data-path", str(digits_run.data), "--out", str(digits_run.folder)])
