"""Unusual files are kept, re-encoded or quarantined with a reason, and every decoder reads the stored ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema import AugConfig
from helpers.backends import use_dali
from helpers.loaders import copies, train
from helpers.odd_files import HEIGHT, WIDTH, defective_files, kept_files, pixels, reencoded_files
from pipelines.storage.open import open_split
from tools import convert

KEPT, REENCODED, DEFECTIVE = kept_files(), reencoded_files(), defective_files()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the converted folder; its val split has the files that are kept."""
    folder = tmp_path_factory.mktemp("odd")
    for split, files in (("train", {**KEPT, **REENCODED, **DEFECTIVE}), ("val", KEPT)):
        (folder / "source" / split / "all").mkdir(parents=True)
        for name, content in files.items():
            (folder / "source" / split / "all" / name).write_bytes(content)
    convert.main(
        ["imagefolder", "--source", str(folder / "source"), "--out", str(folder / "out"), "--encoding", "jpeg"]
    )
    return folder / "out"


def test_every_file_is_kept_reencoded_or_quarantined_with_a_reason(odd: Path) -> None:
    assert len(KEPT) + len(REENCODED) + len(DEFECTIVE) >= 60
    dataset = json.loads((odd / "dataset.json").read_text())
    entry = dataset["splits"]["train"]
    assert {Path(defect["name"]).name for defect in entry["quarantined"]} == set(DEFECTIVE)
    assert all(defect["reason"] for defect in entry["quarantined"])
    assert entry["samples"] == len(KEPT) + len(REENCODED)
    assert sum(dataset["reencoded"]["train"].values()) == len(REENCODED)
    split = open_split(odd, "val")
    assert {split.image_bytes(sample).tobytes() for sample in range(len(split))} == set(KEPT.values())
    convert.main(["verify", str(odd)])


@pytest.mark.parametrize("choice", ["stop", "skip"])
@pytest.mark.parametrize("by_dali", [False, True], ids=["kernels", "DALI"])
def test_every_stored_file_is_read(by_dali: bool, choice: Any, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_dali:
        use_dali(monkeypatch)
    aug = AugConfig(crop="random-resized", scale=(1.0, 1.0), ratio=(WIDTH / HEIGHT, WIDTH / HEIGHT), flip=0)
    loader = train(odd, 8, aug, image_size=WIDTH, on_bad_sample=choice)
    batches = copies(loader)
    assert loader.bad.found == []
    assert len(batches) == (len(KEPT) + len(REENCODED)) // 8
    images = np.concatenate([batch.images.numpy() for batch in batches])
    means = images.reshape(len(images), -1).mean(axis=1)
    assert means.min() > 0.3 * pixels().mean()  # no image is black
