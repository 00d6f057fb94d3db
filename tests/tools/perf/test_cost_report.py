"""Tests of tools.perf.cost_report."""

from __future__ import annotations

import pytest
import torch

from helpers.training import CPU
from tools import summary
from tools.perf import model_cases
from tools.perf.cost_report import ratio_sentences, summary_row
from tools.perf.summary_command import compute_costs


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_ratios_compare_with_smallest_model() -> None:
    options = summary.parse_arguments(["x"])
    cases = [model_cases.build_case(name, options) for name in ("alexnet", "lenet")]
    rows = [summary_row(case, compute_costs(case, CPU, None)[0], None, None) for case in cases]
    (text,) = ratio_sentences(rows)
    assert text.startswith("alexnet has 686 times the parameters, 107 times the FLOPs and ")
    assert text.endswith(" times the training memory of lenet.")
    assert ratio_sentences(rows[:1]) == []
