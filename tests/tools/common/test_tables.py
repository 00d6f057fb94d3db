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


RUNS = [
    {"run": f"run-{number}", "status": "finished", "model": "lenet", "seed": None, "lr": 10.0**-number,
     "aug.auto": "a long policy name " * 3 * (number % 2), "best_val_top1": 0.9 + number / 100, "memory_gib": 0.91}
    for number in range(7)
]  # fmt: skip


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_runs_table_fits_and_contains_each_run_once(width: int) -> None:
    text = tables.runs_table(RUNS, width)
    table, _, sentence = text.partition("the same in all runs: ")
    assert max(map(len, text.splitlines())) <= width
    assert " ".join(sentence.split()) == "status finished, model lenet, memory_gib 0.91"
    assert [table.count(f" run-{number} ") for number in range(7)] == [1] * 7
    assert "seed" not in text
    assert table.count(" 0.96 ") == 1
    assert ("a long policy name " * 3 in table) == (width >= 80)
    assert ("…" in table) == (width < 80)
    is_row_per_run = len(table.strip().splitlines()) == 2 + len(RUNS)
    assert is_row_per_run == (width == 200)


def test_runs_table_of_one_run_lists_all_of_it() -> None:
    text = tables.runs_table(RUNS[:1], 40)
    assert len(text.splitlines()) == 2 + 7
    assert "the same" not in text


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
