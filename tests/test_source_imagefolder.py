"""Image folders: order, classes, links, unlabelled test images."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
from source_fixtures import labels_of

from configs.errors import UserError
from tools.sources.imagefolder import open_imagefolder, open_pictures


def write_files(root: Path, *names: str) -> Path:
    """Files whose content is their own name: the source hands bytes on and decodes nothing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def contents(root: Path, split: str) -> list[str]:
    rows = open_imagefolder(root).splits[split]
    read = list(rows.read(0, len(rows)))
    assert [rows.describe(row).encode() for row in range(len(rows))] == read
    return [bytes(content).decode() for content in read]


def test_rows_are_sorted_by_class_then_name_whatever_the_extension(tmp_path: Path) -> None:
    write_files(tmp_path, "train/b/2.PNG", "train/b/10.jpg", "train/a/z.JPEG", "train/a/b.webp", "val/b/1.bmp")
    source = open_imagefolder(tmp_path)
    assert source.classes == ("a", "b")
    assert contents(tmp_path, "train") == ["train/a/b.webp", "train/a/z.JPEG", "train/b/10.jpg", "train/b/2.PNG"]
    assert labels_of(source, "train") == [0, 0, 1, 1]
    assert contents(tmp_path, "val") == ["val/b/1.bmp"]
    assert labels_of(source, "val") == [1]
    assert (source.kind, source.name) == ("imagefolder", tmp_path.name)


@pytest.mark.parametrize("folder", ["val", "valid", "validation"])
def test_val_has_three_names(tmp_path: Path, folder: str) -> None:
    assert contents(write_files(tmp_path, "train/a/1.jpg", f"{folder}/a/2.jpg"), "val") == [f"{folder}/a/2.jpg"]


def test_a_slice_of_rows_survives_the_way_to_a_worker(tmp_path: Path) -> None:
    rows = open_imagefolder(write_files(tmp_path, *(f"train/a/{i}.jpg" for i in range(5)))).splits["train"]
    assert list(pickle.loads(pickle.dumps(rows)).read(1, 3)) == [b"train/a/1.jpg", b"train/a/2.jpg"]
    assert rows.bytes_per_row == len("train/a/1.jpg")


def test_names_in_any_script_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "train/猫/ü é.jpg")
    assert contents(tmp_path, "train") == ["train/猫/ü é.jpg"]


def test_file_names_that_are_not_utf8_are_read_and_described(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/a" / os.fsdecode(b"\xff.jpg")).write_bytes(b"content")
    rows = open_imagefolder(tmp_path).splits["train"]
    assert list(rows.read(1, 2)) == [b"content"]
    assert rows.describe(1) == "train/a/\ufffd.jpg"


def test_an_empty_file_is_handed_on_as_empty_bytes(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/a/2.jpg").touch()
    assert list(open_imagefolder(tmp_path).splits["train"].read(1, 2)) == [b""]


def test_flat_test_images_are_a_split_without_labels(tmp_path: Path) -> None:
    source = open_imagefolder(write_files(tmp_path, "train/a/1.jpg", "test/2.jpg", "test/10.jpg"))
    assert contents(tmp_path, "test") == ["test/10.jpg", "test/2.jpg"]
    assert source.splits["test"].labels is None


def test_test_images_in_class_folders_have_labels(tmp_path: Path) -> None:
    source = open_imagefolder(write_files(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/b/2.jpg"))
    assert labels_of(source, "test") == [1]


def test_a_class_may_have_no_images(tmp_path: Path) -> None:
    write_files(tmp_path, "train/b/1.jpg")
    (tmp_path / "train/a").mkdir()
    source = open_imagefolder(tmp_path)
    assert (source.classes, labels_of(source, "train")) == (("a", "b"), [1])


def test_what_is_no_image_is_passed_over_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ignored = ("train/a/notes.txt", "train/a/._1.jpg", "train/flat.jpg", "train/a/deeper/2.jpg", "README.md")
    write_files(tmp_path, "train/a/1.jpg", "train/.ipynb_checkpoints/1.jpg", *ignored)
    assert len(open_imagefolder(tmp_path).splits["train"]) == 1
    assert "passed over 6 entries" in capsys.readouterr().err


def test_links_out_of_the_source_are_refused_by_name(tmp_path: Path) -> None:
    outside = write_files(tmp_path / "outside", "secret.jpg", "class/1.jpg")
    for link, target in (("train/a/9.jpg", "secret.jpg"), ("train/b", "class"), ("val", "")):
        root = write_files(tmp_path / "root", "train/a/1.jpg")
        (root / link).symlink_to(outside / target)
        with pytest.raises(UserError, match=f"symbolic link .*{link} leads out of the source folder"):
            open_imagefolder(root)
        shutil.rmtree(root)


def test_links_within_the_source_are_followed_and_broken_ones_refused(tmp_path: Path) -> None:
    root = write_files(tmp_path / "root", "train/a/1.jpg")
    (root / "train/a/2.jpg").symlink_to("1.jpg")
    (tmp_path / "alias").symlink_to(root)
    for path in (root, tmp_path / "alias"):
        assert list(open_imagefolder(path).splits["train"].read(0, 2)) == [b"train/a/1.jpg"] * 2
    (root / "train/a/3.jpg").symlink_to("3.jpg")
    with pytest.raises(UserError, match=r"3.jpg leads nowhere"):
        open_imagefolder(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no folder 'train'"),
        (["a/1.jpg", "b/1.jpg"], r"has no folder 'train' \(it has a, b\); the layout is"),
        (["train/a/1.txt"], "train holds no images"),
        (["train/a/images/1.jpg"], "holds no images .*passed over: train/a/images/"),
        (["train/a/1.jpg", "val/a/1.txt"], "val holds no images"),
        (["train/a/1.jpg", "val/b/1.jpg", "val/c/1.jpg"], "2 class folders that train lacks, such as 'b'"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "which all mean split 'val'"),
        (["train/a/1.jpg", "test/1.jpg", "test/a/1.jpg"], "image files beside the folders a"),
    ],
)
def test_another_layout_is_refused_with_what_was_found(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_imagefolder(write_files(tmp_path, *files))


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; the layout is"):
        open_imagefolder(tmp_path / "missing")
    write_files(tmp_path, "file")
    with pytest.raises(UserError, match="is a file, not a folder"):
        open_imagefolder(tmp_path / "file")


def test_a_file_that_vanishes_while_reading_is_named(tmp_path: Path) -> None:
    rows = open_imagefolder(write_files(tmp_path, "train/a/1.jpg")).splits["train"]
    (tmp_path / "train/a/1.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*1.jpg \(No such file"):
        list(rows.read(0, 1))


def test_the_fingerprint_depends_on_names_and_sizes_but_not_on_the_place(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", "train/a/1.jpg", "val/a/1.jpg")
    moved = write_files(tmp_path / "moved", "train/a/1.jpg", "val/a/1.jpg")
    fingerprint = open_imagefolder(one).fingerprint
    assert open_imagefolder(moved).fingerprint == fingerprint
    (moved / "val/a/1.jpg").write_text("longer than before")
    assert open_imagefolder(moved).fingerprint != fingerprint
    write_files(one, "train/b/1.jpg")
    assert open_imagefolder(one).fingerprint != fingerprint


def test_pictures_are_all_image_files_at_any_depth_sorted_by_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, "b.jpg", "a/2.PNG", "a/10.jpg", "a/deep/er/1.webp", "a/notes.txt", ".hidden/3.jpg")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # a circle
    source = open_pictures(tmp_path, "pictures", ("x", "y"))
    rows = source.splits["pictures"]
    names = ["a/10.jpg", "a/2.PNG", "a/deep/er/1.webp", "b.jpg"]
    assert [rows.describe(row) for row in range(len(rows))] == names
    assert list(rows.read(0, 4)) == [name.encode() for name in names]
    assert (rows.labels, source.classes) == (None, ("x", "y"))
    assert "passed over 3 entries" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no images"):
        open_pictures(tmp_path / "empty", "pictures", ("x",))


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (["1.jpg", "2.jpg", "10.jpg"], True),
        (["01.jpg", "02.jpg", "10.jpg"], False),
        (["a1.jpg", "a2.jpg", "a10.jpg"], False),
    ],
)
def test_numbered_test_images_out_of_their_numbers_order_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], noted: bool
) -> None:
    write_files(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/a/10.jpg", *(f"test/{name}" for name in names))
    open_imagefolder(tmp_path)
    assert ("leading zeros" in (said := capsys.readouterr().err)) == noted, said
