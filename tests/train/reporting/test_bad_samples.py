"""Reports of the samples that training has replaced, over all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.damage import DAMAGE, damage
from helpers.loaders import train
from helpers.training import alone, on_ranks
from pipelines.loader.train_loader import TrainLoader
from train.distributed.process_group import Ranks
from train.reporting.bad_samples import report_bad_samples

SKIP = {"image_size": 24, "on_bad_sample": "skip"}


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


def finished(loader: TrainLoader) -> TrainLoader:
    for _ in loader:
        pass
    return loader


# Bad samples


@pytest.fixture
def damaged(jpeg_copy: Path) -> Path:
    """Samples 3, 4 and 200 of the train split cannot be decoded."""
    for sample in (3, 4, 200):
        damage(jpeg_copy, sample, DAMAGE["emptied"])
    return jpeg_copy


def test_bad_samples_are_reported_with_count_and_budget(damaged: Path) -> None:
    with alone():
        loader = train(damaged, 52, **SKIP)
        assert report_bad_samples(loader) is None
        for _ in range(2):
            assert report_bad_samples(finished(loader)) == (
                "bad samples so far: 3 of at most 16, replaced by others (split 'train': 3, 4, 200)"
            )


def test_ranks_share_bad_sample_budget(damaged: Path) -> None:
    first, second = on_ranks(2, reports_with_budgets, damaged)
    assert first == second
    assert "3 of at most 3" in first[0]
    assert "3 samples of split 'train' cannot be decoded, more than data.max_bad_samples=2" in first[1]


def reports_with_budgets(ranks: Ranks, data: Path) -> list[str]:
    """Return the reports with budgets of 3 and 2 samples, which no rank exceeds alone."""
    found = []
    for budget in (3, 2):
        loader = train(data, 26, rank=ranks.rank, world_size=2, **SKIP, max_bad_samples=budget)
        met = (200, 4) if ranks.rank and budget == 3 else ((3, 200)[ranks.rank],)
        loader.bad.add(dict.fromkeys(met, "cannot be decoded"), loader.stage.source.defect)
        try:
            found.append(str(report_bad_samples(loader)))
        except UserError as error:
            found.append(str(error))
    return found
