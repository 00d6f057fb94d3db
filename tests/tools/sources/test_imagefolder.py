"""Image folders: order, classes, subfolders, links, skipped entries, Tiny ImageNet's layout, unlabelled images."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.utils.errors import UserError
from helpers.sources import labels_of
from pipelines.convert.encode import FORMATS
from tools.sources.folder_scan import EXTENSIONS
from tools.sources.image_files import open_image_files
from tools.sources.imagefolder import FolderOptions, open_imagefolder

TORCHVISION = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # its IMG_EXTENSIONS


def write_files(root: Path, *names: str) -> Path:
    """Write files whose content is their name; the source passes bytes on without decoding."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def contents(root: Path, split: str) -> list[str]:
    rows = open_imagefolder(root).splits[split]
    read = list(rows.read(0, len(rows)))
    assert [rows.describe(row).encode() for row in range(len(rows))] == read
    return [bytes(content).decode() for content in read]


def test_rows_are_sorted_by_class_then_name(tmp_path: Path) -> None:
    write_files(tmp_path, "train/b/2.PNG", "train/b/10.jpg", "train/a/z.JPEG", "train/a/b.webp", "val/b/1.bmp")
    source = open_imagefolder(tmp_path)
    assert source.classes == ("a", "b")
    assert contents(tmp_path, "train") == ["train/a/b.webp", "train/a/z.JPEG", "train/b/10.jpg", "train/b/2.PNG"]
    assert labels_of(source, "train") == [0, 0, 1, 1]
    assert contents(tmp_path, "val") == ["val/b/1.bmp"]
    assert labels_of(source, "val") == [1]
    assert (source.kind, source.name) == ("imagefolder", tmp_path.name)


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        (name, split)
        for split, names in {
            "train": ["train", "Training"],
            "test": ["TEST", "testing"],
            "val": ["val", "Valid", "VALIDATION", "dev"],
        }.items()
        for name in names
    ],
)
def test_usual_split_names_are_accepted_in_any_case(tmp_path: Path, folder: str, split: str) -> None:
    write_files(tmp_path, f"{folder}/a/2.jpg", *(["train/a/1.jpg"] if split != "train" else []))
    assert contents(tmp_path, split) == [f"{folder}/a/2.jpg"]


def test_extensions_of_torchvision_and_the_decoder_are_read(tmp_path: Path) -> None:
    Image.init()
    decoded = {suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")}
    assert set(EXTENSIONS) == decoded - {".pfm"}
    assert set(EXTENSIONS) >= TORCHVISION
    names = [f"1{suffix.upper()}" for suffix in EXTENSIONS]
    write_files(tmp_path, *(f"train/a/{name}" for name in names))
    pictures = open_image_files([tmp_path], "pictures", ("a",)).splits["pictures"]
    assert len(open_imagefolder(tmp_path).splits["train"]) == len(pictures) == len(names)


def test_images_in_subfolders_belong_to_the_class_sorted_by_path(tmp_path: Path) -> None:
    write_files(tmp_path, "train/b/images/1.jpg", "train/a/z.jpg", "train/a/m/n/2.jpg", "train/a/a.jpg")
    (tmp_path / "train/a/m/back").symlink_to(tmp_path / "train/a", target_is_directory=True)  # a circle
    expected = ["train/a/a.jpg", "train/a/m/n/2.jpg", "train/a/z.jpg", "train/b/images/1.jpg"]
    assert contents(tmp_path, "train") == expected
    assert labels_of(open_imagefolder(tmp_path), "train") == [0, 0, 0, 1]


def test_slice_of_rows_survives_pickling(tmp_path: Path) -> None:
    rows = open_imagefolder(write_files(tmp_path, *(f"train/a/{i}.jpg" for i in range(5)))).splits["train"]
    assert list(pickle.loads(pickle.dumps(rows)).read(1, 3)) == [b"train/a/1.jpg", b"train/a/2.jpg"]
    assert rows.bytes_per_row == len("train/a/1.jpg")


def test_names_in_any_script_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "train/猫/ü é.jpg")
    assert contents(tmp_path, "train") == ["train/猫/ü é.jpg"]


def test_file_names_outside_utf8_are_read_and_described(tmp_path: Path) -> None:
    write_files(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/a" / os.fsdecode(b"\xff.jpg")).write_bytes(b"content")
    rows = open_imagefolder(tmp_path).splits["train"]
    assert list(rows.read(1, 2)) == [b"content"]
    assert rows.describe(1) == "train/a/\ufffd.jpg"


def test_empty_file_is_yielded_as_empty_bytes(tmp_path: Path) -> None:
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


def test_classes_without_images_are_noted_in_every_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, "train/b/1.jpg", "val/a/1.jpg", "test/a/1.jpg", "test/b/1.jpg")
    (tmp_path / "train/a").mkdir()
    source = open_imagefolder(tmp_path)
    assert (source.classes, labels_of(source, "train")) == (("a", "b"), [1])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "note: train has no images of 1 of 2 classes: a",
        "note: val has no images of 1 of 2 classes: b",
    ]


def test_skipped_entries_are_counted_by_extension_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(
        tmp_path,
        "train/a/1.jpg",
        "train/a/x.txt",
        "train/a/deeper/y.TXT",
        "train/flat.jpg",
        "README.md",
        "train/a/.hidden.jpg",
        "train/.ipynb_checkpoints/1.jpg",
        "loose.jpg",
        "train/a/LICENSE",
    )
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    (tmp_path / "train/a/gone.jpg").symlink_to("nothing.jpg")
    assert contents(tmp_path, "train") == ["train/a/1.jpg"]
    assert capsys.readouterr().err == (
        "note: skipped 10 entries: 2 .jpg, outside of the class folders (loose.jpg …); 2 .txt, not an image "
        "(train/a/x.txt …); 1 .jpg, hidden (train/a/.hidden.jpg); 1 .jpg, link that leads nowhere "
        "(train/a/gone.jpg); 1 .jpg, not a regular file (train/a/pipe.jpg); 1 .md, not an image (README.md); 1 folder, "
        "hidden (train/.ipynb_checkpoints); 1 without extension, not an image (train/a/LICENSE)\n"
    )


def test_litter_of_archives_and_file_managers_is_ignored_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(
        tmp_path,
        "train/a/1.jpg",
        "__MACOSX/train/a/._1.jpg",
        "train/a/._1.jpg",
        "train/.DS_Store",
        "train/a/Thumbs.db",
        "train/a/__MACOSX/2.jpg",
        "Desktop.ini",
    )
    for rows in (open_imagefolder(tmp_path).splits["train"], open_image_files([tmp_path], "p", ("a",)).splits["p"]):
        assert [rows.describe(row) for row in range(len(rows))] == ["train/a/1.jpg"]
    assert capsys.readouterr().err == ""


def test_folders_that_are_not_splits_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_imagefolder(write_files(tmp_path, "train/a/1.jpg", "extra/a/1.jpg", "vall/a/1.jpg", "__MACOSX/a/1.jpg"))
    assert "has folders that mean no split and are not read: extra, vall; splits are" in capsys.readouterr().err


def test_links_out_of_the_source_are_refused_by_name(tmp_path: Path) -> None:
    outside = write_files(tmp_path / "outside", "secret.jpg", "class/1.jpg")
    for link, target in (("train/a/9.jpg", "secret.jpg"), ("train/b", "class"), ("val", "")):
        root = write_files(tmp_path / "root", "train/a/1.jpg")
        (root / link).symlink_to(outside / target)
        with pytest.raises(UserError, match=f"symbolic link .*{link} leads out of the source folder.*--follow-links"):
            open_imagefolder(root)
        shutil.rmtree(root)


def test_links_within_the_source_are_followed_and_broken_ones_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_files(tmp_path / "root", "train/a/1.jpg")
    (root / "train/a/2.jpg").symlink_to("1.jpg")
    (tmp_path / "alias").symlink_to(root)
    for path in (root, tmp_path / "alias"):
        assert list(open_imagefolder(path).splits["train"].read(0, 2)) == [b"train/a/1.jpg"] * 2
    assert capsys.readouterr().err == ""
    (root / "train/a/3.jpg").symlink_to("3.jpg")  # a circle
    (root / "train/a/4.jpg").symlink_to("nothing")
    for open_source in (open_imagefolder, lambda root: open_image_files([root], "train", ("a",))):
        assert len(open_source(root).splits["train"]) == 2
        assert "skipped 2 entries: 2 .jpg, link that leads nowhere (train/a/3.jpg …)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no folder 'train'"),
        (["a/1.jpg", "b/1.jpg"], r"has no folder 'train' \(it has a, b\); the layout is .*give --val-fraction"),
        (["1.jpg"], "has no folder 'train'"),
        (
            ["train/1.jpg"],
            r"contains no images .*skipped: 1 .jpg, outside of .*; .* classes with --labels",
        ),
        (["train/a/1.txt"], "train contains no images"),
        (["train/a/1.txt", "train/1.jpg"], "contains no images .*skipped: 1 .jpg, outside .*; 1 .txt, not an image"),
        (["train/a/1.jpg", "val/a/1.txt"], "val contains no images"),
        (["train/a/1.jpg", "val/b/1.jpg", "val/c/1.jpg"], "2 class folders that train lacks, such as 'b'"),
        (["train/a/1.jpg", "val/a/1.jpg", "Valid/a/1.jpg"], "has Valid and val, which all mean split 'val'"),
        (["train/a/1.jpg", "val/images/1.jpg"], "no .*val_annotations.txt with their classes"),
        (["train/a/1.jpg", "test/1.jpg", "test/a/1.jpg"], "image files beside the folders a"),
    ],
)
def test_other_layout_is_refused_with_its_content(tmp_path: Path, files: list[str], message: str) -> None:
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


def test_fingerprint_depends_on_names_and_sizes_not_on_location(tmp_path: Path) -> None:
    one = write_files(tmp_path / "one", "train/a/1.jpg", "val/a/1.jpg")
    moved = write_files(tmp_path / "moved", "train/a/1.jpg", "val/a/1.jpg")
    fingerprint = open_imagefolder(one).fingerprint
    assert open_imagefolder(moved).fingerprint == fingerprint
    (moved / "val/a/1.jpg").write_text("longer than before")
    assert open_imagefolder(moved).fingerprint != fingerprint
    write_files(one, "train/b/1.jpg")
    assert open_imagefolder(one).fingerprint != fingerprint


def test_image_files_at_any_depth_are_sorted_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, "b.jpg", "a/2.PNG", "a/10.jpg", "a/deep/er/1.webp", "a/notes.txt", ".hidden/3.jpg")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)  # a circle
    source = open_image_files([tmp_path], "pictures", ("x", "y"))
    rows = source.splits["pictures"]
    names = ["a/10.jpg", "a/2.PNG", "a/deep/er/1.webp", "b.jpg"]
    assert [rows.describe(row) for row in range(len(rows))] == names
    assert list(rows.read(0, 4)) == [name.encode() for name in names]
    assert (rows.labels, source.classes) == (None, ("x", "y"))
    assert (
        "skipped 3 entries: 1 .txt, not an image (a/notes.txt); 1 folder, hidden (.hidden); 1 folder, link to a "
        in (capsys.readouterr().err)
    )
    assert len(open_image_files([tmp_path], "pictures", ("x", "y"), follow_links=True).splits["pictures"]) == 4
    assert "1 folder, link to a folder that contains it (again)" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no images"):
        open_image_files([tmp_path / "empty"], "pictures", ("x",))


def tiny_imagenet(root: Path, annotations: str) -> Path:
    """Write files in the published layout. annotations: lines of FILE CLASS, to which a box is added."""
    write_files(
        root,
        "wnids.txt",
        "words.txt",
        "train/n2/n2_boxes.txt",
        "train/n1/n1_boxes.txt",
        *(f"train/n{number}/images/n{number}_{place}.JPEG" for number in (1, 2) for place in range(3)),
        *(f"{name}/images/{name}_{place}.JPEG" for name in ("val", "test") for place in range(3)),
    )
    lines = [line.split() for line in annotations.splitlines()]
    (root / "val/val_annotations.txt").write_text("".join(f"{name}\t{label}\t0\t32\t44\t62\n" for name, label in lines))
    return root


def test_tiny_imagenet_is_read_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_imagenet(tmp_path, "val_0.JPEG n2\nval_1.JPEG n1\nval_2.JPEG n2")
    source = open_imagefolder(root)
    assert source.classes == ("n1", "n2")
    assert contents(root, "train") == [
        f"train/n{number}/images/n{number}_{place}.JPEG" for number in (1, 2) for place in range(3)
    ]
    assert labels_of(source, "train") == [0, 0, 0, 1, 1, 1]
    assert contents(root, "val") == [f"val/images/val_{place}.JPEG" for place in (1, 0, 2)]
    assert labels_of(source, "val") == [0, 1, 1]
    assert contents(root, "test") == [f"test/images/test_{place}.JPEG" for place in range(3)]
    assert source.splits["test"].labels is None
    assert capsys.readouterr().err.splitlines()[0] == "note: skipped 4 entries: 4 .txt, not an image (wnids.txt …)"


def test_tiny_imagenets_labels_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    one, other = "val_0.JPEG n1\nval_1.JPEG n2\nval_2.JPEG n2", "val_0.JPEG n1\nval_1.JPEG n1\nval_2.JPEG n2"
    first = open_imagefolder(tiny_imagenet(tmp_path, one)).fingerprint
    assert open_imagefolder(tiny_imagenet(tmp_path, other)).fingerprint != first


def test_unmatched_images_and_labels_of_tiny_imagenet_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tiny_imagenet(tmp_path, "val_0.JPEG n2\nval_9.JPEG n1")
    assert contents(root, "val") == ["val/images/val_0.JPEG"]
    said = capsys.readouterr().err
    assert "2 .jpeg, not named in val_annotations.txt (val/images/val_1.JPEG …)" in said
    assert "1 .jpeg, named in val_annotations.txt, but missing (val_9.JPEG)" in said


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("val_0.JPEG n3", "val_annotations.txt, line 1: 'n3' is not a class folder of train"),
        ("val_0.JPEG n1\nval_0.JPEG n2", "line 2: 'val_0.JPEG' has a second class, 'n2'"),
    ],
)
def test_wrong_annotations_are_refused_by_line(tmp_path: Path, annotations: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_imagefolder(tiny_imagenet(tmp_path, annotations))


def test_annotations_linked_from_elsewhere_are_not_read(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "root", "val_0.JPEG n1")
    (root / "val/val_annotations.txt").rename(tmp_path / "outside.txt")
    (root / "val/val_annotations.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(UserError, match="leads out of the source folder"):
        open_imagefolder(root)


def test_class_named_images_is_still_a_class(tmp_path: Path) -> None:
    source = open_imagefolder(write_files(tmp_path, "train/images/1.jpg", "val/images/1.jpg", "test/images/1.jpg"))
    assert [labels_of(source, split) for split in ("train", "val", "test")] == [[0]] * 3


@pytest.mark.parametrize(
    ("names", "noted"),
    [
        (["1.jpg", "2.jpg", "10.jpg"], True),
        (["01.jpg", "02.jpg", "10.jpg"], False),
        (["a1.jpg", "a2.jpg", "a10.jpg"], True),
        (["a01.jpg", "a02.jpg", "a10.jpg"], False),
        (["b1.jpg", "a2.jpg", "a10.jpg"], False),
    ],
)
def test_test_images_not_in_numeric_order_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], noted: bool
) -> None:
    write_files(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/a/10.jpg", *(f"test/{name}" for name in names))
    open_imagefolder(tmp_path)
    assert ("leading zeros" in (said := capsys.readouterr().err)) == noted, said


def class_folders(root: Path, count: int = 10) -> Path:
    """Write `count` images to each of two class folders, without splits."""
    return write_files(root, *(f"{name}/{place:02d}.jpg" for name in ("a", "b") for place in range(count)))


def held_out(root: Path, **options: Any) -> dict[str, list[str]]:
    splits = open_imagefolder(root, FolderOptions(**options)).splits
    return {name: [rows.describe(row) for row in range(len(rows))] for name, rows in splits.items()}


def test_class_folders_without_splits_are_split_by_class(tmp_path: Path) -> None:
    root = class_folders(tmp_path)
    split = held_out(root, val_fraction=0.2, test_fraction=0.1)
    assert sorted(file for files in split.values() for file in files) == [
        f"{name}/{place:02d}.jpg" for name in "ab" for place in range(10)
    ]
    assert {name: len(files) for name, files in split.items()} == {"train": 14, "val": 4, "test": 2}
    source = open_imagefolder(root, FolderOptions(val_fraction=0.2, test_fraction=0.1))
    assert [labels_of(source, name) for name in ("val", "test")] == [[0, 0, 1, 1], [0, 1]]
    assert source.classes == ("a", "b")
    for name, files in split.items():
        assert list(source.splits[name].read(0, len(files))) == [file.encode() for file in files]


def test_random_split_depends_on_seed_and_names_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, moved = class_folders(tmp_path / "root"), tmp_path / "moved"
    for name in ("b", "a"):
        for file in sorted((root / name).iterdir(), reverse=True):
            write_files(moved, str(file.relative_to(root)))
    first = held_out(root, val_fraction=0.3)
    scandir = os.scandir

    class Reversed(list[Any]):
        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(reversed([*scandir(path)])))
    assert held_out(moved, val_fraction=0.3) == first
    assert held_out(root, val_fraction=0.3, seed=1) != first
    fingerprints = {
        open_imagefolder(root, FolderOptions(val_fraction=fraction, seed=seed)).fingerprint
        for fraction, seed in ((0.3, 0), (0.3, 1), (0.2, 0))
    }
    assert len(fingerprints) == 3
    write_files(root, "c/1.jpg", "c/2.jpg")  # another class changes nothing in these
    assert [file for file in held_out(root, val_fraction=0.3)["val"] if file[0] != "c"] == first["val"]


def test_small_classes_keep_an_image_in_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg", "c/3.jpg")
    source = open_imagefolder(tmp_path, FolderOptions(val_fraction=0.1, test_fraction=0.1))
    assert [labels_of(source, name) for name in ("train", "val", "test")] == [[0, 1, 2], [1, 2], [2]]
    assert capsys.readouterr().err.splitlines() == [
        "note: val has no images of 1 of 3 classes: a",
        "note: test has no images of 2 of 3 classes: a, b",
    ]
    (tmp_path / "empty").mkdir()
    open_imagefolder(tmp_path, FolderOptions(val_fraction=0))
    assert capsys.readouterr().err == "note: train has no images of 1 of 4 classes: empty\n"


def test_val_is_taken_from_a_train_folder_too(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    write_files(tmp_path, "test/x.jpg")
    split = held_out(tmp_path, val_fraction=0.1)
    assert {name: len(files) for name, files in split.items()} == {"train": 18, "val": 2, "test": 1}


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], {"val_fraction": 0.1}, "folder for split 'val'; omit --val-fraction"),
        (["a/1.jpg"], {"val_fraction": 0.1}, "one image per class, and none is left for split 'val'"),
        (["a/1.jpg"], {"val_fraction": 0.5, "test_fraction": 0.5}, "fractions that add up to less than 1"),
        (["val/a/1.jpg"], {"val_fraction": 0.1}, "has no folder 'train'"),
        (["1.jpg"], {"val_fraction": 0.1}, "contains no images .*give a table of their classes"),
    ],
)
def test_fractions_that_do_not_fit_are_refused(
    tmp_path: Path, files: list[str], options: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        held_out(write_files(tmp_path, *files), **options)


def write_table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


VAL = [f"val/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
KAGGLE = ["train/1.png", "train/2.png", "train/10.png", "test/1.png", "test/2.png"]
TABLES = {  # the classes of images 1, 2 and 3 are n2, n1, n2
    "LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000002,n1 85 1 499 272 n1 1 2 3 4 \n"
    "ILSVRC2012_val_00000001,n2 1 1 2 2\nILSVRC2012_val_00000003,n2 1 1 2 2\n",
    "imagenet_2012_validation_synset_labels.txt": "n2\nn1\nn2\n",
    "val.txt": "ILSVRC2012_val_00000001.JPEG n2\nILSVRC2012_val_00000002.JPEG n1\nILSVRC2012_val_00000003.JPEG n2\n",
    "paths.csv": "\ufefffile,label,more\nval/ILSVRC2012_val_00000001.JPEG,n2,x\n./ILSVRC2012_val_00000002.JPEG,n1\n"
    "ILSVRC2012_val_00000003.JPEG,n2\n",
    "annotations.tsv": "".join(
        f"{Path(name).name}\t{cls}\t0\t1\n" for name, cls in zip(VAL, ("n2", "n1", "n2"), strict=True)
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("is_inside", [True, False])
def test_validation_images_of_imagenet_get_classes_from_every_form_of_table(
    tmp_path: Path, name: str, is_inside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_files(tmp_path / "root", "train/n1/1.jpg", "train/n2/1.jpg", "test/1.jpg", *VAL)
    labels = write_table((root if is_inside else tmp_path) / name, TABLES[name])
    source = open_imagefolder(root, FolderOptions(labels=labels))
    assert held_out(root, labels=labels)["val"] == [VAL[1], VAL[0], VAL[2]]
    assert labels_of(source, "val") == [0, 1, 1]
    assert source.splits["test"].labels is None
    assert capsys.readouterr().err == ""


def test_flat_train_images_get_classes_from_a_kaggle_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_files(tmp_path, *KAGGLE)
    labels = write_table(tmp_path / "trainLabels.csv", 'id,label\n1,frog\n2,"cat, big"\n10,frog\n11,frog\n')
    source = open_imagefolder(root, FolderOptions(labels=labels))
    assert source.classes == ("cat, big", "frog")
    assert held_out(root, labels=labels)["train"] == ["train/2.png", "train/1.png", "train/10.png"]
    assert labels_of(source, "train") == [0, 1, 1]
    assert source.splits["test"].labels is None  # its ids repeat those of train
    assert "1 without extension, named in trainLabels.csv, but missing (11)" in capsys.readouterr().err
    other = write_table(tmp_path / "other.csv", "id,label\n1,frog\n2,frog\n10,cat\n")
    assert open_imagefolder(root, FolderOptions(labels=other)).fingerprint != source.fingerprint


def test_root_of_images_gets_classes_and_a_random_split(tmp_path: Path) -> None:
    for folder in ("flat", "nested/images"):
        write_files(tmp_path / folder, *(f"{number}.jpg" for number in range(20)))
    labels = write_table(
        tmp_path / "labels.csv", "".join(f"{number}.jpg,{number % 2 * 8 + 2}\n" for number in range(20))
    )
    for root in (tmp_path / "flat", tmp_path / "nested"):
        source = open_imagefolder(root, FolderOptions(labels=labels, val_fraction=0.2))
        assert source.classes == ("2", "10")
        assert [len(rows) for rows in source.splits.values()] == [16, 4]
        assert labels_of(source, "val") == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("files", "table", "message"),
    [
        (["train/1.jpg"], "", "names none of the images, such as train/1.jpg"),
        (["train/1.jpg"], "x,a\ny,a\n", r"names none of the images, .* \(it names x, y\)"),
        (["train/1.jpg", "train/2.jpg"], "a\n", "list of 1 classes, but there are 2 images"),
        (["train/1.jpg", "train/1.png"], "1,a\n", "line 1: '1' may be train/1.jpg or train/1.png"),
        (["train/1.jpg", "val/1.jpg"], "1,a\n", "line 1: '1' may be train/1.jpg or val/1.jpg; name its folder"),
        (["train/1.jpg"], "1,a\n1,b\n", "line 2: '1' has a second class, 'b'"),
        (["train/1.jpg"], "1,\n", "line 1: '' is not a class"),
        (["train/1.jpg"], '1,"a' + "x" * 200_000, "not a table of comma-separated values"),
        (["train/a/1.jpg", "val/1.jpg"], "1,3\n", "line 1: '3' is not a class folder of train"),
        (["train/a/1.jpg", "val/a/1.jpg"], "1,a\n", "has no images outside of class folders; omit it"),
        (["train/1.jpg"], None, "labels.csv"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, files: list[str], table: str | None, message: str) -> None:
    root, labels = write_files(tmp_path / "root", *files), tmp_path / "labels.csv"
    if table is not None:
        write_table(labels, table)
    with pytest.raises(UserError, match=message):
        open_imagefolder(root, FolderOptions(labels=labels))


def test_trees_of_links_are_read_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = write_files(tmp_path / "outside", "class/1.jpg", "class/deep/2.jpg", "file.jpg", "val/a/9.jpg")
    root = write_files(tmp_path / "root", "train/a/3.jpg")
    for link, target in (
        ("train/a/4.jpg", outside / "file.jpg"),
        ("train/a/more", outside / "class"),
        ("train/b", outside / "class"),
        ("val", outside / "val"),
        ("train/a/up", root / "train"),
        ("train/a/gone.jpg", tmp_path / "nothing.jpg"),
        ("train/c", root),
    ):
        (root / link).symlink_to(target)
    (outside / "class" / "loop").symlink_to(outside / "class")
    split = held_out(root, follow_links=True)
    assert split == {
        "train": [f"train/{name}.jpg" for name in ("a/3", "a/4", "a/more/1", "a/more/deep/2", "b/1", "b/deep/2")],
        "val": ["val/a/9.jpg"],
    }
    said = capsys.readouterr().err
    assert "4 folder, link to a folder that contains it (" in said
    assert "1 .jpg, link that leads nowhere (train/a/gone.jpg)" in said
    source = open_imagefolder(root, FolderOptions(follow_links=True))
    assert list(source.splits["train"].read(1, 3)) == [b"file.jpg", b"class/1.jpg"]
