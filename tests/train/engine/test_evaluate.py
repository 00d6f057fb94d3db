"""Evaluation counts every sample once, and equals plain torch, also with test-time augmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DataConfig, EvalConfig
from helpers.loaders import evaluation, train_loader
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.training import CPU, alone, make_state, on_ranks, random_batch, small_net
from pipelines import build_eval_loader
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from train.distributed import collectives
from train.distributed.process_group import Ranks
from train.engine.epoch import train_epoch
from train.engine.evaluate import Evaluation, check_full_coverage, evaluate, mean_logits, views
from train.engine.step import train_step

VAL_SAMPLES = 107  # a prime number, so that no batch size and no number of ranks divides it
SAMPLES = 107  # of npy_data's val
MODES = pytest.mark.parametrize("tta", ["none", "flip", "flip-translate"])


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    with alone():
        yield


# Evaluation


def val_loader(data: Path, ranks: Ranks, batch_size: int = 16) -> EvalLoader:
    return build_eval_loader(
        DataConfig(path=str(data)), EvalConfig(batch_size=batch_size), device=CPU, rank=ranks.rank,
        world_size=ranks.world_size,
    )  # fmt: skip


def gather_statistics(network: nn.Module, rank: int = 0) -> None:
    """Set batch norm statistics that differ between ranks and from any batch, so that train mode would show."""
    for seed in range(20):
        network(random_batch(8, seed=seed).images // (1 + rank))


def evaluate_on_rank(ranks: Ranks, data: Path, batch_size: int = 16) -> tuple[Evaluation, list[int]]:
    """Return the result and this rank's batch sizes."""
    loader = val_loader(data, ranks, batch_size)
    state = make_state(small_net(), label_smoothing=0.2)
    gather_statistics(state.network, ranks.rank)
    return evaluate(state, loader, VAL_SAMPLES), [len(batch.labels) for batch in loader]


def plain_evaluation(data: Path) -> Evaluation:
    """Evaluate sample by sample."""
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
    assert 0 < theirs.top1 < theirs.top5 < 1  # the comparison is not trivial


@pytest.mark.parametrize("batch_size", [1, 16, 53, 107, 500])
def test_padded_last_batch_changes_nothing(batch_size: int, npy_data: Path) -> None:
    result, sizes = evaluate_on_rank(Ranks(), npy_data, batch_size)
    assert sizes[-1] == VAL_SAMPLES - batch_size * (len(sizes) - 1)
    assert_equal_results(result, plain_evaluation(npy_data))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_validation_counts_every_sample_once_on_several_ranks(world_size: int, npy_data: Path) -> None:
    expected = plain_evaluation(npy_data)
    results = on_ranks(world_size, evaluate_on_rank, npy_data)
    for result, _ in results:
        assert_equal_results(result, expected)
    assert sum(sum(sizes) for _, sizes in results) == VAL_SAMPLES
    assert len({tuple(sizes) for _, sizes in results}) > 1  # the pieces are not equal


def test_ranks_without_samples_take_part_in_evaluation(npy_data: Path) -> None:
    results = on_ranks(3, tiny_evaluation, npy_data)
    assert [result.samples for result in results] == [2, 2, 2]
    assert results[0] == results[1] == results[2]


def tiny_evaluation(ranks: Ranks, data: Path) -> Evaluation:
    """Evaluate the first two samples, which the last two ranks hold."""
    batches = list(val_loader(data, Ranks(), batch_size=1))[:1] if ranks.rank else []
    return evaluate(make_state(small_net()), batches, samples=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("claimed", [VAL_SAMPLES - 1, VAL_SAMPLES + 1])
def test_wrong_number_of_samples_is_an_error(claimed: int, npy_data: Path) -> None:
    with pytest.raises(RuntimeError, match=f"counted 107 samples of a split of {claimed}"):
        evaluate(make_state(small_net()), val_loader(npy_data, Ranks()), claimed)


def test_evaluation_changes_nothing_that_training_uses(npy_data: Path) -> None:
    state = make_state(small_net())
    train_step(state, random_batch(8))
    before = copy.deepcopy(state.network.state_dict()), state.sums.clone()
    evaluate(state, val_loader(npy_data, Ranks()), VAL_SAMPLES)
    assert all(torch.equal(before[0][name], value) for name, value in state.network.state_dict().items())
    assert torch.equal(before[1], state.sums)
    loader = train_loader(npy_data)
    train_epoch(state, loader, seed=0, rank=0)
    assert state.network.training  # train_epoch turns dropout on again


def test_fewer_than_five_classes_give_full_top5(npy_data: Path) -> None:
    batches = [Batch(images, labels % 3) for images, labels in val_loader(npy_data, Ranks())]
    result = evaluate(make_state(small_net(3)), batches, VAL_SAMPLES)  # type: ignore[arg-type]
    assert result.top5 == 1.0
    assert result.top1 < 1.0


def finished(loader: EvalLoader) -> EvalLoader:
    for _ in loader:
        pass
    return loader


def check_together(loaders: Sequence[EvalLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call check_full_coverage for one finished loader per rank, in this process."""
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(
        collectives, "sum_over_ranks", lambda values: (parts.append(values), torch.zeros_like(values))[1]
    )
    for loader in loaders:
        with pytest.raises(RuntimeError):  # no sample was counted
            check_full_coverage(loader)
    total = torch.stack(parts).sum(0)
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda _: total)
    for loader in loaders:
        check_full_coverage(loader)


def pieces(folder: Path, world_size: int, batch_size: int = 10) -> list[EvalLoader]:
    return [evaluation(folder, batch_size, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 10, 107])
def test_full_coverage_passes_repeatedly_for_any_world_size(
    world_size: int, batch_size: int, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = pieces(npy_data, world_size, batch_size)
    assert SAMPLES % max(world_size, 2) != 0  # uneven
    for _ in range(2):
        check_together([finished(loader) for loader in loaders], monkeypatch)
        monkeypatch.undo()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_duplicate_sample_in_place_of_another_is_detected(
    world_size: int, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = pieces(npy_data, world_size)
    plan = loaders[-1].plan
    indices = plan.indices
    monkeypatch.setattr(plan, "indices", lambda epoch, step: twice(indices(epoch, step)))
    with pytest.raises(RuntimeError, match=r"counted the 107 samples of split 'val', but not each of them once"):
        check_together([finished(loader) for loader in loaders], monkeypatch)


def twice(indices: np.ndarray) -> np.ndarray:
    return np.where(indices == 104, 105, indices)


def test_sample_missing_on_all_ranks_is_detected(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pieces(npy_data, 2, batch_size=1)
    loaders[1].plan.samples -= 10
    with pytest.raises(RuntimeError, match=r"counted 97 samples of split 'val', which has 107"):
        check_together([finished(loader) for loader in loaders], monkeypatch)


def test_abandoned_iteration_does_not_count(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = evaluation(npy_data, 10)
    next(iter(loader))
    assert loader.seen.samples == 10
    check_together([finished(loader)], monkeypatch)


def test_piece_on_two_ranks_is_detected(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = [evaluation(npy_data, 10, rank, 3) for rank in (0, 2, 2)]
    assert [loader.plan.samples for loader in loaders] == [35, 36, 36]  # the second should have 36 other samples
    with pytest.raises(RuntimeError, match=r"counted the 107 samples of split 'val', but not each of them once"):
        check_together([finished(loader) for loader in loaders], monkeypatch)


def test_duplicate_piece_ends_evaluation_on_all_ranks(tmp_path: Path) -> None:
    write(memory_source(val=MemoryRows(106)), tmp_path / "out")
    errors = on_ranks(2, error_of_evaluation, tmp_path / "out")
    assert "counted the 106 samples of split 'val', but not each of them once" in errors[0]
    assert errors[0] == errors[1]


def error_of_evaluation(ranks: Ranks, data: Path) -> str:
    loader = evaluation(data, 16, rank=0, world_size=ranks.world_size)
    with pytest.raises(RuntimeError) as error:
        evaluate(make_state(small_net()), loader, 106)
    return str(error.value)


def test_batches_without_loader_are_not_checked() -> None:
    assert evaluate(make_state(small_net()), [random_batch(5)], 5).samples == 5


def images(height: int = 9, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, height, width, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2)


def plain_views(pixels: Tensor, tta: str) -> list[tuple[float, Tensor]]:
    """Return the views by torch's reflection padding."""
    height, width = pixels.shape[2:]
    padded = F.pad(pixels.double(), (1, 1, 1, 1), mode="reflect").to(pixels.dtype)
    right_down, left_up = padded[:, :, :height, :width], padded[:, :, 2:, 2:]
    if tta == "none":
        return [(1.0, pixels)]
    if tta == "flip":
        return [(0.5, pixels), (0.5, pixels.flip(3))]
    return [(0.25, pixels), (0.25, pixels.flip(3))] + [
        (0.125, view) for shifted in (left_up, right_down) for view in (shifted, shifted.flip(3))
    ]


@MODES
def test_tta_views_keep_shape_dtype_and_memory_format(tta: str) -> None:
    ours, theirs = list(views(images(), tta)), plain_views(images(), tta)
    assert [weight for weight, _ in ours] == [weight for weight, _ in theirs]
    assert sum(weight for weight, _ in ours) == 1
    for (_, view), (_, expected) in zip(ours, theirs, strict=True):
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, expected)


@MODES
def test_tta_logits_are_weighted_mean_despite_reused_output(tta: str) -> None:
    weight = torch.randn(9 * 7 * 3, 5, generator=torch.Generator().manual_seed(1))
    output: Any = torch.empty(4, 5)

    def infer(view: Tensor) -> Tensor:
        torch.matmul(torch.sin(view.float()).flatten(1), weight, out=output)  # as replaying a CUDA graph does
        return output

    expected = sum(share * (torch.sin(view.float()).flatten(1) @ weight) for share, view in plain_views(images(), tta))
    torch.testing.assert_close(mean_logits(infer, images(), tta), expected)
