"""The moving average is timm's ModelEmaV3, and Lookahead follows its formula."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import DataConfig, EmaConfig, EvalConfig, LookaheadConfig
from configs.utils.errors import UserError
from helpers.training import CPU, DIGITS, alone, make_state, on_ranks, random_batch, run_here, small_net, strict_lines
from pipelines import build_eval_loader, build_train_loader
from pipelines.interfaces import Position
from tools.runs.records import comparison_rows, curve_rows, read_run
from train.checkpoint import store
from train.distributed.process_group import Ranks
from train.engine.epoch import training_steps
from train.engine.evaluate import evaluate
from train.engine.state import TrainState, restart_in_place
from train.engine.step import train_step
from train.engine.warm_up import blank_batch, warm_up_training
from train.optim.averaging import Ema, Lookahead, build_ema, build_lookahead, eval_weights, kept_share, uses_ema
from train.reporting.metrics_file import best_results, read_metrics
from train.trained_model import load_trained_model

VAL_SAMPLES = 107
State = dict[str, Tensor]
in_a_group = pytest.mark.usefixtures("_process_group")
# Whole runs

OPTS = [
    "train.epochs=3", "data.batch_size=256", "train.warmup_epochs=0", "train.lr=0.02", "train.save_every_steps=7",
    "log.every_steps=1000", "train.ema.decay=0.9", "train.ema.every_steps=2",
]  # fmt: skip


@pytest.fixture
def _process_group() -> Iterator[None]:
    with alone():
        yield


def copy_of(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def training_with(seed: int = 0, **ema: Any) -> tuple[TrainState, Ema]:
    state = make_state(small_net(seed=seed), lr=0.01, ema=EmaConfig(**ema), epochs=2)
    state.ema = build_ema(state.network, state.config.ema)
    assert state.ema is not None
    return state, state.ema


# Numbers


@in_a_group
@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"decay": 0.8}, [0.0] + [0.8] * 5),
        ({"decay": 0.8, "every_steps": 2}, [None, 0.0, None, 0.8, None, 0.8]),
        ({"decay": 0.6, "warmup": True}, [0.0, *(min(0.6, 1 - (1 + n) ** (-2 / 3)) for n in range(1, 6))]),
        ({"decay": 0.9999, "warmup": True, "every_steps": 3}, [None, None, 0.0, None, None, 1 - 2 ** (-2 / 3)]),
    ],
    ids=["plain", "every other", "warm-up", "warm-up every third"],
)
def test_average_equals_the_one_computed_by_hand(settings: dict[str, Any], shares: list[float | None]) -> None:
    state, ema = training_with(**settings)
    average = {name: value.double() for name, value in state.network.state_dict().items()}
    for number, share in enumerate(shares):
        train_step(state, random_batch(8, seed=number))
        ema.update(number + 1)
        for name, value in state.network.state_dict().items():
            if share is not None:
                counts = not value.is_floating_point()  # batch norm's batch count is copied
                average[name] = value.double() if counts else share * average[name] + (1 - share) * value.double()
        for name, value in ema.state().items():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
    last = state.network.state_dict()
    assert not torch.allclose(ema.state()["norm.running_mean"], last["norm.running_mean"])


@in_a_group
def test_average_counts_steps_from_start_of_run(npy_data: Path) -> None:
    averages = []
    for first in (0, 1):
        state = make_state(small_net(), epochs=2, first_epoch=first, ema={"decay": 0.5}, schedule="constant")
        state.ema = build_ema(state.network, state.config.ema)
        loader = build_train_loader(DataConfig(path=str(npy_data), batch_size=350), seed=3, device=CPU)
        loader.position = Position(first)
        seen: list[State] = []
        for _ in training_steps(state, loader, seed=0):
            seen.append(copy_of(state.network.state_dict()))
        assert state.ema is not None
        averages.append((state.ema.state(), seen))
    for average, (begun, then) in averages:
        for name in ("head.weight", "norm.running_var"):
            torch.testing.assert_close(average[name], 0.5 * begun[name] + 0.5 * then[name])


@in_a_group
def test_swapped_in_average_is_restored_on_exit() -> None:
    state, ema = training_with(decay=0.5)
    for number in range(3):
        train_step(state, random_batch(8, seed=number))
        ema.update(number + 1)
    own, average = copy_of(state.network.state_dict()), copy_of(ema.state())
    addresses = [value.data_ptr() for value in state.network.state_dict().values()]

    def fail_inside() -> None:
        with ema.swapped_in():
            assert all(torch.equal(value, average[name]) for name, value in state.network.state_dict().items())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all(torch.equal(value, own[name]) for name, value in state.network.state_dict().items())
    assert [value.data_ptr() for value in state.network.state_dict().values()] == addresses
    assert all(torch.equal(value, average[name]) for name, value in ema.state().items())


@in_a_group
def test_warm_up_keeps_average_and_restart_resets_it() -> None:
    state, ema = training_with(decay=0.5)
    begun = copy_of(ema.state())
    warm_up_training(state, blank_batch(8, 32, CPU))
    assert all(torch.equal(value, begun[name]) for name, value in ema.state().items())
    fresh, _ = training_with(seed=5, decay=0.5)
    restart_in_place(state, fresh)
    assert all(torch.equal(value, ema.state()[name]) for name, value in fresh.network.state_dict().items())


@in_a_group
def test_eval_weights_depend_on_setting_and_average() -> None:
    with_one, without = training_with(decay=0.5)[0], make_state(small_net())
    assert [uses_ema(with_one.ema, weights) for weights in ("auto", "ema", "raw")] == [True, True, False]
    assert [uses_ema(without.ema, weights) for weights in ("auto", "raw")] == [False, False]
    with pytest.raises(UserError, match=r"eval\.weights=ema, but no average is kept; set train\.ema\.decay"):
        uses_ema(without.ema, "ema")


def accuracies(ranks: Ranks, data: Path) -> tuple[float, float]:
    """Evaluate both, with averages and statistics that differ between ranks."""
    state, ema = training_with(decay=0.5)
    for number in range(2):
        state.network(random_batch(8, seed=number).images // (1 + ranks.rank))
        ema.update(number + 1)
    section, evaluation = DataConfig(path=str(data)), EvalConfig(batch_size=16)
    loader = build_eval_loader(section, evaluation, device=CPU, rank=ranks.rank, world_size=ranks.world_size)
    losses = []
    for weights in ("raw", "ema"):
        with eval_weights(state.ema, weights):
            losses.append(evaluate(state, loader, VAL_SAMPLES).loss)
    return losses[0], losses[1]


def test_several_ranks_evaluate_the_first_ranks_average(npy_data: Path) -> None:
    with alone():
        expected = accuracies(Ranks(), npy_data)
    assert expected[0] != expected[1]
    for result in on_ranks(2, accuracies, npy_data):
        assert result == pytest.approx(expected, rel=1e-5)


def command(data: Path, output: Path, *opts: str) -> list[str | Path]:
    return ["--cfg", DIGITS, "--data-path", data, "--output", output, "--opts", *OPTS, *opts]


@pytest.fixture(scope="module")
def averaged(digits_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run; read only."""
    output = tmp_path_factory.mktemp("averaged")
    run_here(*command(digits_run.data, output))
    return output / "digits_lenet"


def test_average_resumes_bitwise_within_epoch(averaged: Path, digits_run: Any, tmp_path: Path) -> None:
    run_here(*command(digits_run.data, tmp_path), stop_at={"epoch": 1, "step": 2})
    run_here(*command(digits_run.data, tmp_path), "--resume", "auto")
    ours, theirs = (store.load(folder / "last.pt") for folder in (tmp_path / "digits_lenet", averaged))
    for part in ("model", "ema"):
        assert [name for name, value in theirs[part].items() if not torch.equal(ours[part][name], value)] == []
    assert not torch.equal(ours["model"]["network.fc1.weight"], ours["ema"]["network.fc1.weight"])
    keys = ["val_loss", "val_top1", "ema_val_loss", "ema_val_top1", "ema_val_top5"]
    lines = [strict_lines(folder / "metrics.jsonl") for folder in (tmp_path / "digits_lenet", averaged)]
    for line, other in zip(*lines, strict=True):
        assert [line[key] for key in keys] == [other[key] for key in keys]


def test_average_is_evaluated_and_counts_by_default(
    averaged: Path, digits_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(*command(digits_run.data, tmp_path, "eval.weights=raw"))
    for folder, key in ((averaged, "ema_val_top1"), (tmp_path / "digits_lenet", "val_top1")):
        lines = strict_lines(folder / "metrics.jsonl")
        assert all(line["val_loss"] != line["ema_val_loss"] for line in lines)
        content = store.load(folder / "best.pt")
        assert content["progress"]["best_top1"] == max(line[key] for line in lines)
    for weights, prefix in (("auto", "ema_"), ("ema", "ema_"), ("raw", "")):
        capsys.readouterr()
        run_here(*command(digits_run.data, averaged.parent, f"eval.weights={weights}"), "--eval", "--resume", "auto")
        out = capsys.readouterr().out
        shown = re.search(r"val loss ([\d.]+), top1 ([\d.]+), top5 ([\d.]+)", out)
        assert shown is not None
        last = strict_lines(averaged / "metrics.jsonl")[-1]
        expected = [f"{last[f'{prefix}val_{key}']:.4f}" for key in ("loss", "top1", "top5")]
        assert list(shown.groups()) == expected
        assert ("(moving average)" in out) == bool(prefix)


def test_epoch_without_evaluation_evaluates_no_average(digits_run: Any, tmp_path: Path) -> None:
    run_here(*command(digits_run.data, tmp_path, "train.epochs=2", "train.eval_every_epochs=2"))
    lines = strict_lines(tmp_path / "digits_lenet" / "metrics.jsonl")
    assert [line["ema_val_top1"] is None for line in lines] == [True, False]
    assert best_results(read_metrics(tmp_path / "digits_lenet"))["best_ema_val_top1"] == lines[1]["ema_val_top1"]


def test_tools_load_average_unless_raw_or_missing(averaged: Path, digits_run: Any, tmp_path: Path) -> None:
    content = store.load(averaged / "last.pt")
    with alone():
        for weights, part in (("auto", "ema"), ("ema", "ema"), ("raw", "model")):
            text = content["config"].replace("weights: auto", f"weights: {weights}")
            path = tmp_path / f"{weights}.pt"
            store.write(path, content | {"config": text})
            state = load_trained_model(path, CPU).state.network.state_dict()
            assert all(torch.equal(value, content[part][name]) for name, value in state.items())
            assert load_trained_model(path, CPU).config.train.ema.decay == 0.9
        old = {key: value for key, value in content.items() if key != "ema"}  # from older versions
        for weights in ("auto", "ema"):
            path = tmp_path / "old.pt"
            store.write(path, old | {"config": content["config"].replace("weights: auto", f"weights: {weights}")})
            if weights == "auto":
                state = load_trained_model(path, CPU).state.network.state_dict()
                assert all(torch.equal(value, content["model"][name]) for name, value in state.items())
            else:
                with pytest.raises(UserError, match=r"old\.pt holds no moving average .*; use eval\.weights=auto"):
                    load_trained_model(path, CPU)


def test_comparisons_show_the_average_and_count_it(averaged: Path, digits_run: Any) -> None:
    records = [read_run(averaged), read_run(digits_run.folder)]
    rows = comparison_rows(records, ["averaged", "plain"])
    assert [row["weights"] for row in rows] == ["ema", "raw"]
    lines = strict_lines(averaged / "metrics.jsonl")
    assert rows[0]["best_val_top1"] == max(line["ema_val_top1"] for line in lines)
    assert rows[1]["best_val_top1"] == max(
        line["val_top1"] for line in strict_lines(digits_run.folder / "metrics.jsonl")
    )
    points = curve_rows(records, ["averaged", "plain"])
    assert [point["ema_val_loss"] for point in points] == [line["ema_val_loss"] for line in lines] + [None, None]
    assert "weights" not in comparison_rows(records[1:], ["plain"])[0]
    assert "ema_val_loss" not in curve_rows(records[1:], ["plain"])[0]


def test_eval_weights_ema_without_average_is_refused(digits_run: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.weights=ema, but no average is kept"):
        run_here(*command(digits_run.data, tmp_path, "train.ema.decay=null", "eval.weights=ema"))
    assert list(tmp_path.iterdir()) == []


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_lookahead_equals_formula_and_ends_with_slow_weights() -> None:
    ours, config = network(), LookaheadConfig(every_steps=3, decay=0.8)
    lookahead = Lookahead(ours, config)
    fast = {name: value.clone() for name, value in network().state_dict().items() if value.is_floating_point()}
    slow = {name: value.clone() for name, value in fast.items()}
    updates = 10
    for update in range(updates):
        for number, (name, value) in enumerate(fast.items()):
            change = 0.01 * (update + 1) * (number + 1)
            value += change
            ours.state_dict()[name].add_(change)
        lookahead.update(update, updates)
        if update in (2, 5, 8):
            kept = 0.8 * ((update + 1) / updates) ** 3
            for name in fast:
                slow[name] = kept * slow[name] + (1 - kept) * fast[name]
                fast[name] = slow[name].clone()
    for name in fast:
        torch.testing.assert_close(ours.state_dict()[name], slow[name])
        assert not torch.allclose(fast[name], slow[name])  # the trained weights were reset


def test_lookahead_decay_grows_with_cube_of_progress() -> None:
    config = LookaheadConfig(every_steps=1, decay=0.8)
    assert [kept_share(progress, config) for progress in (0, 0.5, 1)] == pytest.approx([0, 0.1, 0.8])


def test_lookahead_without_an_interval_is_off() -> None:
    assert build_lookahead(network(), LookaheadConfig()) is None
