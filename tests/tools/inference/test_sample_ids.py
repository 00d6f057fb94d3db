"""Tests of matching the ids of a sample submission with images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.utils.errors import UserError
from pipelines.storage.dataset import load_dataset
from tools import convert
from tools.inference import submission
from tools.inference.image_sets import ImageSet
from tools.inference.sample_ids import match_ids

SAMPLE = Path("sample.csv")


def image_set(count: int, files: list[str] | None = None, is_sorted_by_name: bool = False) -> ImageSet:
    names = None if files is None else tuple(files)
    return ImageSet("test", (Path("data"),), None, np.arange(count), count, True, [], names, is_sorted_by_name)


IN_TEXT_ORDER = sorted(range(1, 101), key=str)  # 1, 10, 100, 11 …


@pytest.mark.parametrize(
    ("ids", "rows", "first"),
    [
        ([f"{number}.png" for number in IN_TEXT_ORDER], [number - 1 for number in IN_TEXT_ORDER], 1),
        (["3", "1", "2"], [2, 0, 1], 1),
        (["2", "0", "1"], [2, 0, 1], 0),
        (["0", "1", "2"], [0, 1, 2], 0),
        (["test_0002.jpg", "test_0001.jpg"], [1, 0], 1),
        (["v2/img-3-of-3", "v2/img-1-of-3", "v2/img-2-of-3"], [2, 0, 1], 1),
        (["dog_2", "cat_1", "cat_0"], [2, 1, 0], 0),
        (["2.jp2", "1.png"], [1, 0], 1),
        (["7.png"], [0], None),
        (["1.png"], [0], 1),
        (["005", "007", "010"], [0, 1, 2], None),
        (["b", "a", "c"], [0, 1, 2], None),
        (["a9f", "0b3", "77c"], [0, 1, 2], None),
        (["1" * 5000, "9" * 5000], [0, 1], None),
    ],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_ids_are_matched_by_number_or_in_order(ids: list[str], rows: list[int], first: int | None) -> None:
    found = match_ids(ids, image_set(len(ids)), SAMPLE)
    assert (list(found.rows), found.first) == (rows, first)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["1.png", "10.png", "5.png"], "neither from 0 or 1 without a gap nor in ascending order"),
        (["img_502", "img_501"], "neither from 0 or 1 without a gap nor in ascending order"),
        (["1", "01", "2"], "neither from 0 or 1 without a gap nor in ascending order"),
        (["1_3", "2_1", "3_2"], "contain several numbers"),
    ],
)
def test_ambiguous_numbers_are_refused(ids: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        match_ids(ids, image_set(len(ids)), SAMPLE)


def test_rows_sorted_by_unknown_names_are_not_matched_by_number() -> None:
    """The folder was converted in the order 1.png, 10.png, 2.png, and its file names were not recorded."""
    numbers = range(1, 12)
    images = image_set(11, is_sorted_by_name=True)
    for ids in (sorted(f"{number}.png" for number in numbers), [f"{number}.png" for number in numbers]):
        with pytest.raises(UserError, match="give the folder of these images as --split"):
            match_ids(ids, images, SAMPLE)
    for ids in ([f"{number:02d}.png" for number in numbers], [str(number) for number in numbers]):
        assert match_ids(ids, images, SAMPLE).rows == tuple(range(11))


def test_unordered_rows_get_no_submission(tmp_path: Path) -> None:
    """Applies with a sample submission and with counted ids."""
    sample = tmp_path / "sample.csv"
    sample.write_text("Id,Category\n" + "".join(f"{number},0\n" for number in range(1, 12)), encoding="utf-8")
    for path in (sample, None):
        with pytest.raises(UserError, match="numbered files, stored in the order of their names"):
            submission.build_form(replace(image_set(11), is_unordered=True), 5, sample=path)
        assert submission.build_form(image_set(11), 5, sample=path).rows == tuple(range(11))


def test_converted_folder_records_unordered_splits(tmp_path: Path) -> None:
    for names in ("1 2 10", "01 02 10", "cat dog"):
        for where in ("train/a", "test"):
            (tmp_path / names / where).mkdir(parents=True)
            for name in names.split():
                Image.new("RGB", (8, 8)).save(tmp_path / names / where / f"{name}.png")
        out = tmp_path / f"{names} converted"
        convert.main(["imagefolder", "--source", str(tmp_path / names), "--out", str(out), "--name", "x"])
        dataset = load_dataset(out)
        assert dataset.unordered == (("test",) if names == "1 2 10" else ())


def test_pictures_are_matched_by_path_name_stem_or_number() -> None:
    files = [f"deep/img_{number}.png" for number in ("1", "10", "2")]
    for asked in (
        ["deep/img_2.png", "deep/img_1.png", "deep/img_10.png"],
        ["img_2.png", "img_1.png", "img_10.png"],
        ["img_2", "img_1", "img_10"],
        ["img_2.jpg", "img_1.jpg", "img_10.jpg"],
        ["2", "1", "10"],
        ["0002", "0001", "0010"],
    ):
        assert match_ids(asked, image_set(3, files), SAMPLE).rows == (2, 0, 1)
    with pytest.raises(UserError, match=r"numbered, but sorted by path they are not in the order of their numbers"):
        match_ids(["1", "2", "3"], image_set(3, files), SAMPLE)
    with pytest.raises(UserError, match=r"neither numbers nor the names of the pictures \(a.png, b.png …\)"):
        match_ids(["x", "y"], image_set(2, ["a.png", "b.png"]), SAMPLE)
