"""Substitutes of samples that cannot be decoded: their choice, their limit, and the messages."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import DataConfig
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.damage import substitutes
from pipelines.loader.bad_samples import BadSamples, for_evaluation, for_training
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

WRONG = "cannot be decoded"
SAMPLES = 53


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()  # warnings are shown once per process


@pytest.fixture(scope="module")
def split(jpeg_data: Path) -> Split:
    return open_split(jpeg_data, "val")


def bad_samples(split: Split, budget: int = 16, choice: str = "skip") -> BadSamples:
    return for_training(split, DataConfig(path="x", on_bad_sample=choice, max_bad_samples=budget))  # type: ignore[arg-type]


def among(bad: set[int]) -> Callable[[int], str | None]:
    return lambda sample: WRONG if sample in bad else None


@given(st.lists(st.integers(0, SAMPLES - 1), unique=True, min_size=1, max_size=SAMPLES - 1), st.randoms())
def test_bad_sample_is_replaced_by_next_intact_one(split: Split, bad: list[int], random: object) -> None:
    met = list(bad)
    random.shuffle(met)  # type: ignore[attr-defined]
    table = bad_samples(split, budget=SAMPLES)
    for sample in met:
        table.add({sample: WRONG}, among(set(bad)))
    expected = substitutes(SAMPLES, set(bad))
    assert np.array_equal(table.substitute(np.arange(SAMPLES)), expected)
    assert sorted(table.found) == [(sample, expected[sample]) for sample in sorted(bad)]


def test_indices_are_not_copied_without_bad_samples(split: Split) -> None:
    indices = np.arange(9)
    assert bad_samples(split).substitute(indices) is indices


def test_bad_substitute_is_replaced_everywhere(split: Split) -> None:
    table = bad_samples(split)
    table.add({4: WRONG}, among({4}))
    table.add({5: WRONG}, among({4, 5}))
    assert table.substitute(np.array([3, 4, 5, 6])).tolist() == [3, 6, 6, 6]


def test_each_bad_sample_is_reported_once(
    split: Split, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    table = bad_samples(split, budget=3)
    for _ in range(2):
        table.add({7: WRONG, 9: "has 3 x 3 pixels where the index says 4 x 4"}, among({7, 9}))
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: {split.describe(7)} {WRONG}; sample 8 takes its place (1 of at most 3 bad samples, "
        "data.max_bad_samples)",
        f"warning: {split.describe(9)} has 3 x 3 pixels where the index says 4 x 4; sample 10 takes its place (2 of at "
        "most 3 bad samples, data.max_bad_samples)",
    ]


def test_exceeding_the_budget_names_samples_and_setting(split: Split) -> None:
    table = bad_samples(split, budget=2)
    table.add({7: WRONG}, among({7}))
    table.add({20: WRONG}, among({20}))
    with pytest.raises(UserError, match=r"3 samples of split 'val' .* data\.max_bad_samples=2") as error:
        table.add({31: WRONG}, among({31}))
    assert all(split.describe(sample) in str(error.value) for sample in (7, 20, 31))
    assert "verify" in str(error.value)
    assert [bad for bad, _ in table.found] == [7, 20]


def test_bad_substitutes_count_towards_the_budget(split: Split) -> None:
    asked: list[int] = []
    with pytest.raises(UserError, match=r"5 samples .* data\.max_bad_samples=4"):
        bad_samples(split, budget=4).add({0: WRONG}, lambda sample: asked.append(sample) or WRONG)  # type: ignore[func-returns-value]
    assert asked == [1, 2, 3, 4]  # no search through a completely bad split


def test_split_without_decodable_samples_is_an_error(split: Split) -> None:
    with pytest.raises(UserError, match=r"no sample of split 'val' can be decoded"):
        bad_samples(split, budget=SAMPLES).add({5: WRONG}, lambda _: WRONG)


def test_error_names_first_sample_and_suggests_skip(split: Split) -> None:
    with pytest.raises(UserError) as error:
        bad_samples(split, choice="stop").add({6: WRONG, 2: WRONG}, among({6, 2}))
    assert str(error.value).startswith(f"{split.describe(6)} {WRONG}: ")
    assert "data.on_bad_sample=skip" in str(error.value)
    assert "key " in split.describe(6)


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_evaluation_replaces_no_sample(split: Split, choice: str) -> None:
    table = for_evaluation(split, DataConfig(path="x", on_bad_sample=choice))  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        table.add({6: WRONG}, among({6}))
    assert str(error.value).startswith(f"{split.describe(6)} {WRONG}: ")
    assert ("an evaluation needs every sample" in str(error.value)) == (choice == "skip")
    assert not table.can_replace


def test_threads_agree_on_substitutes(split: Split) -> None:
    bad = {3, 4, 10, 11, 12, 52}
    table = bad_samples(split)
    threads = [
        threading.Thread(target=table.add, args=(dict.fromkeys(some, WRONG), among(bad)))
        for some in ([3, 10, 52], [52, 12, 4], [11, 3], [4, 10]) * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(table.substitute(np.arange(SAMPLES)), substitutes(SAMPLES, bad))
    assert sorted(sample for sample, _ in table.found) == sorted(bad)
