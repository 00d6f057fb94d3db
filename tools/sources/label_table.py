"""Read tables that give the classes of image files in one folder.

Each line is FILE and CLASS, separated by a tab, a comma or a space, with or without a header and further columns. Known
tables are Tiny ImageNet's val_annotations.txt, ImageNet's LOC_val_solution.csv and Kaggle's trainLabels.csv. A file
may be named with or without its extension and folders. A table of a single column gives the classes of all files in
the order of their names, like ImageNet's list of validation synsets.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from configs.utils.errors import UserError, readable
from tools.sources.folder_scan import Scan, read_regular_file
from tools.sources.image_files import Files, name_numbers

FORM = "a line is FILE and CLASS, separated by a tab or a comma"
BOXES = "PredictionString"  # ImageNet's column of a class and a box for each object


@dataclass(frozen=True)
class TableRow:
    """A line of a table. `file` is as written in the table, and '' in a table of a single column."""

    line: int
    file: str
    class_name: str


def read_labels(path: Path, files: Files, classes: Collection[str], scan: Scan) -> dict[str, str]:
    """Return the class of each image file that a table names, by the path of the file.

    Files that the table does not name, and names of files that do not exist, are counted as skipped.

    Args:
        path: The table.
        files: The image files that the table may name.
        classes: The known classes, or an empty collection to allow all.
        scan: Counts the skipped entries.

    Raises:
        UserError: The table cannot be read, names no file, or is invalid.
    """
    paths = _by_name([name for name, _ in files])
    rows = _read_rows(path, paths)
    if rows and not rows[0].file:
        class_of = _by_position(path, rows, [name for name, _ in files])
    else:
        class_of = _by_file(path, rows, paths, scan)
    lines = {row.class_name: row.line for row in reversed(rows)}
    if unknown := [name for name in lines if not name or (classes and name not in classes)]:
        line = min(lines[name] for name in unknown)
        name = next(name for name in unknown if lines[name] == line)
        raise UserError(f"{path}, line {line}: {name!r} is not a class folder of train; {FORM}")
    if not class_of:
        named = ", ".join(row.file for row in rows[:2]) or "nothing"
        raise UserError(f"{path} names none of the images, such as {files[0][0]} (it names {named}); {FORM}")
    for name, _ in files:
        if name not in class_of:
            scan.skip(name, f"not named in {path.name}")
    return class_of


def _by_name(paths: list[str]) -> dict[str, list[str]]:
    """Return the paths for each file name, with and without its extension."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name = path.rpartition("/")[2]
        found[name].append(path)
        found[os.path.splitext(name)[0]].append(path)
    return found


def _read_rows(path: Path, paths: dict[str, list[str]]) -> list[TableRow]:
    """Return the rows of a table without its header. `paths` are from `_by_name`."""
    with readable(path):
        lines = read_regular_file(path).decode("utf-8-sig", "replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    if "\t" in first:
        cells = [line.split("\t") for line in lines]
    elif "," in first:
        try:
            cells = [next(csv.reader([line]), []) for line in lines]
        except csv.Error as error:
            raise UserError(f"{path} is not a table of comma-separated values ({error}); {FORM}") from None
    elif first.partition(" ")[0].rpartition("/")[2] in paths:
        cells = [line.split(" ", 1) for line in lines]
    else:
        cells = [["", line] for line in lines]
    rows = [
        TableRow(number, row[0].strip(), row[1].strip() if len(row) > 1 else "")
        for number, row in enumerate(cells, 1)
        if any(cell.strip() for cell in row)
    ]
    if not rows or not rows[0].file:
        return rows
    header, rest = rows[0], rows[1:]
    if header.class_name == BOXES:
        return [TableRow(row.line, row.file, row.class_name.partition(" ")[0]) for row in rest]
    is_header = header.file.rpartition("/")[2] not in paths and header.class_name not in {r.class_name for r in rest}
    return rest if is_header and rest else rows


def _by_position(path: Path, rows: list[TableRow], names: list[str]) -> dict[str, str]:
    """Return the class of each file if the table is a list of classes in the order of the files."""
    if len(rows) != len(names):
        raise UserError(
            f"{path} is a list of {len(rows):,} classes, but there are {len(names):,} images; give one class for each "
            f"image, in the order of their names, or a table: {FORM}"
        )
    numbers = name_numbers([Path(name).stem for name in names])  # 10.jpg comes after 9.jpg
    ordered = sorted(names) if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]
    return {name: row.class_name for name, row in zip(ordered, rows, strict=True)}


def _by_file(path: Path, rows: list[TableRow], paths: dict[str, list[str]], scan: Scan) -> dict[str, str]:
    """Return the class of each file that the table names, and count names without a file as skipped."""
    class_of: dict[str, str] = {}
    for row in rows:
        ending = f"/{row.file.removeprefix('./')}"
        same_name = paths.get(ending.rpartition("/")[2], ())
        named = [one for one in same_name if f"/{one}".endswith(ending) or _without_suffix(f"/{one}").endswith(ending)]
        if len(named) > 1:
            raise UserError(f"{path}, line {row.line}: {row.file!r} may be {' or '.join(named[:2])}; name its folder")
        if not named:
            scan.skip(row.file, f"named in {path.name}, but missing")
        elif class_of.setdefault(named[0], row.class_name) != row.class_name:
            raise UserError(
                f"{path}, line {row.line}: {row.file!r} has a second class, {row.class_name!r}; keep one of them"
            )
    return class_of


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0]
