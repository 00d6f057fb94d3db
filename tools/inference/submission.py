"""Write the submission file of a contest, with an id and a class number for every source row of a split.

Call `build_form` before predicting, since it raises UserError if ids could be assigned to the wrong images. Then call
`write_submission`.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.utils.errors import UserError
from tools.common.tables import csv_text, write_text
from tools.inference.image_sets import ImageSet
from tools.inference.sample_ids import ASCENDING, check_file_order, match_ids

ID_COLUMN, CATEGORY_COLUMN = "Id", "Category"
MAX_SHOWN = 5


@dataclass(frozen=True)
class SubmissionForm:
    """Columns, ids and row order of a submission whose classes are not predicted yet."""

    id_column: str
    category_column: str
    ids: tuple[str, ...]  # in the order of the file
    rows: tuple[int, ...]  # source row of each id
    order: str  # how the ids were matched, for the user
    fill: int  # class of rows without a prediction


def build_form(
    images: ImageSet,
    classes: int,
    *,
    sample: Path | None = None,
    id_start: int | None = None,
    id_column: str | None = None,
    category_column: str | None = None,
    fill: int | None = None,
) -> SubmissionForm:
    """Determine the columns, ids and row order of a submission for these images.

    Args:
        images: The images to predict.
        classes: Number of classes.
        sample: The contest's sample submission, which determines columns and ids. If None, ids count from `id_start`.
        id_start: The first id. If None, that of the sample, or 1 without a sample.
        id_column: Name of the id column. If None, that of the sample, or ID_COLUMN without a sample.
        category_column: Name of the class column. If None, that of the sample, or CATEGORY_COLUMN without a sample.
        fill: Class number for images that cannot be read. If None, such images are an error.

    Raises:
        UserError: The order of the images is uncertain, `fill` is not a class number, images cannot be read and `fill`
            is None, or the sample cannot be read or does not match the images or the other arguments.
    """
    _check_images(images, classes, fill)
    if sample is None:
        check_file_order(images.files or ())
        start, rows = 1 if id_start is None else id_start, tuple(range(images.source_rows))
        counted = tuple(str(start + row) for row in rows)
        return SubmissionForm(
            id_column or ID_COLUMN, category_column or CATEGORY_COLUMN, counted, rows, ASCENDING, fill or 0
        )
    columns, ids = read_sample_submission(sample)
    if len(ids) != images.source_rows:
        raise UserError(
            f"sample submission {sample} has {len(ids):,} rows below its header {','.join(columns)} for "
            f"{images.source_rows:,} images; use the sample of this split"
        )
    given_columns = {"--id-column": id_column, "--category-column": category_column}
    for (option, given), found in zip(given_columns.items(), columns, strict=True):
        if given not in (None, found):
            raise UserError(f"{option}={given}, but sample submission {sample} has {found!r} there; omit one of them")
    matched = match_ids(ids, images, sample)
    if id_start is not None and id_start != matched.first:
        found = f"do not count from 0 or 1 ({', '.join(ids[:3])} …)"
        if matched.first is not None:
            found = f"start at {matched.first}"
        raise UserError(f"--id-start={id_start}, but the ids of sample submission {sample} {found}; omit one of them")
    return SubmissionForm(columns[0], columns[1], tuple(ids), matched.rows, matched.order, fill or 0)


def write_submission(path: Path, form: SubmissionForm, images: ImageSet, predicted: np.ndarray, classes: int) -> str:
    """Write a submission file, and return a sentence that says what was checked.

    Args:
        path: The file to write.
        form: Columns, ids and row order.
        images: The predicted images.
        predicted: Class number of each image, int64 [N].
        classes: Number of classes.

    Raises:
        RuntimeError: The ids, rows or class numbers are invalid, which indicates a bug.
        UserError: The file cannot be written.
    """
    categories = np.full(images.source_rows, form.fill, np.int64)
    categories[images.rows] = predicted
    if len(set(form.ids)) != len(categories) or sorted(form.rows) != list(range(len(categories))):
        raise RuntimeError(f"{len(form.ids)} ids, {len(set(form.ids))} different ones, for {len(categories)} images")
    low, high = int(categories.min()), int(categories.max())
    if not 0 <= low <= high < classes:
        raise RuntimeError(f"predicted classes {low} to {high} of {classes}")
    lines = zip(form.ids, categories[list(form.rows)].tolist(), strict=True)
    write_text(path, csv_text([(form.id_column, form.category_column), *lines]))
    filled = f", {len(images.unreadable)} of them filled with {form.fill}" if images.unreadable else ""
    return (
        f"{path}: checked {len(form.ids):,} rows, one per image; {form.id_column} {form.ids[0]} to {form.ids[-1]}, "
        f"{form.order}; {form.category_column} {low} to {high}, within 0 to {classes - 1}, "
        f"{len(np.unique(categories)):,} of {classes:,} classes{filled}"
    )


def read_sample_submission(path: Path) -> tuple[tuple[str, str], list[str]]:
    """Return the names of the two columns and the ids of a contest's sample submission.

    Raises UserError if the sample cannot be read, or is not a CSV file of two columns with unique ids.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"sample submission {path} cannot be read ({reason}); give a CSV file") from None
    bad = next((number for number, line in enumerate(lines) if len(line) != 2), None)
    if not lines or bad is not None:
        found = f"its row {bad + 1} is {','.join(lines[bad])[:80]!r}" if bad is not None else "it is empty"
        raise UserError(f"sample submission {path} must have two columns ({ID_COLUMN},{CATEGORY_COLUMN}), but {found}")
    ids = [line[0] for line in lines[1:]]
    twice = next((text for text, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"sample submission {path} has the id {twice!r} twice; use an unchanged copy")
    return (lines[0][0], lines[0][1]), ids


def _check_images(images: ImageSet, classes: int, fill: int | None) -> None:
    """Raise UserError if the order of the images is uncertain, or if an image has neither a prediction nor `fill`.

    With the unreadable images, they must cover each source row once.
    """
    if not images.in_source_order:
        raise UserError(
            f"split {images.split!r} is stored shuffled, so its images have no order for a submission; use another "
            "split, such as test"
        )
    unreadable = np.array([sample.row for sample in images.unreadable], np.int64)
    rows = np.sort(np.concatenate([images.rows, unreadable]))
    if not np.array_equal(rows, np.arange(images.source_rows)) or (np.diff(images.rows) <= 0).any():
        raise UserError(
            f"split {images.split!r} in {images.folders[0]} does not contain each row of its source once and in order; "
            "convert the source again"
        )
    if images.is_unordered:
        raise UserError(
            f"the images of split {images.split!r} are numbered files, stored in the order of their names instead of "
            "their numbers, so the rows of a submission would be uncertain; give the folder of these images as "
            "--split, to match its file names with the ids of a --sample-submission, or rename the images with "
            "leading zeros and convert them again"
        )
    if fill is not None and not 0 <= fill < classes:
        raise UserError(f"--fill={fill} is not a class number; use 0..{classes - 1}")
    if images.unreadable and fill is None:
        named = [f"row {sample.row} ({sample.name}: {sample.reason})" for sample in images.unreadable[:MAX_SHOWN]]
        more = f" and {len(images.unreadable) - MAX_SHOWN} more" if len(images.unreadable) > MAX_SHOWN else ""
        raise UserError(
            f"{len(images.unreadable)} of {images.source_rows} images cannot be read and have no prediction: "
            f"{'; '.join(named)}{more}; give them a class with --fill CLASS (a number), or skip the submission with "
            "--submission none"
        )
