"""tools/benchmarks/suites/augmentations.py: one kind at a time, ours and torchvision's, for each encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.benchmarks import settings_in
from tools.benchmarks.engine import markdown
from tools.benchmarks.engine.interleaved import Measurement
from tools.benchmarks.engine.measured_tables import InterleavedTable
from tools.benchmarks.engine.results import skipped_row
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites import augmentations
from tools.benchmarks.suites.augmentations import KINDS, PEER

BATCH, SIDE = 16, 24


def made(folder: Path, scratch: Path | None) -> InterleavedTable:
    settings = settings_in(scratch or folder, workers=(0,))
    return augmentations.augmentation_table(settings, folder, batch_size=BATCH, with_peer=scratch is not None)


@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_every_candidate_yields_batches_of_one_shape(
    encoding: str, npy_data: Path, jpeg_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augmentations, "SIDE", SIDE)
    group = made({"npy": npy_data, "jpeg": jpeg_data}[encoding], tmp_path)
    size = {"npy": 32, "jpeg": SIDE}[encoding]
    assert group.details["image_size"] == size
    assert sum(case.fields["ours"] for case in group.cases) == len(KINDS)
    assert (
        sum(not case.fields["ours"] for case in group.cases) == len(KINDS) - 2
    )  # all but timm's RandAugment and cutout
    for candidate in (case.candidate for case in group.cases):
        with candidate.build(*candidate.arguments) as workloads:
            images = next(workloads[""].items)[0]
        assert tuple(images.shape) == (BATCH, 3, size, size), candidate.name
        assert images.dtype == torch.uint8


def test_peers_need_a_scratch_folder(npy_data: Path) -> None:
    assert all(case.fields["ours"] for case in made(npy_data, None).cases)


def measured(group: InterleavedTable, rates: dict[str, float | str]) -> list[dict[str, Any]]:
    """Return the rows of candidates with these rates or errors."""
    measurements = []
    for candidate in (case.candidate for case in group.cases):
        reached = rates.get(candidate.name, 1000.0)
        failed = isinstance(reached, str)
        measurements.append(
            Measurement(candidate.name, "", [] if failed else [float(reached)], error=reached if failed else None)
        )
    return group.entry(measurements, Limits())["rows"]


def test_table_has_shares_of_flip_and_ratios_to_torchvision(npy_data: Path, tmp_path: Path) -> None:
    rates: dict[str, float | str] = {
        "Model Zhu, flip alone": 4000.0,
        f"{PEER}, flip alone": 500.0,
        "Model Zhu, cutout": 3000.0,
        f"{PEER}, RandAugment": "OSError: a long | sentence",
    }
    table = markdown.table({"stage": "augment", "rows": measured(made(npy_data, tmp_path), rates)})
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    lines = {name: others for name, *others in cells}
    assert lines["augmentation"] == ["ours, images/s", "of flip alone", PEER, "ours / this"]
    assert lines["flip alone"] == ["4,000", "1.00", "500", "8.0"]
    assert lines["cutout"] == ["3,000", "0.75", "", ""]
    assert lines["RandAugment"] == ["1,000", "0.25", "failed", ""]


def test_kinds_that_were_not_measured_in_time_have_not_failed() -> None:
    rows = [
        {"kind": "blur", **skipped_row("ours", ours=True)},
        {"kind": "blur", "name": PEER, "ours": False, "error": "x"},
    ]
    cells = markdown._augmentations_table(rows).splitlines()[-1].split("|")[1:-1]
    assert [cell.strip() for cell in cells] == ["blur", "", "", "failed", ""]
