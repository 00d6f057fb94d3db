"""Collectives: all ranks agree on the number of machines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from train.distributed import collectives
from train.distributed.process_group import Ranks


@pytest.mark.parametrize(
    ("layout", "machines"),
    [
        ([(0, 1)], 1),
        ([(0, 2), (1, 2)], 1),
        ([(0, 1), (0, 1)], 2),
        ([(0, 2), (1, 2), (0, 2), (1, 2)], 2),
        ([(0, 2), (1, 2), (0, 1), (0, 1)], 1),  # unequal machines
        ([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)], 1),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], 1),  # ranks that alternate between machines
        ([(0, 3), (1, 3), (2, 3), (0, 3)], 1),
        ([(0, 0), (0, 0)], 1),
    ],
)
def test_all_ranks_find_the_same_number_of_machines(
    layout: Sequence[tuple[int, int]], machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [Ranks(rank, local, len(layout), size) for rank, (local, size) in enumerate(layout)]
    told: list[str] = []
    monkeypatch.setattr(collectives, "from_all_ranks", lambda text: told.append(text) or [text] * len(ranks))
    for one in ranks:
        collectives.count_machines(one)
    monkeypatch.setattr(collectives, "from_all_ranks", lambda _: told)
    assert [collectives.count_machines(one) for one in ranks] == [machines] * len(ranks)
