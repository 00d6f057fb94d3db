"""CIFAR sources: official layouts, archives, malicious and damaged pickles, download."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.utils.errors import UserError
from helpers.cifar_files import official_pickle, pixels_of, write_archive, write_cifar10
from helpers.sources import labels_of
from helpers.training import ROOT
from pipelines.convert.source import Source
from tools.sources import download
from tools.sources.cifar import EDITIONS, _parse_classes, open_cifar
from tools.sources.safe_unpickler import load_pickle

UNPACK = Path(__file__).parents[4] / "shared" / "data" / "unpack.py"


def images_of(source: Source, split: str) -> np.ndarray:
    rows = source.splits[split]
    return np.stack(list(rows.read(0, len(rows))))


def test_rows_keep_their_order_and_become_channels_last(tmp_path: Path) -> None:
    source = open_cifar("cifar10", write_cifar10(tmp_path))
    expected = (
        np.concatenate([pixels_of(4, number) for number in range(5)]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(images_of(source, "train"), expected)
    assert labels_of(source, "train") == [number + row for number in range(5) for row in range(4)]
    assert source.classes == tuple(f"name{label}" for label in range(10))
    assert (source.kind, source.name) == ("cifar10", "cifar-10-batches-py")
    assert source.splits["train"].describe(9) == "data_batch_3[1]"


def test_any_slice_of_rows_reads_the_same_images(tmp_path: Path) -> None:
    rows = open_cifar("cifar10", write_cifar10(tmp_path)).splits["train"]
    whole = list(rows.read(0, len(rows)))
    for start, stop in ((0, 1), (3, 5), (2, 19), (19, 20), (7, 7)):
        np.testing.assert_array_equal(list(rows.read(start, stop)), whole[start:stop])


def test_test_batch_becomes_val_and_unlabelled_test(tmp_path: Path) -> None:
    source = open_cifar("cifar10", write_cifar10(tmp_path))
    np.testing.assert_array_equal(images_of(source, "val"), images_of(source, "test"))
    assert labels_of(source, "val") == [5, 6, 7, 8]
    assert source.splits["test"].labels is None


def test_folder_parent_folder_and_archive_give_the_same_source(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "one")
    archive = write_archive(tmp_path / "any-name.tar.gz", folder)
    sources = [open_cifar("cifar10", path) for path in (folder, folder.parent, archive)]
    assert len({source.fingerprint for source in sources}) == 1
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(images_of(sources[0], split), images_of(sources[2], split))


def test_pickled_archive_split_no_longer_needs_the_archive(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", write_cifar10(tmp_path))
    rows = open_cifar("cifar10", archive).splits["train"]
    first, sent = list(rows.read(0, 20)), pickle.dumps(rows)
    archive.write_bytes(b"")
    np.testing.assert_array_equal(list(pickle.loads(sent).read(0, 20)), first)


def test_pickled_folder_split_carries_no_pixels_and_reads_the_same(tmp_path: Path) -> None:
    rows = open_cifar("cifar10", write_cifar10(tmp_path, rows=50)).splits["train"]
    first = list(rows.read(0, 250))
    sent = pickle.dumps(rows)
    assert len(sent) < 10_000
    np.testing.assert_array_equal(list(pickle.loads(sent).read(0, 250)), first)


def test_changed_byte_changes_the_fingerprint(tmp_path: Path) -> None:
    one, other = write_cifar10(tmp_path / "one"), write_cifar10(tmp_path / "other")
    before = open_cifar("cifar10", other).fingerprint
    assert open_cifar("cifar10", one).fingerprint == before
    (other / "test_batch").write_bytes(official_pickle({"data": pixels_of(4, 99), "labels": [0, 1, 2, 3]}))
    assert open_cifar("cifar10", other).fingerprint != before


def test_batches_pickled_by_python_3_are_read(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "3", dump=lambda content: pickle.dumps(content, protocol=4))
    expected = open_cifar("cifar10", write_cifar10(tmp_path / "2"))
    np.testing.assert_array_equal(images_of(open_cifar("cifar10", folder), "train"), images_of(expected, "train"))


@pytest.mark.skipif(
    not UNPACK.exists(), reason="needs ../shared/data/unpack.py, which pickles as the official files are"
)
def test_batches_pickled_as_the_official_files_are_read(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("unpack", UNPACK)
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder = write_cifar10(
        tmp_path,
        dump=lambda content: unpack.python2_pickle(
            {key: [n.decode() for n in value] if key == "label_names" else value for key, value in content.items()}
        ),
    )
    source = open_cifar("cifar10", folder)
    assert images_of(source, "train").shape == (20, 32, 32, 3)
    assert source.classes[3] == "name3"


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for file in ("train", "test"):
        batch = {"data": pixels_of(3, 0), "fine_labels": [99, 0, 5], "coarse_labels": [1, 2, 3]}
        (folder / file).write_bytes(official_pickle(batch))
    names = {"fine_label_names": [f"fine{label}".encode() for label in range(100)], "coarse_label_names": [b"coarse"]}
    (folder / "meta").write_bytes(official_pickle(names))
    source = open_cifar("cifar100", tmp_path)
    assert source.classes[99] == "fine99"
    assert labels_of(source, "train") == [99, 0, 5]


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_naming_a_foreign_class_is_refused(
    tmp_path: Path, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": RunsCode()}, protocol=protocol))
    with pytest.raises(UserError, match=r"data_batch_2 names '(builtins|__builtin__)\.print'"):
        open_cifar("cifar10", folder)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    ["os.system", "numpy.core.multiarray.fromstring", "numpy.load", "numpy.core.numeric.dtype", "_codecs.decode"],
)
def test_only_numpys_reconstruction_names_are_allowed(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    with pytest.raises(UserError, match=name):
        load_pickle(content, "batch")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", [np.array(["a", None], object), np.zeros(2, "V3"), np.zeros(1, "M8[s]")])
def test_arrays_of_objects_are_refused(array: np.ndarray, protocol: int) -> None:
    with pytest.raises(UserError, match="batch is damaged"):
        load_pickle(pickle.dumps({"data": array}, protocol=protocol), "batch")


ARRAYS = [
    np.arange(-3, 9, dtype=">i4").reshape(3, 4),
    np.asfortranarray(np.arange(-3, 9, dtype=">i4").reshape(3, 4)),
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
    np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2],
    np.linspace(0, 1, 5),
    np.array(7),
    np.zeros((0, 4), np.uint8),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS, ids=["C", "F", "transposed", "strided", "float", "0-d", "empty"])
def test_arrays_keep_values_type_and_order_in_every_protocol(array: np.ndarray, protocol: int) -> None:
    loaded = load_pickle(pickle.dumps({"x": array}, protocol=protocol), "batch")["x"]
    np.testing.assert_array_equal(loaded, array)
    assert loaded.dtype == array.dtype


def names_of_numpy_1(content: bytes) -> bytes:
    """Rename the modules in a pickle to those of NumPy 1, for protocols without the length of names."""
    return content.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
@pytest.mark.parametrize("kind", ["scalars", "array"])
def test_labels_may_be_numpy_scalars_or_arrays(tmp_path: Path, protocol: int, dtype: Any, kind: str) -> None:
    def dump(content: dict[str, Any]) -> bytes:
        content = dict(content)
        if "labels" in content:
            labels = np.array(content["labels"], dtype)
            content["labels"] = labels if kind == "array" else list(labels)
        result = pickle.dumps(content, protocol=protocol)
        return names_of_numpy_1(result) if protocol < 4 else result

    source = open_cifar("cifar10", write_cifar10(tmp_path / "a", dump=dump))
    expected = open_cifar("cifar10", write_cifar10(tmp_path / "b"))
    np.testing.assert_array_equal(images_of(source, "train"), images_of(expected, "train"))
    assert labels_of(source, "train") == labels_of(expected, "train")
    assert source.classes == expected.classes


NAMES = ["cat", "großer Hund"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("names", [np.array(NAMES), list(np.array(NAMES)), np.array([name.encode() for name in NAMES])])
def test_class_names_may_be_numpy_text(names: Any, protocol: int) -> None:
    content = pickle.dumps({"label_names": names}, protocol=protocol)
    assert _parse_classes(EDITIONS["cifar10"], content, "meta") == tuple(NAMES)


def test_pickle_memory_is_bounded_by_its_size() -> None:
    """Load the pickle in a new process: this one may get memory within the limit that earlier tests have freed."""
    claim = b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"abc."  # a bytearray of a GiB
    program = f"from tools.sources.safe_unpickler import load_pickle\nload_pickle({claim!r}, 'batch')"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "UserError: batch is damaged (MemoryError); fetch the file again" in ended.stderr


def test_truncated_batch_is_a_user_error() -> None:
    content = official_pickle({"data": pixels_of(1, 0), "labels": [1]})
    for length in (*range(60), *range(60, len(content), 97), len(content) - 1):
        with pytest.raises(UserError, match="batch is damaged"):
            load_pickle(content[:length], "batch")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"data": pixels_of(4, 0)}, "lacks labels"),
        ({"data": pixels_of(4, 0), "labels": [0, 1, 2]}, "one number for each of the 4 images"),
        ({"data": pixels_of(4, 0), "labels": [0, 1, 2, 10]}, "labels up to 10, but batches.meta names 10 classes"),
        ({"data": pixels_of(4, 0), "labels": [0, 1, 2, -1]}, "values that are not class numbers"),
        ({"data": pixels_of(4, 0), "labels": [0, 1, 2, 1 << 80]}, "values that are not class numbers"),
        ({"data": pixels_of(4, 0), "labels": [0, 1, 2, "3"]}, "values that are not class numbers"),
        ({"data": pixels_of(4, 0)[:, :3071], "labels": [0] * 4}, r"uint8 \(4, 3071\); CIFAR's is uint8 \(rows, 3072\)"),
        ({"data": pixels_of(4, 0).astype(np.int16), "labels": [0] * 4}, "int16"),
        ({"data": pixels_of(4, 0), "labels": [True] * 4}, "values that are not class numbers"),
        ({"data": pixels_of(4, 0), "labels": np.zeros((4, 1), int)}, "one number for each of the 4 images"),
        ({"data": pixels_of(4, 0), "labels": np.zeros(4)}, "values that are not class numbers"),
        ({"data": [1, 2], "labels": [0, 0]}, "data is list"),
        ({"data": pixels_of(0, 0), "labels": []}, "one number for each of the 0 images"),
        ([1, 2], "contains a list"),
    ],
)
def test_a_batch_with_other_content_is_refused(tmp_path: Path, batch: Any, message: str) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_4").write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(UserError, match=f"data_batch_4.*{message}"):
        open_cifar("cifar10", folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="lacks data_batch_3"):
        open_cifar("cifar10", folder)


def test_folder_without_cifar_error_lists_the_expected_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"no cifar10 at .*cifar-10-batches-py.*--download"):
            open_cifar("cifar10", path)


def test_every_truncation_of_an_archive_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", write_cifar10(tmp_path / "one", rows=1))
    content = archive.read_bytes()
    for length in (0, 5, len(content) // 3, len(content) // 2, len(content) - 9, len(content) - 1):
        archive.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cifar.tar.gz (is not a complete|lacks)"):
            open_cifar("cifar10", archive)


def test_a_flipped_byte_in_an_archive_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", write_cifar10(tmp_path / "one", rows=1))
    content = bytearray(archive.read_bytes())
    for position in (len(content) // 2, len(content) - 6):
        content[position] ^= 0x10
        archive.write_bytes(content)
        with pytest.raises(UserError):
            open_cifar("cifar10", archive)
        content[position] ^= 0x10


def test_paths_inside_an_archive_write_no_files(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "one")
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in folder.iterdir():
            tar.add(file, f"../../{tmp_path.name}-escaped/{file.name}")
    before = sorted(tmp_path.rglob("*"))
    assert len(open_cifar("cifar10", archive).splits["train"]) == 20
    assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.parent.glob("*-escaped"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that replaces the web site, with an archive of the official name and a matching md5."""
    folder = tmp_path / "site"
    write_cifar10(tmp_path / "made")
    folder.mkdir()
    archive = write_archive(folder / "cifar-10-python.tar.gz", tmp_path / "made" / "cifar-10-batches-py")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(EDITIONS, "cifar10", dataclasses.replace(EDITIONS["cifar10"], md5=md5))
    monkeypatch.setattr(download, "SITE", folder.as_uri() + "/")
    return folder


def test_a_download_is_checked_kept_and_not_repeated(site: Path, tmp_path: Path) -> None:
    layout = EDITIONS["cifar10"]
    path = download.download(layout.archive, layout.md5, tmp_path / "raw")
    assert path.read_bytes() == (site / layout.archive).read_bytes()
    assert [file.name for file in path.parent.iterdir()] == [layout.archive]
    (site / layout.archive).unlink()
    assert download.download(layout.archive, layout.md5, tmp_path / "raw") == path
    assert len(open_cifar("cifar10", tmp_path / "raw").splits["val"]) == 4


def test_a_download_with_another_md5_is_not_kept(site: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arrived with md5"):
        download.download("cifar-10-python.tar.gz", "0" * 32, tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []


def test_a_failed_download_says_what_to_do(site: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot download .*nothing.tar.gz.*pass it as --source"):
        download.download("nothing.tar.gz", "0" * 32, tmp_path / "raw")


def test_batches_that_change_or_vanish_while_converting_are_named(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path)
    rows = open_cifar("cifar10", folder).splits["train"]
    (folder / "data_batch_2").write_bytes(official_pickle({"data": pixels_of(3, 1), "labels": [0, 1, 2]}))
    (folder / "data_batch_3").unlink()
    for start in (4, 8):
        with pytest.raises(UserError, match=r"data_batch_[23] changed while it was converted"):
            list(rows.read(start, start + 1))
