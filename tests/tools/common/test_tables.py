"""Tests of tools.common.tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from configs.utils.errors import UserError
from tools.common import tables

ROWS = [{"run": "a", "lr": 1e-3, "best": 0.5}, {"run": "b|c", "epochs": 12_345, "best": None, "ok": True}]


def test_markdown_aligns_all_columns_and_rows() -> None:
    lines = tables.markdown(ROWS).splitlines()
    assert lines[0].replace(" ", "") == "|run|lr|best|epochs|ok|"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["a", "0.001", "0.5", "", ""]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["b/c", "", "", "12,345", "yes"]
    assert len({len(line) for line in lines}) == 1


def test_csv_reads_back_unchanged(tmp_path: Path) -> None:
    tables.write_csv(tmp_path / "t.csv", ROWS)
    with (tmp_path / "t.csv").open() as file:
        read = list(csv.DictReader(file))
    assert read[0] == {"run": "a", "lr": "0.001", "best": "0.5", "epochs": "", "ok": ""}
    assert read[1]["run"] == "b|c"
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_unwritable_path_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --out"):
        tables.make_folder(tmp_path / "file" / "folder")
    with pytest.raises(UserError, match="give another --out"):
        tables.write_csv(tmp_path / "missing" / "t.csv", ROWS)
