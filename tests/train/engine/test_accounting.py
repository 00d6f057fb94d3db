"""Accounts over all ranks: evaluations that count a sample twice or never are caught, and bad samples are counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.damage import DAMAGE, damage
from helpers.loaders import evaluation, train
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.training import alone, make_state, on_ranks, random_batch, small_net
from pipelines.loader.loader import Loader
from train.distributed import collectives
from train.distributed.process_group import Ranks
from train.engine.evaluate import check_full_coverage, evaluate
from train.reporting.bad_samples import report_bad_samples

SAMPLES = 107  # of npy_data's val
SKIP = {"image_size": 24, "on_bad_sample": "skip"}


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


def finished(loader: Loader) -> Loader:
    for _ in loader:
        pass
    return loader


def check_together(loaders: Sequence[Loader], monkeypatch: pytest.MonkeyPatch) -> None:
    """check_each_once of one finished loader per rank, in this process."""
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(
        collectives, "sum_over_ranks", lambda values: (parts.append(values), torch.zeros_like(values))[1]
    )
    for loader in loaders:
        with pytest.raises(RuntimeError):  # nobody has counted anything
            check_full_coverage(loader)
    total = torch.stack(parts).sum(0)
    monkeypatch.setattr(collectives, "sum_over_ranks", lambda _: total)
    for loader in loaders:
        check_full_coverage(loader)


def pieces(folder: Path, world_size: int, batch_size: int = 10) -> list[Loader]:
    return [evaluation(folder, batch_size, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 10, 107])
def test_pieces_of_any_number_of_ranks_pass_also_a_second_time(
    world_size: int, batch_size: int, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = pieces(npy_data, world_size, batch_size)
    assert SAMPLES % max(world_size, 2) != 0  # uneven
    for _ in range(2):
        check_together([finished(loader) for loader in loaders], monkeypatch)
        monkeypatch.undo()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_sample_that_stands_twice_in_a_plan_in_the_place_of_another_is_caught(
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


def test_a_sample_that_no_rank_has_is_caught(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pieces(npy_data, 2, batch_size=1)
    loaders[1].plan.samples -= 10
    with pytest.raises(RuntimeError, match=r"counted 97 samples of split 'val', which has 107"):
        check_together([finished(loader) for loader in loaders], monkeypatch)


def test_an_iteration_that_was_left_does_not_count_as_the_next(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = evaluation(npy_data, 10)
    next(iter(loader))
    assert loader.seen.samples == 10
    check_together([finished(loader)], monkeypatch)


def test_a_piece_that_two_ranks_have_is_caught(npy_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = [evaluation(npy_data, 10, rank, 3) for rank in (0, 2, 2)]
    assert [loader.plan.samples for loader in loaders] == [35, 36, 36]  # the second should have 36 others
    with pytest.raises(RuntimeError, match=r"counted the 107 samples of split 'val', but not each of them once"):
        check_together([finished(loader) for loader in loaders], monkeypatch)


def test_evaluation_ends_on_all_ranks_where_one_has_anothers_piece(tmp_path: Path) -> None:
    write(memory_source(val=MemoryRows(106)), tmp_path / "out")
    errors = on_ranks(2, error_of_evaluation, tmp_path / "out")
    assert "counted the 106 samples of split 'val', but not each of them once" in errors[0]
    assert errors[0] == errors[1]


def error_of_evaluation(ranks: Ranks, data: Path) -> str:
    loader = evaluation(data, 16, rank=0, world_size=ranks.world_size)
    with pytest.raises(RuntimeError) as error:
        evaluate(make_state(small_net()), loader, 106)
    return str(error.value)


def test_batches_without_a_loader_have_no_samples_to_account_for() -> None:
    with alone():
        assert evaluate(make_state(small_net()), [random_batch(5)], 5).samples == 5


# Bad samples


@pytest.fixture
def damaged(jpeg_copy: Path) -> Path:
    """Samples 3, 4 and 200 of the train split cannot be decoded."""
    for sample in (3, 4, 200):
        damage(jpeg_copy, sample, DAMAGE["emptied"])
    return jpeg_copy


def test_bad_samples_are_reported_with_their_number_and_the_budget(damaged: Path) -> None:
    with alone():
        loader = train(damaged, 52, **SKIP)
        assert report_bad_samples(loader) is None
        for _ in range(2):
            assert report_bad_samples(finished(loader)) == (
                "bad samples so far: 3 of at most 16, replaced by others (split 'train': 3, 4, 200)"
            )


def test_ranks_count_each_bad_sample_once_and_share_the_budget(damaged: Path) -> None:
    first, second = on_ranks(2, reports_with_budgets, damaged)
    assert first == second
    assert "3 of at most 3" in first[0]
    assert "3 samples of split 'train' cannot be decoded, more than data.max_bad_samples=2" in first[1]


def reports_with_budgets(ranks: Ranks, data: Path) -> list[str]:
    """With 3 and with 2, which no rank exceeds alone: the first one meets 3 and 4, the second 200."""
    found = []
    for budget in (3, 2):
        loader = train(data, 26, rank=ranks.rank, world_size=2, **SKIP, max_bad_samples=budget)
        met = (200, 4) if ranks.rank and budget == 3 else ((3, 200)[ranks.rank],)
        loader.bad.add(dict.fromkeys(met, "cannot be decoded"), loader.source.defect)
        try:
            found.append(str(report_bad_samples(loader)))
        except UserError as error:
            found.append(str(error))
    return found
