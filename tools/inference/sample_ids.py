"""Match the ids of a contest's sample submission with images.

Ids are matched by name if the file names of the images are known. If this is not possible, ids that count from 0 or 1,
in any order, are matched by number. Other ids are matched in the order of the sample if there are no file names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from configs.utils.errors import UserError
from tools.inference.image_sets import ImageSet
from tools.sources.image_files import is_in_numeric_order, name_numbers

ASCENDING = "each once and ascending"
MAX_DIGITS = 18  # maximum length of a number in an id


@dataclass(frozen=True)
class IdMatch:
    """Match between the ids of a sample submission and the rows of a source."""

    rows: tuple[int, ...]  # source row of each id
    order: str  # how the ids were matched, for the user
    first: int | None = None  # 0 or 1 if the ids count from this number


def match_ids(ids: Sequence[str], images: ImageSet, sample: Path) -> IdMatch:
    """Match the ids with the source rows of the images. There must be as many different ids as source rows.

    Raises UserError if the ids do not match the images, or if the match is ambiguous.
    """
    if images.files is not None:
        if (found := _match_by_name(ids, images.files)) is not None:
            return found
        check_file_order(images.files)
    numbers = _consecutive_numbers(ids, sample)
    if numbers is None:
        return _match_in_sample_order(ids, images, sample)
    first = min(numbers)
    is_ascending = numbers == sorted(numbers)
    are_names = not all(re.fullmatch("[0-9]+", text) for text in ids)
    if images.is_sorted_by_name and (not is_ascending or (are_names and list(ids) != sorted(ids))):
        raise UserError(
            f"the images of split {images.split!r} are in the order of their file names, which may differ from that of "
            f"the numbers in the ids of sample submission {sample} ({_preview(ids)}); give the folder of these images "
            "as --split, to match its file names with the ids, or rename the images with leading zeros and convert "
            "them again"
        )
    order = ASCENDING if is_ascending else "each once, matched to the rows by number"
    return IdMatch(tuple(number - first for number in numbers), order, first)


def check_file_order(files: Sequence[str]) -> None:
    """Raise UserError if the files are numbered but not in the order of their numbers."""
    if not is_in_numeric_order(files):
        names = ", ".join(Path(file).stem for file in files[:3])
        raise UserError(
            f"the pictures are numbered, but sorted by path they are not in the order of their numbers ({names} …); "
            "give a --sample-submission with their names as ids, or rename them with leading zeros"
        )


def _match_in_sample_order(ids: Sequence[str], images: ImageSet, sample: Path) -> IdMatch:
    """Match the ids with the rows in the order of the sample.

    Raises UserError if the images have file names, or if the ids differ only in numbers that do not ascend.
    """
    if images.files is not None:
        raise UserError(
            f"the ids of sample submission {sample} ({_preview(ids)}) are neither numbers nor the names of the "
            f"pictures ({_preview(images.files)}); use the sample of these pictures"
        )
    numbers = name_numbers(ids)
    if numbers is not None and any(before >= after for before, after in pairwise(numbers)):
        raise UserError(
            f"the ids of sample submission {sample} are numbered ({_preview(ids)}), but neither from 0 or 1 without a "
            "gap nor in ascending order, so they cannot be matched with the images; use the unchanged sample of this "
            "split, or sort it in the order of the images"
        )
    return IdMatch(tuple(range(len(ids))), "each once, in the sample's order, assumed to be the rows' order")


def _match_by_name(ids: Sequence[str], files: Sequence[str]) -> IdMatch | None:
    """Match ids with files by path, file name, stem or number. Return None if none of these matches all ids."""
    names = [Path(file).name for file in files]
    stems = [Path(file).stem for file in files]
    for known, asked in ((files, ids), (names, ids), (stems, ids), (stems, [Path(text).stem for text in ids])):
        rows = {name: row for row, name in enumerate(known)}
        if len(rows) == len(files) and set(asked) == rows.keys():
            return IdMatch(tuple(rows[name] for name in asked), "each once, matched to the files by name")
    theirs, ours = name_numbers(ids), name_numbers(stems)
    if theirs is None or ours is None:
        return None
    by_number = {number: row for row, number in enumerate(ours)}
    if len(by_number) != len(files) or set(theirs) != by_number.keys():
        return None
    return IdMatch(tuple(by_number[number] for number in theirs), "each once, matched to the files by number")


def _consecutive_numbers(ids: Sequence[str], sample: Path) -> list[int] | None:
    """Return the number at one place (such as the last number) in each of the N ids, or None if no place qualifies.

    A place qualifies if its numbers in all ids are 0 to N - 1 or 1 to N, in any order. Raises UserError if several
    places qualify but match the ids with the rows differently.
    """
    groups = [re.findall("[0-9]+", text) for text in ids]
    if any(len(group) > MAX_DIGITS for found in groups for group in found):
        return None
    counts: list[list[int]] = []
    fewest = min(map(len, groups), default=0)
    for place in (*range(fewest), *range(-fewest, 0)):  # counted from the front and from the back
        numbers = [int(found[place]) for found in groups]
        if sorted(numbers) in (list(range(len(ids))), list(range(1, len(ids) + 1))):
            counts.append(numbers)
    if len({tuple(number - min(numbers) for number in numbers) for numbers in counts}) > 1:
        raise UserError(
            f"the ids of sample submission {sample} contain several numbers ({_preview(ids)}), and more than one may "
            "be the image's; leave the sample out, and give --id-column and --category-column"
        )
    return counts[-1] if counts else None


def _preview(names: Sequence[str]) -> str:
    return ", ".join(names[:3])[:80] + " …"
