"""Tests of tools.visualize.dataset."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.open import open_split
from tools.visualize.dataset import class_examples


def test_examples_contain_one_sample_per_class(npy_data: Path) -> None:
    split = open_split(npy_data, "train")
    assert split.labels is not None
    assert split.labels[class_examples(split, 20, seed=0)].tolist() == list(range(12))
    few = split.labels[class_examples(split, 5, seed=0)].tolist()
    assert len(few) == 5
    assert few == sorted(set(few))
