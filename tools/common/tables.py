"""Format rows as aligned Markdown tables or CSV, and write files atomically."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from configs.utils.errors import UserError
from configs.utils.files import atomic_write

Row = dict[str, Any]  # cells by column, as written to a file or table
Table = Sequence[Mapping[str, object]]


def column_names(rows: Table) -> list[str]:
    """Return the keys of all rows in the order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Table) -> str:
    """Return a Markdown table of all columns. Numeric columns are right-aligned, and None gives an empty cell.

    Floats are rounded to four significant digits, or to integers if they have five or more digits before the point.
    """
    columns = column_names(rows)
    numbers = [
        number
        for number, column in enumerate(columns)
        if all(isinstance(value := row.get(column), int | float | None) and not isinstance(value, bool) for row in rows)
    ]
    return aligned_table(columns, [[_cell(row.get(column)) for column in columns] for row in rows], right=numbers)


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Container[int]) -> str:
    """Return a Markdown table of text cells, padded to the width of their column.

    `right` contains the indices of the right-aligned columns. "|" in cells is replaced with "/".
    """
    lines = [[cell.replace("|", "/") for cell in line] for line in (header, *rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(header))]

    def line_of(line: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + ":" if number in right else "-" * (width + 2) for number, width in enumerate(widths)
    )
    return "\n".join([line_of(lines[0]), f"|{rule}|", *map(line_of, lines[1:])])


def runs_table(rows: Table, width: int, *, always: Container[str] = ()) -> str:
    """Return the rows of runs as tables of at most `width` characters per line, for a console.

    Columns with equal cells in all rows are listed in a sentence instead. If a row per run is too wide, there is a
    column per run, in as many tables as necessary. Cells that are still too long are cut.

    Args:
        rows: A row per run. The first column names the runs.
        width: Characters per line, at least 30.
        always: Columns that are shown even if their cells are equal.
    """
    name, *others = column_names(rows)
    cells = {column: [_cell(row.get(column)) for row in rows] for column in others}
    equal = [one for one in others if one not in always and len(rows) > 1 and len(set(cells[one])) == 1]
    differing = [column for column in others if column not in equal]
    known = [f"{column} {cells[column][0]}" for column in equal if cells[column][0]]
    sentence = f"the same in all runs: {', '.join(known)}"
    text = markdown([{column: row.get(column) for column in (name, *differing)} for row in rows])
    if max(map(len, text.splitlines())) > width:
        lines = [[column, *cells[column]] for column in differing]
        text = "\n\n".join(_tables_of_columns([name, *(_cell(row[name]) for row in rows)], lines, width))
    return "\n".join([text, *([textwrap.fill(sentence, width)] if known else [])])


def _tables_of_columns(header: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield tables that all start with the first column and contain as many of the others as `width` allows."""
    every = [header, *lines]
    first_width = max(len(line[0]) for line in every)
    limit = max(8, width - first_width - 7)  # of a cell: a table has three characters per column, and one more
    every = [
        [line[0], *(cell if len(cell) <= limit else f"{cell[: limit - 1]}…" for cell in line[1:])] for line in every
    ]
    widths = [max(len(line[number]) for line in every) for number in range(len(header))]
    chosen: list[int] = []
    for number in range(1, len(header) + 1):
        used = 4 + first_width + sum(widths[one] + 3 for one in chosen)
        if number == len(header) or (chosen and used + widths[number] + 3 > width):
            part = [[line[0], *(line[one] for one in chosen)] for line in every]
            yield aligned_table(part[0], part[1:], right=())
            chosen = []
        chosen.append(number)


def write_csv(path: Path, rows: Table) -> None:
    """Write all columns of all rows to a CSV file atomically. None and missing values become empty cells.

    Raises UserError if the file cannot be written.
    """
    columns = column_names(rows)
    write_text(path, csv_text([columns, *([row.get(column) for column in columns] for row in rows)]))


def csv_text(lines: Iterable[Iterable[object]]) -> str:
    """Return lines of cells as the text of a CSV file. None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def write_json(path: Path, content: object, *, indent: int = 2, ensure_ascii: bool = True) -> None:
    """Write a JSON file atomically. Raises UserError if the file cannot be written."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises UserError if the file cannot be written."""
    write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))  # file names can be any bytes


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write the output of `write` to a file atomically. Raises UserError if the file cannot be written."""
    try:
        atomic_write(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None


def make_folder(path: Path) -> Path:
    """Create an output folder if needed, and return it. Raises UserError if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error.strerror}; give another --out") from None
    return path


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split())
