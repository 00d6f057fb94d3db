"""Learning rates of each step equal the published formulas and the schedulers of torch and timm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler, StepLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from configs.load import load_config, parse_config
from configs.schema import EmaConfig, ScheduleConfig, TrainConfig
from configs.utils.errors import UserError
from helpers.training import DIGITS, run_here, strict_lines
from train import trainer
from train.checkpoint import store
from train.engine.epoch import training_steps
from train.optim.schedule import (
    Plateau,
    Timeline,
    config_warnings,
    learning_rate,
    lr_factor,
    scale_learning_rates,
    whitening_learning_rate,
)


def schedule(steps_per_epoch: int, **settings: Any) -> list[float]:
    config = TrainConfig(**settings)
    timeline = Timeline.even(config.epochs, steps_per_epoch)
    return [learning_rate(step, timeline, config) for step in range(timeline.total)]


def test_warmup_rises_linearly_to_peak() -> None:
    rates = schedule(10, epochs=5, lr=0.8, warmup_epochs=2, warmup_lr=0.1)
    rises = [after - before for before, after in zip([0.1, *rates], rates[:20], strict=False)]
    assert rises == pytest.approx([0.7 / 20] * 20)
    assert rates[19] == pytest.approx(0.8)


def test_warmup_may_last_a_fraction_of_an_epoch() -> None:
    rates = schedule(10, epochs=2, lr=1.0, warmup_epochs=0.5, schedule="constant")
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 16)


def test_warmup_of_all_epochs_rises_to_the_end() -> None:
    rates = schedule(4, epochs=2, lr=1.0, warmup_epochs=2)
    assert rates == pytest.approx([step / 8 for step in range(1, 9)])


def test_cosine_equals_torch_at_every_step() -> None:
    rates = schedule(7, epochs=3, lr=0.3, min_lr=0.02)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21, eta_min=0.02)
    expected = []
    for _ in range(21):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates == pytest.approx(expected, rel=1e-12)


def test_cosine_falls_from_peak_to_min_lr_after_last_step() -> None:
    settings: dict[str, Any] = {"epochs": 4, "lr": 0.5, "min_lr": 0.1, "warmup_epochs": 1}
    config, timeline = TrainConfig(**settings), Timeline.even(4, 10)
    assert learning_rate(10, timeline, config) == pytest.approx(0.5)
    assert learning_rate(25, timeline, config) == pytest.approx((0.5 + 0.1) / 2)  # half-way between 10 and 40
    assert learning_rate(40, timeline, config) == pytest.approx(0.1)
    rates = schedule(10, **settings)
    assert all(after < before for before, after in itertools.pairwise(rates[10:]))


def test_constant_schedule_stays_at_the_peak() -> None:
    assert set(schedule(5, epochs=3, lr=0.25, schedule="constant", min_lr=0.1)) == {0.25}


@pytest.mark.parametrize("lowest", [0.0, 0.02])
def test_linear_schedule_with_warmup_equals_formula(lowest: float) -> None:
    rates = schedule(10, epochs=5, lr=0.8, warmup_epochs=1, warmup_lr=0.16, min_lr=lowest, schedule="linear")
    rising = [0.16 + 0.64 * (step + 1) / 10 for step in range(10)]
    falling = [0.8 + (lowest - 0.8) * step / 40 for step in range(40)]
    assert rates == pytest.approx(rising + falling)


def test_whitening_bias_rate_follows_schedule_or_anneals() -> None:
    def rates(**settings: Any) -> list[float]:
        config = TrainConfig(epochs=4, lr=0.5, schedule="linear", **settings)
        return [whitening_learning_rate(step, Timeline.even(4, 5), config) for step in range(20)]

    shared = [0.5 * (1 - step / 20) for step in range(20)]
    assert rates() == pytest.approx(shared)
    assert rates(whiten_bias_epochs=2) == pytest.approx(shared[:10] + [0] * 10)
    own = [0.5 * (1 - step / 10) for step in range(10)]
    assert rates(whiten_bias_epochs=2, whiten_bias_anneal=True) == pytest.approx(own + [0] * 10)
    assert rates(whiten_bias_epochs=0, whiten_bias_anneal=True) == [0] * 20


@given(
    epochs=st.integers(1, 20),
    steps_per_epoch=st.integers(1, 50),
    warmup=st.floats(0, 1),
    lr=st.floats(1e-6, 10),
    lowest=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial"]),
)
def test_learning_rates_stay_between_minimum_and_peak(
    epochs: int, steps_per_epoch: int, warmup: float, lr: float, lowest: float, kind: Any
) -> None:
    low = lr * lowest
    rates = schedule(
        steps_per_epoch, epochs=epochs, lr=lr, min_lr=low, warmup_lr=low, warmup_epochs=warmup * epochs, schedule=kind,
        schedule_options=ScheduleConfig(milestones=(1.0, 2.0)),
    )  # fmt: skip
    assert all(low * (1 - 1e-9) <= rate <= lr * (1 + 1e-9) for rate in rates)


# Timelines


def test_positions_follow_the_steps_of_each_epoch() -> None:
    timeline = Timeline((4, 2, 5))
    assert timeline.total == 11
    assert [timeline.first_step(epoch) for epoch in range(4)] == [0, 4, 6, 11]
    assert [timeline.epoch_at(update) for update in range(12)] == [0] * 4 + [1] * 2 + [2] * 5 + [3]
    expected = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.2, 2.4, 2.6, 2.8, 3, 3]
    assert [timeline.epochs_before(update) for update in range(13)] == pytest.approx(expected)
    for update in range(12):
        assert timeline.steps_until(timeline.epochs_before(update)) == pytest.approx(update)
    assert timeline.steps_until(4) == pytest.approx(16)  # the last epoch is extrapolated
    assert Timeline.even(3, 7) == Timeline((7, 7, 7))


def before_timelines(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Compute the learning rate by the earlier formula for epochs of equal length."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup))
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


@given(
    epochs=st.integers(1, 20),
    steps_per_epoch=st.integers(1, 50),
    warmup=st.floats(0, 1),
    lr=st.floats(1e-6, 10),
    lowest=st.floats(0, 1),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_even_epochs_equal_earlier_formula_bitwise(
    epochs: int, steps_per_epoch: int, warmup: float, lr: float, lowest: float, kind: Any
) -> None:
    settings: dict[str, Any] = {"epochs": epochs, "lr": lr, "min_lr": lr * lowest, "schedule": kind}
    config = TrainConfig(warmup_epochs=warmup * epochs, **settings)
    expected = [before_timelines(step, steps_per_epoch, config) for step in range(epochs * steps_per_epoch)]
    timeline = Timeline.even(epochs, steps_per_epoch)
    assert [learning_rate(step, timeline, config) for step in range(timeline.total)] == expected


def test_uneven_epochs_decay_and_warm_up_by_epoch() -> None:
    timeline = Timeline((4, 2, 5))
    stepped = TrainConfig(epochs=3, lr=1.0, schedule="step", schedule_options=ScheduleConfig(epochs=1, rate=0.5))
    assert [learning_rate(update, timeline, stepped) for update in range(11)] == [1] * 4 + [0.5] * 2 + [0.25] * 5
    warm = TrainConfig(epochs=3, lr=1.0, schedule="constant", warmup_epochs=1.5)
    assert [learning_rate(update, timeline, warm) for update in range(11)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0] + [1.0] * 6
    )


# Comparison with torch's schedulers, stepped per epoch or per optimizer step as intended


def of_torch(build: Any, steps: int, lr: float = 0.3) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


PER_EPOCH = 5


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"schedule": "step", "schedule_options": {"epochs": 3, "rate": 0.4}},
         lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.4)),
        ({"schedule": "multistep", "schedule_options": {"milestones": [2, 5, 6], "rate": 0.4}},
         lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5, 6], gamma=0.4)),
        ({"schedule": "exponential", "schedule_options": {"rate": 0.8}},
         lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.8)),
    ],
    ids=["step", "multistep", "exponential"],
)  # fmt: skip
def test_epoch_decays_equal_torch(settings: dict[str, Any], build: Any) -> None:
    rates = schedule(PER_EPOCH, epochs=8, lr=0.3, **settings)
    assert rates[::PER_EPOCH] == pytest.approx(of_torch(build, 8), rel=1e-12)
    if settings["schedule"] != "exponential":  # exponential also falls within epochs
        assert rates == [rate for rate in rates[::PER_EPOCH] for _ in range(PER_EPOCH)]


@pytest.mark.parametrize("epochs", [0.2, 0.6, 1 / 3])
def test_decays_may_come_after_fractions_of_an_epoch(epochs: float) -> None:
    options = {"epochs": epochs, "rate": 0.9}
    rates = schedule(15, epochs=4, lr=0.3, schedule="step", schedule_options=options)
    every = round(15 * epochs)
    assert rates == pytest.approx([0.3 * 0.9 ** (step // every) for step in range(60)])


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"schedule": "cosine", "min_lr": 0.02},
         lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.02)),
        ({"schedule": "linear"},
         lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=40)),
        ({"schedule": "polynomial", "schedule_options": {"power": 1.7}},
         lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=1.7)),
        ({"schedule": "one-cycle"},
         lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=40, cycle_momentum=False)),
        ({"schedule": "one-cycle", "schedule_options": {"peak": 0.45, "div_factor": 7, "final_div_factor": 50}},
         lambda optimizer: lr_scheduler.OneCycleLR(
             optimizer, max_lr=0.3, total_steps=40, pct_start=0.45, div_factor=7, final_div_factor=50,
             cycle_momentum=False)),
    ],
    ids=["cosine", "linear", "polynomial", "one-cycle", "one-cycle with options"],
)  # fmt: skip
def test_per_step_schedules_equal_torch(settings: dict[str, Any], build: Any) -> None:
    rates = schedule(PER_EPOCH, epochs=8, lr=0.3, **settings)
    # OneCycleLR must not be stepped past its end
    assert rates[:-1] == pytest.approx(of_torch(build, 39), rel=1e-9)


def test_per_epoch_schedule_equals_torch() -> None:
    options = {"per_epoch": True}
    rates = schedule(PER_EPOCH, epochs=8, lr=0.3, min_lr=0.02, schedule_options=options)
    stepped = of_torch(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.02), 8)
    assert rates == pytest.approx([rate for rate in stepped for _ in range(PER_EPOCH)], rel=1e-9)
    warm = schedule(PER_EPOCH, epochs=8, lr=0.3, warmup_epochs=1.4, schedule_options=options)
    by_update = schedule(PER_EPOCH, epochs=8, lr=0.3, warmup_epochs=1.4)
    assert warm[:8] == by_update[:8]
    assert warm[8:10] == [0.3] * 2
    assert warm[10::PER_EPOCH] == by_update[10::PER_EPOCH]


def test_one_cycle_follows_its_factors_and_peak() -> None:
    options = {"peak": 0.25, "div_factor": 10, "final_div_factor": 100}
    rates = schedule(10, epochs=8, lr=0.5, schedule="one-cycle", schedule_options=options)
    assert (rates[0], rates[-1]) == pytest.approx((0.05, 0.0005))
    assert max(rates) == rates[19] == pytest.approx(0.5)
    assert schedule(1, epochs=1, lr=0.5, schedule="one-cycle", schedule_options=options) != []


# Comparison with timm's schedulers, stepped once per optimizer step


def of_timm(build: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = build(optimizer)
    rates = []
    for step in range(steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"schedule": "cosine", "min_lr": 0.02},
         lambda optimizer: CosineLRScheduler(optimizer, t_initial=32, lr_min=0.02, warmup_t=8, warmup_prefix=True,
                                             warmup_lr_init=0.01, t_in_epochs=False)),
        ({"schedule": "polynomial", "min_lr": 0.02, "schedule_options": {"power": 2}},
         lambda optimizer: PolyLRScheduler(optimizer, t_initial=32, power=2, lr_min=0.02, warmup_t=8,
                                           warmup_prefix=True, warmup_lr_init=0.01, t_in_epochs=False)),
        ({"schedule": "step", "schedule_options": {"epochs": 3, "rate": 0.4}},
         lambda optimizer: StepLRScheduler(optimizer, decay_t=15, decay_rate=0.4, warmup_t=8, warmup_prefix=False,
                                           warmup_lr_init=0.01, t_in_epochs=False)),
        ({"schedule": "multistep", "schedule_options": {"milestones": [3, 5.2], "rate": 0.4}},
         # timm decays one step early
         lambda optimizer: MultiStepLRScheduler(optimizer, decay_t=[16, 27], decay_rate=0.4, warmup_t=8,
                                                warmup_prefix=False, warmup_lr_init=0.01, t_in_epochs=False)),
    ],
    ids=["cosine", "polynomial", "step", "multistep"],
)  # fmt: skip
def test_schedules_after_a_warm_up_equal_timm(settings: dict[str, Any], build: Any) -> None:
    rates = schedule(PER_EPOCH, epochs=8, lr=0.3, warmup_epochs=1.6, warmup_lr=0.01, **settings)
    theirs = of_timm(build, 40)
    assert rates[8:] == pytest.approx(theirs[8:], rel=1e-9)
    # timm's warm-up starts at warmup_lr in its first step and reaches lr one step later than ours
    assert rates[:8] == pytest.approx([*theirs[1:8], 0.3])


# Plateau


@pytest.mark.parametrize(("metric", "mode"), [("val_loss", "min"), ("train_loss", "min"), ("val_top1", "max")])
@given(data=st.data())
def test_plateau_equals_torchs_reduce_lr_on_plateau(metric: Any, mode: Any, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(0, 3) | st.sampled_from([0.5, 1.0, math.nan]), max_size=30))
    patience, threshold = data.draw(st.integers(0, 4)), data.draw(st.sampled_from([0.0, 1e-4, 0.3]))
    options = ScheduleConfig(metric=metric, patience=patience, threshold=threshold, rate=0.5)
    config = TrainConfig(lr=1.0, min_lr=0.01, schedule="plateau", schedule_options=options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode=mode,
        factor=0.5,
        patience=patience,
        threshold=threshold,
        threshold_mode="abs",
        min_lr=0.01,
        eps=0,
    )
    plateau = Plateau()
    for value in values:
        theirs.step(value)
        plateau = plateau.after(value, options)
        ours = learning_rate(3, Timeline.even(10, 5), config, plateau.decays)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])


def test_plateau_ignores_epoch_without_metric() -> None:
    plateau = Plateau().after(1.0, ScheduleConfig())
    assert plateau == Plateau(1.0, 0, 0)
    assert plateau.after(None, ScheduleConfig()) == plateau
    assert plateau.after(2.0, ScheduleConfig(patience=0)) == Plateau(1.0, 0, 1)


def test_plateau_keeps_warm_up_and_min_lr() -> None:
    options = ScheduleConfig(rate=0.1)
    config = TrainConfig(epochs=3, lr=1.0, min_lr=0.05, warmup_epochs=1, schedule="plateau", schedule_options=options)
    timeline = Timeline.even(3, 4)
    assert [learning_rate(update, timeline, config, 1) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.1]
    assert learning_rate(5, timeline, config, 2) == 0.05


# Whole runs

RUN = [
    "train.epochs=3", "data.batch_size=35", "data.train_split=val", "train.lr=0.01", "train.save_every_steps=5",
    "log.every_steps=1000",
    "train.schedule_options.epochs=0.5", "train.schedule_options.milestones=[0.4,1.7]",
    # only the first epoch improves
    "train.schedule_options.patience=0", "train.schedule_options.threshold=100",
]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial", "plateau", "one-cycle"],
)
def test_learning_rates_resume_within_epoch(
    kind: str, npy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, float]] = []

    def noted_steps(*parts: Any, **options: Any) -> Iterator[tuple[int, float]]:
        for step, lr in training_steps(*parts, **options):
            noted.append((step, lr))
            yield step, lr

    monkeypatch.setattr(trainer, "training_steps", noted_steps)
    opts = [*RUN, f"train.schedule={kind}", f"train.warmup_epochs={0 if kind == 'one-cycle' else 0.67}"]

    def command(output: Path) -> list[str | Path]:
        return ["--cfg", DIGITS, "--data-path", npy_data, "--output", output, "--opts", *opts]

    run_here(*command(tmp_path / "unbroken"))
    expected = [*noted]
    noted.clear()
    run_here(*command(tmp_path / "broken"), stop_at={"epoch": 1, "step": 2})
    assert len(noted) == 5
    run_here(*command(tmp_path / "broken"), "--resume", "auto")
    assert noted == expected
    config = load_config(DIGITS, opts).train
    decays = [0, 0, 1] if kind == "plateau" else [0, 0, 0]
    formula = [learning_rate(update, Timeline.even(3, 3), config, decays[update // 3]) for update in range(9)]
    assert noted == list(enumerate(formula))
    ours, theirs = (store.load(tmp_path / name / "digits_lenet" / "last.pt") for name in ("broken", "unbroken"))
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    assert ours["progress"] == theirs["progress"]


def test_run_begins_with_its_first_epoch(npy_data: Path, tmp_path: Path) -> None:
    opts = [*RUN, "train.first_epoch=1", "train.schedule=linear", "train.warmup_epochs=0"]
    run_here("--cfg", DIGITS, "--data-path", npy_data, "--output", tmp_path, "--opts", *opts)
    lines = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, 9)]
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * (1 - 5 / 9), 0.01 * (1 - 8 / 9)])


def test_run_scales_learning_rates_and_keeps_config(npy_data: Path, tmp_path: Path) -> None:
    opts = [*RUN, "train.schedule=constant", "train.warmup_epochs=0", "train.lr_batch_size=10", "train.epochs=1"]
    run_here("--cfg", DIGITS, "--data-path", npy_data, "--output", tmp_path, "--opts", *opts)
    folder = tmp_path / "digits_lenet"
    assert strict_lines(folder / "metrics.jsonl")[0]["lr"] == pytest.approx(0.035)
    assert "learning rates x 3.5 (linear from train.lr_batch_size=10)" in (folder / "log.txt").read_text()
    content = store.load(folder / "last.pt")
    for config in (load_config(folder / "config.yaml"), parse_config(content["config"], "the checkpoint")):
        assert config.train.lr == 0.01


# Settings


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["train.schedule=one-cycle", "train.warmup_epochs=1"],
            r"one-cycle.* includes its own warm-up",
        ),
        (["train.epochs=3", "train.first_epoch=3"], r"train\.first_epoch=3 must be below train\.epochs=3"),
        (
            ["train.clip_grad_norm=1", "train.clip_grad_adaptive=0.01"],
            r"cannot be combined with train\.clip_grad_norm=1",
        ),
        (
            ["train.clip_grad_value=1", "train.clip_grad_adaptive=0.01"],
            r"cannot be combined with train\.clip_grad_value=1",
        ),
        (["train.clip_grad_norm=1", "train.clip_grad_value=1"], r"train\.clip_grad_value=1.* cannot be combined with"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(options: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_config(DIGITS, options)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_batch_scaling_changes_learning_rates_only(rule: Any, factor: float) -> None:
    rates = {"lr": 0.1, "min_lr": 0.01, "warmup_lr": 0.02}
    own = {"norm_bias_lr": 0.3, "bias_lr": None, "linear_lr": 0.5, "weight_decay": 0.1}
    config = TrainConfig.model_validate({**rates, "optimizer": own, "lr_batch_size": 64, "lr_scaling": rule})
    bigger = scale_learning_rates(config, 256)
    assert lr_factor(config, 256) == factor
    assert {name: getattr(bigger, name) for name in rates} == pytest.approx({n: r * factor for n, r in rates.items()})
    optimizer = bigger.optimizer
    assert (optimizer.norm_bias_lr, optimizer.bias_lr, optimizer.linear_lr) == (0.3 * factor, None, 0.5 * factor)
    assert optimizer.weight_decay == 0.1
    assert scale_learning_rates(bigger, 256) == bigger
    assert bigger.model_copy(update={**rates, "optimizer": config.optimizer, "lr_batch_size": 64}) == config
    assert scale_learning_rates(TrainConfig(), 4096) == TrainConfig()


# Warnings


def test_settings_without_effect_trigger_warning() -> None:
    timeline = Timeline.even(10, 100)
    assert config_warnings(TrainConfig(epochs=10), timeline) == []
    for late in (
        TrainConfig(epochs=10, schedule="step"),
        TrainConfig(epochs=10, schedule="multistep", schedule_options=ScheduleConfig(milestones=(10.0, 20.0))),
    ):
        (remark,) = config_warnings(late, timeline)
        assert "train.epochs=10 does not reach" in remark
        rates = {learning_rate(update, timeline, late) for update in range(timeline.total)}
        assert rates == {late.lr}  # hence the warning
    early = ScheduleConfig(epochs=3)
    assert config_warnings(TrainConfig(epochs=10, schedule="step", schedule_options=early), timeline) == []


def test_average_of_initial_weights_triggers_warning() -> None:
    timeline = Timeline.even(10, 100)
    (remark,) = config_warnings(TrainConfig(epochs=10, ema=EmaConfig(decay=0.9999)), timeline)
    assert "looks back over 10,000 steps, but the run has 1,000" in remark
    assert config_warnings(TrainConfig(epochs=10, ema=EmaConfig(decay=0.9999, warmup=True)), timeline) == []
    assert config_warnings(TrainConfig(epochs=10, ema=EmaConfig(decay=0.99)), timeline) == []
    assert len(config_warnings(TrainConfig(epochs=10, ema=EmaConfig(decay=0.99, every_steps=10)), timeline)) == 1
