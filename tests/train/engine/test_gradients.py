"""Gradients of a global batch equal plain torch for any number of processes and micro-steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.utils.errors import UserError
from helpers.training import CPU, alone, lenet, make_state, on_ranks, random_batch, record_gradients, small_net
from pipelines.loader.batches import Batch
from train.distributed import collectives
from train.distributed.process_group import Ranks, data_parallel, process_group
from train.engine.step import train_step

SAMPLES, STEPS = 24, 3  # several steps, since DDP builds its buckets in the first
PLAIN_SGD = {"name": "sgd", "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


def gradients(ranks: Ranks, accumulation_steps: int, compiled: bool = False) -> list[list[torch.Tensor]]:
    """Return LeNet's float64 gradients at each of STEPS optimizer steps of the training code."""
    state = make_state(lenet().double(), PLAIN_SGD, accumulation_steps=accumulation_steps, lr=0.1, label_smoothing=0.1)
    if compiled:
        state.loss_and_counts = torch.compile(state.loss_and_counts, backend="aot_eager")
    seen = record_gradients(state)
    pieces = accumulation_steps * ranks.world_size
    for step in range(STEPS):
        images, labels = random_batch(SAMPLES, seed=step)
        for micro in range(accumulation_steps):
            piece = slice(*((micro * ranks.world_size + ranks.rank + i) * SAMPLES // pieces for i in (0, 1)))
            train_step(state, Batch(images[piece], labels[piece]), optimizer_step=micro == accumulation_steps - 1)
    return seen


def plain_gradients() -> list[list[torch.Tensor]]:
    """Return the gradients of one plain model that sees each global batch at once."""
    model = lenet().double()
    seen = []
    for step in range(STEPS):
        images, labels = random_batch(SAMPLES, seed=step)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        found = torch.autograd.grad(loss, list(model.parameters()))
        seen.append(list(found))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), found, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    return seen


def assert_same_gradients(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> None:
    assert len(ours) == len(theirs) == STEPS
    for step_ours, step_theirs in zip(ours, theirs, strict=True):
        largest = max(float((a - b).abs().max()) for a, b in zip(step_ours, step_theirs, strict=True))
        assert largest <= 1e-10
        assert max(float(gradient.abs().max()) for gradient in step_theirs) > 1e-3  # not all zeros


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3])
def test_one_process_gives_the_gradients_of_plain_torch(accumulation_steps: int) -> None:
    assert_same_gradients(gradients(Ranks(), accumulation_steps), plain_gradients())


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation_steps", "compiled"), [(1, False), (3, False), (3, True)])
def test_two_processes_give_the_gradients_of_plain_torch(accumulation_steps: int, compiled: bool) -> None:
    for of_rank in on_ranks(2, gradients, accumulation_steps, compiled):
        assert_same_gradients(of_rank, plain_gradients())


def gradients_within_an_accumulated_step(ranks: Ranks, compiled: bool) -> list[torch.Tensor]:
    state = make_state(lenet().double(), PLAIN_SGD, accumulation_steps=2)
    if compiled:
        state.loss_and_counts = torch.compile(state.loss_and_counts, backend="aot_eager")
    train_step(state, random_batch(4, seed=ranks.rank), optimizer_step=False)
    return [parameter.grad.clone() for parameter in state.network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_reduced_in_last_micro_step_only(compiled: bool) -> None:
    first, second = on_ranks(2, gradients_within_an_accumulated_step, compiled)
    for rank, ours in enumerate((first, second)):
        model = lenet().double()
        images, labels = random_batch(4, seed=rank)
        theirs = torch.autograd.grad(F.cross_entropy(model(images), labels) / 2, list(model.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert any(not torch.equal(a, b) for a, b in pairwise([first[0], second[0]]))


def weights_after_construction(ranks: Ranks) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return parameters of initially different models after two steps, and local and shared statistics."""
    network = small_net(seed=ranks.rank)
    state = make_state(network)
    mean = network.get_buffer("norm.running_mean")
    for step in range(2):
        mean.fill_(100 * ranks.rank)
        train_step(state, random_batch(8, seed=2 * step + ranks.rank))
    own = mean.clone()
    collectives.broadcast_buffers(network)
    return [p.detach().clone() for p in network.parameters()], [own, *(b.clone() for b in network.buffers())]


def test_ranks_share_initial_weights_and_evaluation_statistics() -> None:
    (first, (own_mean, *buffers)), (second, (other_mean, *other_buffers)) = on_ranks(2, weights_after_construction)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert own_mean.abs().max() < 10 < 80 < other_mean.abs().min()  # training steps do not share them
    assert torch.equal(buffers[0], own_mean)
    assert all(torch.equal(a, b) for a, b in zip(buffers, other_buffers, strict=True))


class Buffers(nn.Module):
    """Buffers of all sizes, shapes and memory formats, different on each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.register_buffer("flag", torch.tensor([True, False, rank == 0]))
        self.register_buffer("count", torch.tensor(7 + rank))
        self.register_buffer("small", torch.randn(5).bfloat16())
        self.register_buffer("filters", torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last))
        self.register_buffer("transposed", torch.randn(2, 3, dtype=torch.float64).T)
        self.register_buffer("empty", torch.zeros(0))


def broadcasts_and_buffers(ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]]:
    calls = []
    broadcast = torch.distributed.broadcast

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        broadcast(*arguments)

    network = Buffers(ranks.rank)
    strides = [buffer.stride() for buffer in network.buffers()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "broadcast", counted)
        collectives.broadcast_buffers(network)
        collectives.broadcast_buffers(nn.ReLU())
    assert [buffer.stride() for buffer in network.buffers()] == strides
    return len(calls), dict(network.named_buffers())


def test_buffers_are_equalized_bitwise_in_one_broadcast() -> None:
    expected = dict(Buffers(0).named_buffers())
    for broadcasts, buffers in on_ranks(2, broadcasts_and_buffers):
        assert broadcasts == 1
        assert buffers.keys() == expected.keys()
        assert all(torch.equal(buffers[name], value) for name, value in expected.items())


def test_one_rank_broadcasts_no_buffers() -> None:
    broadcasts, buffers = broadcasts_and_buffers(Ranks())
    assert broadcasts == 0
    assert torch.equal(buffers["filters"], Buffers(0).filters)  # type: ignore[arg-type]


def sums_and_an_error(ranks: Ranks) -> tuple[list[float], str, str]:
    def only_on_the_first() -> str:
        assert ranks.rank == 0
        return f"from rank {ranks.rank}"

    def fail() -> None:
        raise UserError("bad luck on rank 0")

    values = collectives.sum_over_ranks(torch.tensor([1.0, float(ranks.rank)])).tolist()
    try:
        collectives.from_first_rank(fail)
    except UserError as error:
        return values, collectives.from_first_rank(only_on_the_first), str(error)
    return values, "", "no error"


def test_collectives_share_sums_values_and_user_errors() -> None:
    assert on_ranks(2, sums_and_an_error) == [([2.0, 1.0], "from rank 0", "bad luck on rank 0")] * 2


def test_one_process_needs_no_wrapper() -> None:
    model = nn.Linear(2, 2)
    assert data_parallel(model, CPU, 1) is model


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(UserError, match=r"4 processes .* 2 GPUs; use --nproc_per_node=2"),
        process_group(Ranks(0, 0, 4, 4)),
    ):
        pass


def test_ranks_come_from_torchrun_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert not Ranks.from_environment().is_first
    monkeypatch.delenv("WORLD_SIZE")
    assert Ranks.from_environment() == Ranks(0, 0, 1, 1)
    assert Ranks.from_environment().is_first
