"""Errors about wrong values are one sentence that names the setting, also in lists, mappings and unions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.load import load_config
from configs.utils.errors import UserError

MINIMAL = "data: {path: data/tiny}\nmodel: {name: lenet}\n"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "data.stages=[{image_size: 3}]",
            "data.stages.epoch is missing: First epoch of the stage, counted from 0; "
            "the stage lasts until the next one starts",
        ),
        ("data.stages=[{epoch: -1}]", "data.stages.epoch=-1 must be greater than or equal to 0"),
        ("data.stages=[{epoch: 0, image_size: 3.5}]", "data.stages.image_size=3.5 must be a valid integer or null"),
        (
            "data.stages=[{epoch: 0, size: 3}]",
            "data.stages.size=3 is unknown; allowed in data.stages: epoch, image_size, batch_size",
        ),
        ("data.stages=[3]", "data.stages=3 must be a section; allowed in data.stages: epoch, image_size, batch_size"),
        ("data.stages=3", "data.stages=3 must be a list, such as [first, second]"),
        ("train.optimizer.lr_scales={a: x}", 'train.optimizer.lr_scales.a="x" must be a valid number'),
        ("model.options=3", "model.options=3 must be a valid mapping"),
        ("model.pretrained=3", "model.pretrained=3 must be bool or str"),
        ("aug.auto.magnitude=31", "aug.auto.bins=31 must exceed aug.auto.magnitude=31"),
    ],
)
def test_wrong_value_error_is_one_sentence(override: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError, match=rf"^(--opts|{re.escape(str(file))}): {re.escape(sentence)}$"):
        load_config(file, [override])


def test_union_counts_as_one_error(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(MINIMAL)
    with pytest.raises(UserError, match=r"model\.pretrained=3 must be bool or str \(and 1 more error\)$"):
        load_config(file, ["model.pretrained=3", "train.epochs=0"])
