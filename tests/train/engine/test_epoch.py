"""The step, the epoch and the evaluation, against plain torch; resumes in the middle of an epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.schema import AugConfig, DataConfig, EvalConfig
from helpers.training import CPU, alone, lenet, make_state, on_ranks, random_batch, record_gradients, small_net
from models import build_model
from pipelines import build_eval_loader, build_train_loader
from pipelines.loader.batches import Batch
from pipelines.loader.loader import Loader
from train.checkpoint import store
from train.checkpoint.restore import restore_state
from train.distributed.process_group import Ranks
from train.engine.epoch import train_epoch
from train.engine.evaluate import Evaluation, evaluate
from train.engine.precision import amp_dtype
from train.engine.state import TrainState
from train.engine.step import train_step
from train.optim.schedule import Timeline, learning_rate
from train.throughput import measure_images_per_s

VAL_SAMPLES = 107  # a prime number, so that no batch size and no number of ranks divides it


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def train_loader(data: Path, batch_size: int = 100, accumulation_steps: int = 1) -> Loader:
    section = DataConfig(path=str(data), batch_size=batch_size)
    return build_train_loader(
        section, AugConfig(crop="pad", flip=0.5), seed=3, device=CPU, accumulation_steps=accumulation_steps
    )


def plain_gradients(model: nn.Module, batch: Batch, **options: Any) -> list[torch.Tensor]:
    loss = F.cross_entropy(model(batch.images), batch.labels, **options)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def total_norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(()))))


# The step


@pytest.mark.parametrize("share", [0.25, 4.0], ids=["above the limit", "below the limit"])
def test_gradients_are_scaled_down_to_the_norm_limit_and_left_alone_below_it(share: float) -> None:
    batch = random_batch(16)
    plain = plain_gradients(lenet(), batch)
    limit = share * total_norm(plain)
    training = make_state(lenet(), clip_grad_norm=limit)
    seen = record_gradients(training)
    train_step(training, batch)
    factor = min(1.0, share)
    for ours, theirs in zip(seen[0], plain, strict=True):
        torch.testing.assert_close(ours, theirs * factor, rtol=1e-4, atol=1e-7)


def test_clipping_sees_the_gradient_of_the_whole_accumulated_step() -> None:
    batches = [random_batch(16, seed=seed) for seed in (1, 2)]
    plain = [(a + b) / 2 for a, b in zip(*(plain_gradients(lenet(), batch) for batch in batches), strict=True)]
    limit = 0.5 * total_norm(plain)
    training = make_state(lenet(), accumulation_steps=2, clip_grad_norm=limit)
    seen = record_gradients(training)
    for last, batch in enumerate(batches):
        train_step(training, batch, optimizer_step=bool(last))
    assert total_norm(seen[0]) == pytest.approx(limit, rel=1e-4)
    for ours, theirs in zip(seen[0], plain, strict=True):
        torch.testing.assert_close(ours, theirs * 0.5, rtol=1e-4, atol=1e-7)


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    batch = random_batch(16)
    training = make_state(lenet(), label_smoothing=0.3)
    seen = record_gradients(training)
    train_step(training, batch)
    model = lenet()
    target = F.one_hot(batch.labels, 10) * 0.7 + 0.03
    loss = -(target * F.log_softmax(model(batch.images), 1)).sum(1).mean()
    assert float(training.sums[0]) == pytest.approx(16 * float(loss.detach()), rel=1e-5)
    for ours, theirs in zip(seen[0], torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_weights_change_at_the_last_pass_of_an_accumulated_step_only_and_gradients_start_anew() -> None:
    training = make_state(lenet(), accumulation_steps=3)
    for step in range(2):
        before = copy.deepcopy(training.network.state_dict())
        for micro in range(3):
            train_step(training, random_batch(4, seed=3 * step + micro), optimizer_step=micro == 2)
            same = all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())
            assert same == (micro < 2)
        assert all(parameter.grad is None for parameter in training.network.parameters())


def test_sums_count_loss_hits_and_samples_of_batches_of_any_size() -> None:
    training = make_state(lenet(), lr=1e-12, optimizer={"weight_decay": 0.0})  # so small that nothing changes
    model, expected = lenet(), torch.zeros(3, dtype=torch.float64)
    for seed, size in enumerate((5, 16, 1)):
        batch = random_batch(size, seed=seed)
        train_step(training, batch)
        logits = model(batch.images).detach()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        expected += torch.stack([loss, (logits.argmax(1) == batch.labels).sum(), torch.tensor(size)]).double()
    torch.testing.assert_close(training.sums, expected, rtol=1e-5, atol=0)


def test_float16_skips_an_update_that_overflows_and_lowers_its_scale() -> None:
    training = make_state(lenet(), amp="fp16", clip_grad_norm=1.0)
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**40})
    before = copy.deepcopy(training.network.state_dict())
    train_step(training, random_batch(8))
    assert all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())
    assert training.scaler.get_scale() == 2.0**39


def test_float16_clips_the_gradients_without_their_scale() -> None:
    batch = random_batch(8)
    norm = total_norm(plain_gradients(lenet(), batch))
    sgd = {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    training = make_state(lenet(), amp="fp16", clip_grad_norm=norm / 2, optimizer=sgd, lr=1.0)
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0**8})
    train_step(training, batch)
    pairs = zip(lenet().parameters(), training.network.parameters(), strict=True)
    change = total_norm([before.detach() - after.detach() for before, after in pairs])
    assert change == pytest.approx(norm / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("name", "expected"), [("auto", None), ("off", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_on_the_cpu_auto_means_float32_and_a_named_type_is_taken(name: str, expected: torch.dtype | None) -> None:
    assert amp_dtype(name, CPU) == expected


# The epoch


def test_the_learning_rate_changes_at_every_update_and_not_at_every_pass(npy_data: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "lr": 0.1, "warmup_epochs": 1, "accumulation_steps": 3}
    training = make_state(small_net(), optimizer={"name": "sgd"}, **settings)
    loader = train_loader(npy_data, batch_size=50, accumulation_steps=3)
    assert len(loader) == 12
    used: list[float] = []
    training.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    noted: list[tuple[int, float]] = []
    for _ in range(2):
        train_epoch(training, loader, seed=0, rank=0, after_step=lambda *update: noted.append(update))
    expected = [learning_rate(update, Timeline.even(2, 4), training.config) for update in range(8)]
    assert used == expected
    assert noted == list(enumerate(expected))
    assert len(set(expected[:4])) == 4


def test_an_epoch_is_a_plain_loop_over_the_loader(npy_data: Path) -> None:
    training = make_state(build_model("lenet", 12, mean=[0.5] * 3, std=[0.3] * 3), epochs=1, schedule="constant")
    model = copy.deepcopy(training.network)
    times = train_epoch(training, train_loader(npy_data), seed=0, rank=0, after_step=lambda *_: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.ndim > 1]
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0})
    for images, labels in train_loader(npy_data):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for ours, theirs in zip(training.network.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert times.micro_steps == 7
    assert 0 <= times.wait_s <= times.time_s


class Interrupted(Exception):
    pass


def train_both_epochs(training: TrainState, loader: Loader, after_step: Callable[[int, float], None]) -> None:
    while loader.state["epoch"] < 2:
        train_epoch(training, loader, seed=0, rank=0, after_step=after_step)


def trained(data: Path, accumulation_steps: int, *, epochs: int = 2, seed: int = 0, rank: int = 0) -> dict[str, Any]:
    """Weights and statistics after `epochs` without a break."""
    training = make_state(small_net(), accumulation_steps=accumulation_steps, epochs=2)
    loader = train_loader(data, batch_size=50, accumulation_steps=accumulation_steps)
    for _ in range(epochs):
        train_epoch(training, loader, seed=seed, rank=rank, after_step=lambda *_: None)
    return training.network.state_dict()


@pytest.mark.parametrize(
    ("accumulation_steps", "break_at"), [(1, 0), (1, 9), (1, 13), (1, 20), (2, 3), (2, 6), (2, 10)]
)
def test_a_run_with_dropout_that_breaks_at_any_update_goes_on_to_bitwise_the_same_weights(
    accumulation_steps: int, break_at: int, npy_data: Path, tmp_path: Path
) -> None:
    def new() -> tuple[TrainState, Loader]:
        training = make_state(small_net(), accumulation_steps=accumulation_steps, epochs=2)
        return training, train_loader(npy_data, batch_size=50, accumulation_steps=accumulation_steps)

    training, loader = new()

    def save_and_break(update: int, lr: float) -> None:
        if update == break_at:
            store.save(tmp_path / "last.pt", training, training.sums, state=loader.state)
            raise Interrupted

    with pytest.raises(Interrupted):
        train_both_epochs(training, loader, save_and_break)

    torch.manual_seed(99)
    training, loader = new()
    with torch.no_grad():
        for parameter in training.network.parameters():
            parameter.fill_(0.5)  # a restore that forgets something shows
    content = store.load(tmp_path / "last.pt")
    restore_state(training, content, tmp_path / "last.pt")
    loader.state = content["state"]
    train_both_epochs(training, loader, lambda *_: None)
    expected = trained(npy_data, accumulation_steps)
    resumed = training.network.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_dropout_differs_between_ranks_and_seeds_and_is_repeatable(npy_data: Path) -> None:
    def weights(**who: int) -> torch.Tensor:
        head: torch.Tensor = trained(npy_data, 1, epochs=1, **who)["head.weight"]
        return head

    first = weights(rank=0, seed=0)
    assert torch.equal(first, weights(rank=0, seed=0))
    assert not torch.equal(first, weights(rank=1, seed=0))
    assert not torch.equal(first, weights(rank=0, seed=1))


# Throughput


def throughput(ranks: Ranks, data: Path) -> int:
    """How many batches the measurement took; clocks run fast, to make it short, and at another speed on each rank."""
    batches = 0

    def count(*_: Any) -> None:
        nonlocal batches
        batches += 1

    clock = time.perf_counter
    time.perf_counter = lambda: clock() * 20 * (1 + 2 * ranks.rank)  # type: ignore[assignment]
    training = make_state(small_net())
    training.network.register_forward_hook(count)
    loader = train_loader(data, batch_size=4)
    measure_images_per_s(training, loader, ranks.world_size, warmup_steps=10, seconds=0.1)
    return batches


def test_throughput_takes_the_same_steps_on_all_ranks_whatever_their_clocks_say(npy_data: Path) -> None:
    first, second = on_ranks(2, throughput, npy_data)
    assert first == second > 2 * 10


# Evaluation


def val_loader(data: Path, ranks: Ranks, batch_size: int = 16) -> Loader:
    return build_eval_loader(
        DataConfig(path=str(data)), EvalConfig(batch_size=batch_size), device=CPU, rank=ranks.rank,
        world_size=ranks.world_size,
    )  # fmt: skip


def gather_statistics(network: nn.Module, rank: int = 0) -> None:
    """Batch norm's, other than those of any batch, so that train mode would show, and different from rank to rank."""
    for seed in range(20):
        network(random_batch(8, seed=seed).images // (1 + rank))


def evaluation(ranks: Ranks, data: Path, batch_size: int = 16) -> tuple[Evaluation, list[int]]:
    """The result, and the sizes of this rank's batches."""
    loader = val_loader(data, ranks, batch_size)
    training = make_state(small_net(), label_smoothing=0.2)
    gather_statistics(training.network, ranks.rank)
    return evaluate(training, loader, VAL_SAMPLES), [len(batch.labels) for batch in loader]


def plain_evaluation(data: Path) -> Evaluation:
    """One sample after the other, in the plainest way."""
    network = small_net()
    gather_statistics(network)
    network.eval()
    loss = top1 = top5 = 0.0
    for images, labels in val_loader(data, Ranks(), batch_size=1):
        with torch.no_grad():
            logits = network(images)[0]
        order = logits.argsort(descending=True).tolist()
        loss -= float(torch.log_softmax(logits.double(), 0)[labels[0]])
        top1 += labels[0].item() == order[0]
        top5 += labels[0].item() in order[:5]
    return Evaluation(loss / VAL_SAMPLES, top1 / VAL_SAMPLES, top5 / VAL_SAMPLES, VAL_SAMPLES)


def assert_equal_results(ours: Evaluation, theirs: Evaluation) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert (ours.top1, ours.top5, ours.samples) == (theirs.top1, theirs.top5, theirs.samples)
    assert 0 < theirs.top1 < theirs.top5 < 1  # the claim is not about nothing


@pytest.mark.parametrize("batch_size", [1, 16, 53, 107, 500])
def test_a_padded_last_batch_changes_nothing(batch_size: int, npy_data: Path) -> None:
    result, sizes = evaluation(Ranks(), npy_data, batch_size)
    assert sizes[-1] == VAL_SAMPLES - batch_size * (len(sizes) - 1)
    assert_equal_results(result, plain_evaluation(npy_data))


@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_counts_every_sample_once_on_several_ranks(world_size: int, npy_data: Path) -> None:
    expected = plain_evaluation(npy_data)
    results = on_ranks(world_size, evaluation, npy_data)
    for result, _ in results:
        assert_equal_results(result, expected)
    assert sum(sum(sizes) for _, sizes in results) == VAL_SAMPLES
    assert len({tuple(sizes) for _, sizes in results}) > 1  # the pieces are not equal


def test_ranks_without_any_sample_take_part_in_evaluation(npy_data: Path) -> None:
    results = on_ranks(3, tiny_evaluation, npy_data)
    assert [result.samples for result in results] == [2, 2, 2]
    assert results[0] == results[1] == results[2]


def tiny_evaluation(ranks: Ranks, data: Path) -> Evaluation:
    """Of the first two samples, which the last two ranks hold."""
    batches = list(val_loader(data, Ranks(), batch_size=1))[:1] if ranks.rank else []
    return evaluate(make_state(small_net()), batches, samples=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("claimed", [VAL_SAMPLES - 1, VAL_SAMPLES + 1])
def test_a_wrong_number_of_samples_is_an_error(claimed: int, npy_data: Path) -> None:
    with pytest.raises(RuntimeError, match=f"counted 107 samples of a split of {claimed}"):
        evaluate(make_state(small_net()), val_loader(npy_data, Ranks()), claimed)


def test_evaluation_changes_nothing_that_training_uses(npy_data: Path) -> None:
    training = make_state(small_net())
    train_step(training, random_batch(8))
    before = copy.deepcopy(training.network.state_dict()), training.sums.clone()
    evaluate(training, val_loader(npy_data, Ranks()), VAL_SAMPLES)
    assert all(torch.equal(before[0][name], value) for name, value in training.network.state_dict().items())
    assert torch.equal(before[1], training.sums)
    loader = train_loader(npy_data)
    train_epoch(training, loader, seed=0, rank=0, after_step=lambda *_: None)
    assert training.network.training  # train_epoch turns dropout on again


def test_with_fewer_than_five_classes_every_sample_is_in_the_top_five(npy_data: Path) -> None:
    batches = [Batch(images, labels % 3) for images, labels in val_loader(npy_data, Ranks())]
    result = evaluate(make_state(small_net(3)), batches, VAL_SAMPLES)  # type: ignore[arg-type]
    assert result.top5 == 1.0
    assert result.top1 < 1.0
