"""Tests of tools.visualize.predictions."""

from __future__ import annotations

import numpy as np
import torch

from tools.visualize.predictions import confident_mistakes, confused_pairs


def test_mistakes_exclude_unlabelled_samples() -> None:
    logits = torch.tensor([[9.0, 0], [3, 0], [5, 0], [0, 1], [8, 0]])
    assert confident_mistakes(logits, torch.tensor([-1, 1, 1, 0, 0])).tolist() == [2, 1, 3]


def test_perfect_matrix_has_no_confused_pairs() -> None:
    assert confused_pairs(np.eye(3, dtype=np.int64), ("a", "b", "c")) == []
