"""HDF5 sources: layouts, row order, labels, and files that would give wrong pixels without an error."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from configs.utils.errors import UserError
from helpers.sources import labels_of
from pipelines.convert.source import Source
from pipelines.hdf5 import arrays, checks
from pipelines.hdf5.file import KeyTemplates, load_class_names
from tools.sources.hdf5 import open_hdf5

ROWS, HEIGHT, WIDTH = 23, 6, 5
MAX_PIXELS = 1_000


def pixels(seed: int = 0) -> np.ndarray:
    """uint8 [ROWS, HEIGHT, WIDTH, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (ROWS, HEIGHT, WIDTH, 3), np.uint8)


def write_hdf5(path: Path, channels_first: bool = True, replace: dict[str, Any] | None = None, **storage: Any) -> Path:
    """Write a valid file of three splits; `replace` swaps keys, or removes them (None)."""
    images = pixels().transpose(0, 3, 1, 2) if channels_first else pixels()
    content: dict[str, Any] = {f"images-{split}": images for split in ("train", "val", "test")}
    content |= {f"labels-{split}": np.arange(ROWS) % 4 for split in ("train", "val")}
    content |= replace or {}
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            if value is not None:
                file.create_dataset(key, data=value, **(storage if key.startswith("images") else {}))
    return path


def read_all(source: Source, split: str = "train") -> np.ndarray:
    return np.stack(list(source.splits[split].read(0, len(source.splits[split]))))


STORAGES: list[dict[str, Any]] = [
    {},
    {"chunks": (4, 3, 2, 3)},
    {"chunks": (1, 1, 1, 3)},
    {"chunks": (50, 6, 6, 6), "maxshape": (None, None, None, None)},
    {"chunks": (4, 3, 2, 3), "compression": "gzip", "shuffle": True},
]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("channels_first", [True, False])
def test_every_layout_and_storage_gives_the_same_images(
    tmp_path: Path, channels_first: bool, storage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "READ_BYTES", 5 * HEIGHT * WIDTH * 3)  # several reads per split
    source = open_hdf5(write_hdf5(tmp_path / "x.hdf5", channels_first, **storage), None, MAX_PIXELS)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(read_all(source, split), pixels())
    for start, stop in ((0, 1), (3, 9), (4, 4), (22, 23)):
        np.testing.assert_array_equal(list(source.splits["train"].read(start, stop)), list(pixels()[start:stop]))
    image = next(source.splits["train"].read(7, 8))
    assert isinstance(image, np.ndarray)
    assert image.flags.c_contiguous
    assert source.splits["train"].bytes_per_row == HEIGHT * WIDTH * 3
    assert source.splits["train"].describe(7) == "images-train[7]"


def test_yielded_images_do_not_change_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "READ_BYTES", 2 * HEIGHT * WIDTH * 3)
    rows = open_hdf5(write_hdf5(tmp_path / "x.hdf5", channels_first=False), None, MAX_PIXELS).splits["train"]
    kept = list(rows.read(0, len(rows)))
    np.testing.assert_array_equal(kept, pixels())


def test_pickled_split_opens_the_file_in_the_worker(tmp_path: Path) -> None:
    rows = open_hdf5(write_hdf5(tmp_path / "x.hdf5"), None, MAX_PIXELS).splits["val"]
    next(rows.read(0, 1))
    np.testing.assert_array_equal(list(pickle.loads(pickle.dumps(rows)).read(0, ROWS)), pixels())


def test_class_names_come_from_the_file_or_count_up(tmp_path: Path) -> None:
    path, names = write_hdf5(tmp_path / "x.hdf5"), tmp_path / "classes.txt"
    assert open_hdf5(path, None, MAX_PIXELS).classes == ("0", "1", "2", "3")
    names.write_text("cat\r\ngreat white shark\ncrane\ncrane\nnever seen\n\n")
    assert open_hdf5(path, names, MAX_PIXELS).classes == ("cat", "great white shark", "crane", "crane", "never seen")


def test_too_few_class_names_are_refused_with_row_and_range(tmp_path: Path) -> None:
    names = tmp_path / "classes.txt"
    names.write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"labels-train\[2\] is 2; labels must be whole numbers within 0 to 1"):
        open_hdf5(write_hdf5(tmp_path / "x.hdf5"), names, MAX_PIXELS)


@pytest.mark.parametrize(("text", "message"), [("", "empty"), ("a\n\nb\n", "line 2 is empty"), (None, "cannot read")])
def test_class_file_without_one_name_per_line_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "classes.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_class_names(file)


@pytest.mark.parametrize("channel_axis", [None, 1, 3])
@pytest.mark.parametrize("storage", [STORAGES[0], {"chunks": True, "compression": "gzip"}], ids=str)
def test_greyscale_images_become_rgb(tmp_path: Path, channel_axis: int | None, storage: dict[str, Any]) -> None:
    grey = pixels()[..., 0]
    images = grey if channel_axis is None else np.expand_dims(grey, channel_axis)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("images-train", data=images, **storage)
        file["labels-train"] = np.zeros(ROWS, int)
    source = open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS)
    np.testing.assert_array_equal(read_all(source), np.repeat(grey[..., None], 3, axis=3))
    assert source.default_encoding == "npy"


@pytest.mark.parametrize(
    ("images", "labels"),
    [("X_{split}", "y_{split}"), ("{split}/images", "{split}/meta/labels"), ("/a/{split}", "/b/{split}")],
)
def test_keys_and_usual_split_names_are_found_by_templates(tmp_path: Path, images: str, labels: str) -> None:
    templates = KeyTemplates(images, labels)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for name in ("train", "valid", "testing"):
            file[templates.images_key(name)] = pixels()
        for name in ("train", "valid"):
            file[templates.labels_key(name)] = np.arange(ROWS) % 4
    source = open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS, templates)
    assert list(source.splits) == ["train", "val", "test"]
    np.testing.assert_array_equal(read_all(source, "val"), pixels())
    assert (labels_of(source, "val"), source.splits["test"].labels) == ((np.arange(ROWS) % 4).tolist(), None)
    with pytest.raises(UserError, match=r"lacks images-train, labels-train; it has .*--images-key and --labels-key"):
        open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS)
    with h5py.File(tmp_path / "y.hdf5", "w") as file:
        for name in ("train", "valid", "val"):
            file[templates.images_key(name)] = pixels()
    with pytest.raises(UserError, match="which both mean split 'val'; remove one"):
        open_hdf5(tmp_path / "y.hdf5", None, MAX_PIXELS, templates)


def test_template_without_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"--labels-key 'y' lacks \{split\}"):
        KeyTemplates(labels="y")


@pytest.mark.parametrize("link", [h5py.SoftLink("/real"), h5py.ExternalLink("other.hdf5", "/")])
def test_links_above_a_key_are_refused(tmp_path: Path, link: Any) -> None:
    write_hdf5(tmp_path / "other.hdf5")
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["real/images-train"] = pixels()
        file["group"] = link
    with pytest.raises(UserError, match="group is a link"):
        open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS, KeyTemplates("group/images-{split}", "group/labels-{split}"))


FILE_STORAGES: list[dict[str, Any]] = [
    {},
    {"chunks": (4,)},
    {"chunks": (50,), "maxshape": (None,), "compression": "gzip", "shuffle": True},
    {"chunks": (4,), "compression": "gzip"},
]


@pytest.mark.parametrize("storage", FILE_STORAGES, ids=str)
def test_files_in_variable_length_bytes_are_yielded_unchanged(tmp_path: Path, storage: dict[str, Any]) -> None:
    replace: dict[str, Any] = {"images-train": vlen_bytes(np.uint8), "images-val": vlen_bytes(np.int8)}
    replace["images-test"] = None
    replace["images-train"][3] = np.zeros(0, np.uint8)
    replace["images-train"][5] = np.arange(200_000, dtype=np.uint8)  # has a heap of its own
    source = open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace=replace, **storage), None, MAX_PIXELS)
    assert list(source.splits["val"].read(0, ROWS)) == JPEGS
    large = replace["images-train"][5].tobytes()
    assert list(source.splits["train"].read(2, 7)) == [JPEGS[2], b"", JPEGS[4], large, JPEGS[6]]
    assert list(pickle.loads(pickle.dumps(source.splits["val"])).read(7, 9)) == JPEGS[7:9]
    assert source.splits["val"].bytes_per_row == sum(map(len, JPEGS)) // ROWS
    assert source.splits["val"].describe(7) == "images-val[7]"
    assert source.default_encoding == "jpeg"
    replace["images-val"][ROWS - 1] = np.ones(5, np.int8)
    changed = open_hdf5(write_hdf5(tmp_path / "y.hdf5", replace=replace), None, MAX_PIXELS)
    assert changed.fingerprint != source.fingerprint


@pytest.mark.parametrize("storage", [{"chunks": (4,), "compression": "lzf"}, {"userblock_size": 512}], ids=str)
def test_files_stored_in_rare_ways_are_refused(tmp_path: Path, storage: dict[str, Any]) -> None:
    block = storage.pop("userblock_size", 0)
    with h5py.File(tmp_path / "x.hdf5", "w", userblock_size=block) as file:
        file.create_dataset("images-train", data=vlen_bytes(np.uint8), **storage)
        file["labels-train"] = np.zeros(ROWS)
    with pytest.raises(UserError, match="h5repack -l CONTI"):
        open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS)


@pytest.mark.parametrize("storage", [FILE_STORAGES[0], FILE_STORAGES[2]], ids=str)
def test_damaged_files_give_an_error_or_bytes(tmp_path: Path, storage: dict[str, Any]) -> None:
    replace: dict[str, Any] = {"images-train": vlen_bytes(np.uint8)}
    replace |= dict.fromkeys(("images-val", "images-test", "labels-val"))
    path = write_hdf5(tmp_path / "x.hdf5", replace=replace, **storage)
    content = path.read_bytes()
    heap, random = content.index(b"GCOL"), np.random.default_rng(0)
    outcomes = set()
    for attempt in range(120):
        damaged = bytearray(content)
        at = random.integers(heap, min(heap + 900, len(content))) if attempt % 2 else random.integers(len(content))
        damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            rows = open_hdf5(path, None, MAX_PIXELS).splits["train"]
            outcomes.update(map(type, rows.read(0, len(rows))))
        except UserError:
            outcomes.add(UserError)
    assert outcomes == {bytes, UserError}


@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i8", "?"])
def test_one_hot_labels_are_read_in_blocks(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "ONE_HOT_BYTES", 100)
    replace = {"labels-train": np.eye(6, dtype=dtype)[np.arange(ROWS) % 4]}
    source = open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace=replace), None, MAX_PIXELS)
    assert labels_of(source, "train") == (np.arange(ROWS) % 4).tolist()
    assert source.classes == ("0", "1", "2", "3", "4", "5")  # two have no samples


def test_float_labels_of_minus_one_mean_none(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5", replace={"labels-test": np.full(ROWS, -1.0)})
    assert open_hdf5(path, None, MAX_PIXELS).splits["test"].labels is None


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", ">i8", "u8", "f2", "f8"])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1)])
def test_labels_of_any_number_type_are_read(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    labels = (np.arange(ROWS) % 4).astype(dtype).reshape(shape)
    source = open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace={"labels-train": labels}), None, MAX_PIXELS)
    assert labels_of(source, "train") == (np.arange(ROWS) % 4).tolist()


def test_missing_or_minus_one_test_labels_mean_none(tmp_path: Path) -> None:
    unlabelled = np.full(ROWS, -1)
    assert open_hdf5(write_hdf5(tmp_path / "a.hdf5"), None, MAX_PIXELS).splits["test"].labels is None
    path = write_hdf5(tmp_path / "b.hdf5", replace={"labels-test": unlabelled})
    assert open_hdf5(path, None, MAX_PIXELS).splits["test"].labels is None
    path = write_hdf5(tmp_path / "c.hdf5", replace={"labels-test": np.arange(ROWS) % 4})
    assert labels_of(open_hdf5(path, None, MAX_PIXELS), "test") == (np.arange(ROWS) % 4).tolist()


def test_only_train_is_required(tmp_path: Path) -> None:
    removed = dict.fromkeys(("images-val", "labels-val", "images-test"))
    assert list(open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace=removed), None, MAX_PIXELS).splits) == ["train"]


IMAGES = pixels().transpose(0, 3, 1, 2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"images-train": None}, "lacks images-train; it has images-test, images-val, labels-train, labels-val"),
    ({"labels-train": None}, "lacks labels-train"),
    ({"labels-val": None}, "lacks labels-val"),
    ({"images-val": None}, "lacks images-val"),
    ({"images-train": IMAGES.astype(np.float32)}, "images-train has dtype float32; only uint8"),
    ({"images-val": IMAGES.astype(np.int8)}, "images-val has dtype int8"),
    ({"images-train": IMAGES[0, 0]}, r"images-train has shape \(6, 5\); allowed are"),
    ({"images-train": np.zeros((ROWS, 3, 7, 3), np.uint8)}, "either axis of 3 may be the channels"),
    ({"images-train": np.zeros((ROWS, 1, 7, 1), np.uint8)}, "either axis of 1 may be the channels"),
    ({"images-train": np.zeros((ROWS, 40, 40), np.uint8)}, "1,600 pixels per image"),
    ({"images-train": np.zeros((ROWS, 3, 40, 40), np.uint8)}, "1,600 pixels per image; --max-pixels allows 1,000"),
    ({"images-train": IMAGES[:0], "labels-train": np.zeros(0, int)}, "images-train is empty"),
    ({"labels-train": np.arange(ROWS - 1)}, r"labels-train has shape \(22,\), but there are 23 images"),
    ({"labels-train": np.zeros((ROWS - 1, 4), int)}, r"shape \(22, 4\)"),
    ({"labels-train": np.zeros((ROWS, 4), int)}, r"labels-train\[0\] is not a single 1 among 3 zeros"),
    ({"labels-train": np.eye(ROWS)[:, ::-1] * 0.5}, r"labels-train\[0\] is not a single 1 among 22 zeros"),
    ({"labels-train": np.eye(ROWS) + np.eye(ROWS, k=-7)}, r"labels-train\[7\] is not a single 1"),
    ({"labels-train": np.where(np.arange(ROWS) == 5, 0.5, 0)}, r"labels-train\[5\] is 0.5; .* \(1 of 23 are not\)"),
    ({"labels-train": np.where(np.arange(ROWS) == 5, np.nan, 0)}, r"labels-train\[5\] is nan"),
    ({"labels-train": np.where(np.arange(ROWS) == 5, np.inf, 0)}, r"labels-train\[5\] is inf"),
    ({"labels-train": np.where(np.arange(ROWS) == 5, -1, 0)}, r"labels-train\[5\] is -1.* \(1 of 23 are not\)"),
    ({"labels-val": np.full(ROWS, -1)}, r"labels-val\[0\] is -1"),
    ({"labels-test": np.where(np.arange(ROWS) == 5, 1, -1)}, r"labels-test\[0\] is -1"),
    ({"labels-train": np.full(ROWS, 10**9)}, "is 1000000000; labels must be whole numbers within 0 to 99999"),
    ({"labels-train": np.full(ROWS, 2**64 - 1, np.uint64)}, "is 18446744073709551615"),
]


@pytest.mark.parametrize(("replace", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_layout_is_refused_with_key_and_value(tmp_path: Path, replace: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace=replace), None, MAX_PIXELS)


JPEGS = [b"\xff\xd8\xff\xe0" + bytes(row) for row in range(ROWS)]


def vlen_bytes(dtype: Any) -> np.ndarray:
    """Return JPEGs as arrays of different lengths, for a variable-length type."""
    values = np.empty(ROWS, h5py.vlen_dtype(dtype))
    values[:] = [np.frombuffer(jpeg, np.uint8).astype(dtype) for jpeg in JPEGS]
    return values


HINTS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"images-train": value}, "imagefolder")
        for value in (
            vlen_bytes(np.uint8)[:, None],
            np.array(JPEGS),
            np.array(JPEGS, "V30"),
            np.array([b"text"] * ROWS, h5py.string_dtype()),
            np.zeros((ROWS, 40), np.uint8),
            np.zeros(ROWS, np.uint8),
        )
    ),
    ({"images-train": IMAGES / np.float32(255)}, "dtype float32.*floats of 0..1 by 255"),
    ({"images-train": IMAGES > 127}, "dtype bool.*multiplied by 255"),
    ({"images-train": IMAGES.astype(np.uint16)}, "dtype uint16.*scale wider ranges"),
    ({"images-train": IMAGES.astype(complex)}, r"dtype complex128.*store an array \(N, H, W, 3\) of uint8"),
    ({"images-train": np.zeros(ROWS, [("r", "u1"), ("g", "u1")])}, r"store an array \(N, H, W, 3\) of uint8"),
    ({"images-train": np.zeros((ROWS, 4, 6, 5), np.uint8)}, "without their fourth channel"),
    ({"images-train": np.zeros((ROWS, 6, 5, 4), np.uint8)}, "without their fourth channel"),
    ({"images-train": np.zeros((6, 5, 3, ROWS), np.uint8)}, "transpose the axes"),
    ({"images-train": np.zeros((ROWS, 2, 6, 5), np.uint8)}, "store RGB images"),
    ({"labels-train": np.array([b"cat"] * ROWS)}, "number the class names from 0 on.*--classes"),
    ({"labels-train": np.zeros((ROWS, 4))}, r"argmax\(axis=1\)"),
]


@pytest.mark.parametrize(("replace", "hint"), HINTS, ids=range(len(HINTS)))
def test_refusal_explains_how_to_convert_the_arrays(tmp_path: Path, replace: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint) as raised:
        open_hdf5(write_hdf5(tmp_path / "x.hdf5", replace=replace), None, MAX_PIXELS)
    assert "convert them to 0..255" not in str(raised.value)


WRITER = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"


def test_file_open_for_writing_elsewhere_is_reported_as_such(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=r"x\.hdf5 is open for writing in another process; close it") as raised:
            open_hdf5(path, None, MAX_PIXELS)
        writer.communicate()
    assert "truncated" not in str(raised.value)
    assert len(open_hdf5(path, None, MAX_PIXELS).splits) == 3


@pytest.mark.parametrize("is_swmr", [False, True])
def test_file_left_open_by_its_writer_is_reported_as_such(tmp_path: Path, is_swmr: bool) -> None:
    with h5py.File(tmp_path / "written.hdf5", "w", libver="latest") as file:
        file["images-train"], file["labels-train"] = IMAGES, np.arange(ROWS)
        file.flush()
        if is_swmr:
            file.swmr_mode = True
        shutil.copy(tmp_path / "written.hdf5", tmp_path / "x.hdf5")  # like a writer that was killed
    with pytest.raises(UserError, match=r"x\.hdf5 is marked as open for writing.*h5clear -s") as raised:
        open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS)
    assert "truncated" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOLCK, "unable to lock file, errno = 37"), "refuses to lock it .*HDF5_USE_FILE_LOCKING=FALSE"),
        (PermissionError(errno.EACCES, "unable to open file: errno = 13"), "permission denied.*check its permissions"),
        (OSError("bad object header version number"), "still being written"),
    ],
)
def test_only_possibly_damaged_files_are_called_damaged(
    tmp_path: Path, error: OSError, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    path = write_hdf5(tmp_path / "x.hdf5")
    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(UserError, match=message):
        open_hdf5(path, None, MAX_PIXELS)


def test_class_numbers_without_samples_are_noted_for_each_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_hdf5(write_hdf5(tmp_path / "whole.hdf5"), None, MAX_PIXELS)
    assert capsys.readouterr().err == ""
    train, val, test = np.arange(ROWS) % 6, np.arange(ROWS) % 3, np.arange(ROWS) % 4
    train[train == 2] = 0
    path = write_hdf5(tmp_path / "x.hdf5", replace={"labels-train": train, "labels-val": val, "labels-test": test})
    source = open_hdf5(path, None, MAX_PIXELS)
    assert capsys.readouterr().err.splitlines() == [
        f"note: {path}: labels-train has no samples of 1 of 6 classes: 2",
        f"note: {path}: labels-val has no samples of 3 of 6 classes: 3, 4, 5",
        f"note: {path}: labels-test has no samples of 2 of 6 classes: 4, 5",
    ]
    assert source.classes == ("0", "1", "2", "3", "4", "5")


def test_long_list_of_empty_classes_is_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = write_hdf5(tmp_path / "x.hdf5", replace={"labels-val": None, "images-val": None}), tmp_path / "names"
    names.write_text("".join(f"class {number}\n" for number in range(1200)))
    open_hdf5(path, names, MAX_PIXELS)
    expected = "no samples of 1,196 of 1,200 classes: 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 …"
    assert capsys.readouterr().err == f"note: {path}: labels-train has {expected}\n"


@pytest.fixture
def without_train_images(tmp_path: Path) -> Path:
    return write_hdf5(tmp_path / "x.hdf5", replace={"images-train": None})


def test_external_storage_is_refused(without_train_images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(IMAGES.nbytes))
    with h5py.File(without_train_images, "a") as file:
        file.create_dataset("images-train", IMAGES.shape, np.uint8, external=[(str(secret), 0, IMAGES.nbytes)])
    with pytest.raises(UserError, match="images-train is kept in external storage"):
        open_hdf5(without_train_images, None, MAX_PIXELS)


def test_a_virtual_data_set_is_refused(without_train_images: Path, tmp_path: Path) -> None:
    layout = h5py.VirtualLayout(IMAGES.shape, np.uint8)
    layout[:] = h5py.VirtualSource(tmp_path / "missing.hdf5", "x", IMAGES.shape)
    with h5py.File(without_train_images, "a") as file:
        file.create_virtual_dataset("images-train", layout)
    with pytest.raises(UserError, match="images-train is a virtual data set"):
        open_hdf5(without_train_images, None, MAX_PIXELS)


@pytest.mark.parametrize("link", [h5py.SoftLink("/images-val"), h5py.ExternalLink("other.hdf5", "/images-train")])
def test_links_are_refused(without_train_images: Path, tmp_path: Path, link: Any) -> None:
    write_hdf5(tmp_path / "other.hdf5")
    with h5py.File(without_train_images, "a") as file:
        file["images-train"] = link
    with pytest.raises(UserError, match="images-train is a link"):
        open_hdf5(without_train_images, None, MAX_PIXELS)


@pytest.mark.parametrize("key", ["images-train", "labels-train"])
@pytest.mark.parametrize("chunks", [None, (4,)])
def test_rows_never_written_are_refused(tmp_path: Path, key: str, chunks: tuple[int, ...] | None) -> None:
    whole: np.ndarray = IMAGES if key == "images-train" else np.zeros(ROWS, np.int64)
    path = write_hdf5(tmp_path / "x.hdf5", replace={key: None})
    with h5py.File(path, "a") as file:
        chunk_shape = None if chunks is None else (*chunks, *whole.shape[1:])
        dataset = file.create_dataset(key, whole.shape, whole.dtype, chunks=chunk_shape)
        if chunks is not None:
            dataset[:8] = whole[:8]
    with pytest.raises(UserError, match=rf"of {key} were never written"):
        open_hdf5(path, None, MAX_PIXELS)


def test_a_group_in_place_of_images_is_refused(without_train_images: Path) -> None:
    with h5py.File(without_train_images, "a") as file:
        file.create_group("images-train")
    with pytest.raises(UserError, match="images-train is a group"):
        open_hdf5(without_train_images, None, MAX_PIXELS)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = write_hdf5(tmp_path / "x.hdf5")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match="truncated"):
        open_hdf5(path, None, MAX_PIXELS)


def test_damaged_bytes_give_an_error_or_valid_shapes(tmp_path: Path) -> None:
    content = write_hdf5(tmp_path / "x.hdf5", chunks=(4, 3, 6, 5), compression="gzip").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] = random.integers(256)
        (tmp_path / "x.hdf5").write_bytes(damaged)
        try:
            assert read_all(open_hdf5(tmp_path / "x.hdf5", None, MAX_PIXELS)).shape[3] == 3
        except UserError:
            continue


def test_missing_files_folders_and_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_text("hello")
    with pytest.raises(UserError, match="does not exist"):
        open_hdf5(tmp_path / "missing.hdf5", None, MAX_PIXELS)
    with pytest.raises(UserError, match="is a folder"):
        open_hdf5(tmp_path, None, MAX_PIXELS)
    with pytest.raises(UserError, match="of another format"):
        open_hdf5(tmp_path / "text.hdf5", None, MAX_PIXELS)


def test_fingerprint_covers_content_and_not_storage(tmp_path: Path) -> None:
    one = open_hdf5(write_hdf5(tmp_path / "a.hdf5"), None, MAX_PIXELS).fingerprint
    assert open_hdf5(write_hdf5(tmp_path / "b.hdf5", chunks=(4, 3, 6, 5)), None, MAX_PIXELS).fingerprint == one
    images, labels = IMAGES.copy(), np.arange(ROWS) % 4
    images[-1, 0, 0, 0] ^= 1
    labels[7] = 0
    for number, replace in enumerate(({"images-val": images}, {"labels-train": labels}, {"images-test": None})):
        path = write_hdf5(tmp_path / f"{number}.hdf5", replace=replace)
        assert open_hdf5(path, None, MAX_PIXELS).fingerprint != one
