"""Format on disk: other programs read it, damage is reported, and large data sets open quickly."""

from __future__ import annotations

import copy
import errno
import gc
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from timm.data.readers import reader_wds
from wds2idx import IndexCreator

from configs.schema import AugConfig, DataConfig
from configs.utils.errors import UserError
from helpers.edits import edit_dataset, flip_byte, rewrite_index
from helpers.memory_source import MemoryRows, marked_image, memory_source, rows_of, write
from pipelines import build_train_loader
from pipelines.convert.source import Encoding
from pipelines.storage import tar_format
from pipelines.storage.dataset import fingerprint, load_dataset
from pipelines.storage.index import INDEX_COLUMNS, sample_stride
from pipelines.storage.open import open_split
from pipelines.storage.split import Split
from pipelines.storage.verify import verify

BOTH = pytest.mark.parametrize("encoding", ["npy", "jpeg"])
ROOT = Path(__file__).parents[3]


def folder_of(encoding: str, request: pytest.FixtureRequest, copied: bool = False) -> Path:
    folder: Path = request.getfixturevalue(f"{encoding}_{'copy' if copied else 'data'}")
    return folder


def stored(split: Split) -> list[bytes]:
    """Return the image member of each sample."""
    places = zip(split.address.tolist(), split.size.tolist(), strict=True)
    return [split.content[begin : begin + size].tobytes() for begin, size in places]


# Other programs


@BOTH
@pytest.mark.parametrize("split_name", ["train", "val", "test"])
def test_webdataset_reads_every_sample(encoding: str, split_name: str, request: pytest.FixtureRequest) -> None:
    split = open_split(folder_of(encoding, request), split_name)
    read = list(webdataset.WebDataset([str(file) for file in split.files], shardshuffle=False).decode())
    assert len(read) == len(split)
    assert split.source_rows().tolist() == [int(sample["__key__"]) for sample in read]
    assert [sample.get("cls") for sample in read] == (
        [None] * len(split) if split.labels is None else split.labels.tolist()
    )
    if encoding == "npy":
        images = np.stack([sample["npy"] for sample in read])
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, [marked_image(int(sample["__key__"])) for sample in read])
    else:
        assert [sample["jpg"] for sample in read] == stored(split)


@BOTH
@pytest.mark.parametrize("split_name", ["train", "test"])
def test_dalis_webdataset_reader_reads_every_sample(
    encoding: str, split_name: str, request: pytest.FixtureRequest
) -> None:
    split = open_split(folder_of(encoding, request), split_name)
    labelled = split.labels is not None

    pipeline = Pipeline(batch_size=len(split), num_threads=1, device_id=None)
    with pipeline:
        components: Any = fn.readers.webdataset(
            paths=[str(file) for file in split.files],
            index_paths=[str(file.with_suffix(".idx")) for file in split.files],
            ext=["npy" if encoding == "npy" else "jpg", *["cls"] * labelled],
            missing_component_behavior="error",
            name="reader",
        )
        image, *label = components if labelled else [components]
        pipeline.set_outputs(fn.decoders.numpy(image) if encoding == "npy" else image, *label)
    outputs: Any = pipeline.run()
    images, *labels = outputs
    assert pipeline.reader_meta("reader")["epoch_size"] == len(split)
    assert labels == [] or [int(bytes(label)) for label in map(np.asarray, labels[0])] == split.labels.tolist()  # type: ignore[union-attr]
    if encoding == "npy":
        view, rows = split.pixel_rows()
        np.testing.assert_array_equal(images.as_array().reshape(len(split), -1), view[rows])
    else:
        assert [bytes(np.asarray(image)) for image in images] == stored(split)


@BOTH
@pytest.mark.parametrize("split_name", ["train", "test"])
def test_idx_file_equals_the_output_of_wds2idx(
    encoding: str, split_name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    for file in open_split(folder_of(encoding, request), split_name).files:
        with IndexCreator(str(file), str(tmp_path / "made.idx"), verbose=False) as creator:
            creator.create_index()
        assert file.with_suffix(".idx").read_text() == (tmp_path / "made.idx").read_text()


def test_timm_reads_the_folder(jpeg_data: Path) -> None:
    info = reader_wds._load_info(str(jpeg_data))
    split = open_split(jpeg_data, "train")
    parsed = reader_wds._parse_split_info("train", info)
    assert parsed.num_samples == len(split) == sum(parsed.shard_lengths)
    assert parsed.filenames == tuple(file.name for file in split.files)
    reader = reader_wds.ReaderWds(root=str(jpeg_data), name="", split="val", is_training=False, batch_size=8)
    read = list(reader)
    val = open_split(jpeg_data, "val")
    assert [label for _, label in read] == val.labels.tolist()  # type: ignore[union-attr]
    assert [image.size for image, _ in read] == list(zip(val.widths, val.heights, strict=True))


@BOTH
def test_members_are_plain_ustar_with_reproducible_headers(encoding: str, request: pytest.FixtureRequest) -> None:
    for file in open_split(folder_of(encoding, request), "train").files:
        assert file.stat().st_size % 512 == 0
        with tarfile.open(file, "r:") as archive:
            members = archive.getmembers()
        names = [member.name for member in members]
        assert len(set(names)) == len(names)
        assert all(name[:9].isdigit() and name[9:] in (".npy", ".jpg", ".cls") for name in names)
        assert all(member.isreg() and member.mtime == 0 and not member.pax_headers for member in members)


# Opening


@pytest.mark.parametrize("split_name", ["train", "val", "test"])
def test_pixel_rows_give_every_image_over_all_shards(split_name: str, npy_data: Path) -> None:
    split = open_split(npy_data, split_name)
    view, rows = split.pixel_rows()
    images = view[rows].reshape(-1, 32, 32, 3)
    assert len(split.files) == (4 if split_name == "train" else 1)
    np.testing.assert_array_equal(images, [marked_image(row) for row in rows_of(images.transpose(0, 3, 1, 2))])
    assert sorted(rows_of(images.transpose(0, 3, 1, 2))) == list(range(len(split)))


@pytest.mark.parametrize(("side", "shard_mib", "is_huge"), [(32, 1, True), (32, 4, True), (60, 2, False)])
def test_shards_start_at_huge_pages(side: int, shard_mib: int, is_huge: bool, tmp_path: Path) -> None:
    """Unless this takes much more address space: a sample of 60 x 60 pixels takes 25 blocks of 512 bytes."""
    rows = MemoryRows([marked_image(row, side, side) for row in range(400)])
    write(memory_source(train=rows), tmp_path / "set", Encoding("npy", size=side), shard_mib=shard_mib)
    split = open_split(tmp_path / "set", "train")
    assert split.content.ctypes.data % (2 << 20) == 0
    assert (split.slot_bytes % (2 << 20) == 0) == is_huge
    assert split.slot_bytes <= 16 * max(shard.bytes for shard in split.info.shards)
    view, places = split.pixel_rows()
    np.testing.assert_array_equal(
        view[places].reshape(-1, side, side, 3), [marked_image(row, side, side) for row in split.source_rows()]
    )


def test_pixel_rows_outlive_the_split(npy_data: Path) -> None:
    view, rows = open_split(npy_data, "train").pixel_rows()
    expected = view[rows[0]].copy()
    gc.collect()
    np.testing.assert_array_equal(view[rows[0]], expected)


@BOTH
def test_opened_split_describes_its_content(encoding: str, request: pytest.FixtureRequest) -> None:
    folder = folder_of(encoding, request)
    split = open_split(folder, "val")
    assert (split.name, split.encoding, len(split)) == ("val", encoding, 107 if encoding == "npy" else 53)
    assert split.image_shape == ((32, 32, 3) if encoding == "npy" else None)
    assert split.classes == tuple(f"class {number}" for number in range(12))
    assert open_split(folder, "test").labels is None
    for content, height, width in zip(stored(split), split.heights, split.widths, strict=True):
        assert (height, width) == (32, 32) if encoding == "npy" else Image.open(io.BytesIO(content)).size[::-1]


def test_sample_description_locates_its_bytes(npy_data: Path) -> None:
    split = open_split(npy_data, "train")
    text = split.describe(650)
    key = f"{split.source_rows()[650]:09d}"
    assert text.startswith(f"sample 650 of split 'train' (tiny-train-000003.tar, key {key}, offset ")
    offset = int(text.rsplit(" ", 1)[1].rstrip(")"))
    assert split.files[3].read_bytes()[offset : offset + int(split.size[650])] == stored(split)[650]
    with tarfile.open(split.files[3]) as archive:
        assert archive.getmember(f"{key}.npy").offset_data == offset


def test_fingerprint_distinguishes_data_sets_but_not_copies(npy_data: Path, npy_copy: Path, jpeg_data: Path) -> None:
    assert fingerprint(load_dataset(npy_data)) == fingerprint(load_dataset(npy_copy))
    assert fingerprint(load_dataset(npy_data)) != fingerprint(load_dataset(jpeg_data))
    edit_dataset(npy_copy, lambda dataset: dataset["splits"]["train"]["shards"][0].update(sha256="0" * 64))
    assert fingerprint(load_dataset(npy_data)) != fingerprint(load_dataset(npy_copy))


# Damage


@BOTH
def test_intact_data_set_has_no_problems(encoding: str, request: pytest.FixtureRequest) -> None:
    assert verify(folder_of(encoding, request)) == []


def test_unknown_split_error_lists_the_known_splits(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'validation'; it has train, val, test"):
        open_split(npy_data, "validation")


def test_folder_without_a_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"contains no dataset.json"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("what", ["shard", "index"])
def test_external_link_is_refused_and_internal_link_accepted(what: str, npy_copy: Path, tmp_path: Path) -> None:
    entry = load_dataset(npy_copy).splits["train"]
    file = npy_copy / (entry.shards[0] if what == "shard" else entry.index).file
    elsewhere, within = tmp_path / "elsewhere", npy_copy / "within"
    elsewhere.write_bytes(file.read_bytes())
    file.rename(within)
    file.symlink_to(within)
    open_split(npy_copy, "train")
    file.unlink()
    file.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{file.name} is a link to .*elsewhere, outside of the data set"):
        open_split(npy_copy, "train")
    linked = tmp_path / "linked"
    file.unlink()
    file.symlink_to(within)
    linked.symlink_to(npy_copy)
    open_split(linked, "train")


def test_dataset_json_linked_from_elsewhere_is_refused(npy_copy: Path, tmp_path: Path) -> None:
    (npy_copy / "dataset.json").rename(tmp_path / "elsewhere")
    (npy_copy / "dataset.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"dataset\.json is a link to .*elsewhere, outside of the data set"):
        load_dataset(npy_copy)


@pytest.mark.parametrize("text", ["cat\x1b[31m", "a\nb", "\u202e"])
def test_names_with_control_characters_are_refused(text: str, npy_copy: Path) -> None:
    for key in ("name", "classes"):
        dataset = json.loads((npy_copy / "dataset.json").read_text())
        dataset[key] = text if key == "name" else [text, *dataset["classes"][1:]]
        (npy_copy / "dataset.json").write_text(json.dumps(dataset))
        with pytest.raises(UserError, match="contains control characters"):
            load_dataset(npy_copy)


@BOTH
@pytest.mark.parametrize("lost", [1, 512, 1024, 300_000])
def test_a_truncated_shard_is_refused_by_name(encoding: str, lost: int, request: pytest.FixtureRequest) -> None:
    folder = folder_of(encoding, request, copied=True)
    file = folder / "tiny-train-000001.tar"
    os.truncate(file, file.stat().st_size - lost)
    with pytest.raises(UserError, match=r"tiny-train-000001.tar has .* bytes, but dataset.json says"):
        open_split(folder, "train")
    assert any("tiny-train-000001.tar has" in problem for problem in verify(folder))
    open_split(folder, "val")


@pytest.mark.parametrize("name", ["tiny-train-000002.tar", "train.index.npz"])
def test_a_missing_file_is_refused_by_name(name: str, npy_copy: Path) -> None:
    (npy_copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_split(npy_copy, "train")
    assert any(f"{name} is missing" in problem for problem in verify(npy_copy))


@BOTH
def test_a_flipped_bit_anywhere_in_a_shard_is_found(encoding: str, request: pytest.FixtureRequest) -> None:
    folder = folder_of(encoding, request, copied=True)
    file = folder / "tiny-train-000001.tar"
    for position in (3, 600, file.stat().st_size // 2, file.stat().st_size - 1):
        flip_byte(file, position)
        assert verify(folder)[0].startswith("tiny-train-000001.tar does not have the sha256 that dataset.json gives: ")
        flip_byte(file, position)
    assert verify(folder) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_changed_byte_in_the_index_is_refused(share: float, npy_copy: Path) -> None:
    file = npy_copy / "train.index.npz"
    flip_byte(file, int(share * file.stat().st_size))
    with pytest.raises(UserError, match=r"train.index.npz does not have the sha256"):
        open_split(npy_copy, "train")
    assert any("train.index.npz" in problem for problem in verify(npy_copy))


def test_index_that_is_not_an_npz_file_is_refused(npy_copy: Path) -> None:
    for content in (b"garbage", (npy_copy / "train.index.npz").read_bytes()[:5000]):
        (npy_copy / "train.index.npz").write_bytes(content)
        dataset = json.loads((npy_copy / "dataset.json").read_text())
        dataset["splits"]["train"]["index"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (npy_copy / "dataset.json").write_text(json.dumps(dataset))
        with pytest.raises(UserError, match=r"train.index.npz cannot be read"):
            open_split(npy_copy, "train")


def half_the_rows(index: dict[str, np.ndarray]) -> None:
    for name in index:
        index[name] = index[name][::2]


def test_index_with_fewer_rows_than_dataset_json_is_refused(npy_copy: Path) -> None:
    entry = json.loads((npy_copy / "dataset.json").read_text())["splits"]["train"]
    rewrite_index(npy_copy, "train", half_the_rows)
    del entry["index"]
    edit_dataset(npy_copy, lambda dataset: dataset["splits"]["train"].update(entry))
    with pytest.raises(UserError, match=r"train.index.npz has .* rows, but dataset.json says 700"):
        open_split(npy_copy, "train")


def swap_labels(index: dict[str, np.ndarray]) -> None:
    index["label"][[3, 4]] = index["label"][[4, 3]]


def swap_samples(index: dict[str, np.ndarray]) -> None:
    for name in ("offset", "size"):
        index[name][[3, 4]] = index[name][[4, 3]]


def wrong_height(index: dict[str, np.ndarray]) -> None:
    index["height"][5] += 1


FALSE_CLAIMS = pytest.mark.parametrize(
    "lie", [half_the_rows, swap_labels, swap_samples, wrong_height], ids=lambda lie: lie.__name__
)


@BOTH
@FALSE_CLAIMS
def test_rewritten_index_that_disagrees_with_its_tar_is_found(
    encoding: str, lie: Callable[[dict[str, np.ndarray]], None], request: pytest.FixtureRequest
) -> None:
    folder = folder_of(encoding, request, copied=True)
    rewrite_index(folder, "train", lie)
    assert any(problem.startswith("tiny-train-000000.tar") for problem in verify(folder))


def outside(index: dict[str, np.ndarray]) -> None:
    index["offset"][7] += 2**31


def before(index: dict[str, np.ndarray]) -> None:
    index["offset"][7] = -512


def negative_size(index: dict[str, np.ndarray]) -> None:
    index["size"][7] = -1


def unknown_label(index: dict[str, np.ndarray]) -> None:
    index["label"][7] = 12


def negative_shard(index: dict[str, np.ndarray]) -> None:
    index["shard"][7] = -1


def unknown_shard(index: dict[str, np.ndarray]) -> None:
    index["shard"][7] = 99


def no_rows(index: dict[str, np.ndarray]) -> None:
    for name in index:
        index[name] = index[name][:0]


def no_heights(index: dict[str, np.ndarray]) -> None:
    del index["height"]


@BOTH
@pytest.mark.parametrize(
    "lie",
    [outside, before, negative_size, unknown_label, negative_shard, unknown_shard, no_rows, no_heights],
    ids=lambda f: f.__name__,
)
def test_contradictory_index_is_refused(
    encoding: str, lie: Callable[[dict[str, np.ndarray]], None], request: pytest.FixtureRequest
) -> None:
    folder = folder_of(encoding, request, copied=True)
    rewrite_index(folder, "train", lie)
    with pytest.raises(UserError, match=r"train\.index\.npz"):
        open_split(folder, "train")


def test_npy_samples_off_the_constant_stride_are_refused(npy_copy: Path) -> None:
    rewrite_index(npy_copy, "val", lambda index: index["offset"].__setitem__(4, index["offset"][4] + 512))
    with pytest.raises(UserError, match=r"val.index.npz .*constant stride"):
        open_split(npy_copy, "val")


def test_wrong_image_shape_is_refused(npy_copy: Path) -> None:
    # the pixels would reach past the end of the last shard, into memory that is not mapped
    edit_dataset(npy_copy, lambda dataset: dataset.update(image_shape=[64, 64, 3]))
    with pytest.raises(UserError, match=r"train.index.npz .*\[64, 64, 3\]"):
        open_split(npy_copy, "train")


def test_wrong_idx_file_is_found(npy_copy: Path) -> None:
    idx = npy_copy / "tiny-train-000001.idx"
    lines = idx.read_text().splitlines(keepends=True)
    idx.write_text("".join(lines[: len(lines) // 2]))
    assert verify(npy_copy) == ["tiny-train-000001.idx disagrees with tiny-train-000001.tar"]
    idx.unlink()
    assert verify(npy_copy) == ["tiny-train-000001.idx is missing"]


@pytest.mark.parametrize("method", ["open", "stat"])
@pytest.mark.parametrize("name", ["dataset.json", "train.index.npz", "*-train-000000.tar"])
def test_file_without_read_permission_is_one_error_message(
    name: str, method: str, npy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = npy_copy.glob(name)
    forbid(file, method, monkeypatch)
    for checked in ("changed", "off"):
        with pytest.raises(UserError, match=rf"{re.escape(str(file))} cannot be read \(Permission denied\)"):
            open_split(npy_copy, "train", verify=checked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["train.index.npz", "*-train-000000.tar", "*-train-000000.idx", "_info.json"])
def test_verify_reports_a_file_without_read_permission(
    name: str, npy_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = npy_copy.glob(name)
    forbid(file, "open", monkeypatch)
    (problem,) = verify(npy_copy)
    assert f"{file.name} cannot be read (Permission denied)" in problem


def forbid(file: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove read permission like chmod, but also for root."""
    allowed = getattr(Path, method)

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return allowed(path, *arguments, **options)

    monkeypatch.setattr(Path, method, refuse)


def test_info_json_is_verified(npy_copy: Path) -> None:
    info = npy_copy / "_info.json"
    info.write_text(info.read_text().replace("107", "106"))
    assert verify(npy_copy) == ["_info.json disagrees with dataset.json"]
    info.write_text("{")
    assert "_info.json cannot be read" in verify(npy_copy)[0]
    info.unlink()
    assert verify(npy_copy) == ["_info.json is missing"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source_rows": 108}, "107 samples and 0 quarantined ones do not add up to the 108 rows of the source"),
        ({"quarantined": [{}]}, "107 samples and 1 quarantined ones do not add up to the 107 rows of the source"),
        ({"samples": 106, "source_rows": 106}, "'val' has 106 samples, but its shards 107"),
        ({"samples": -1}, "samples is -1"),
        ({"source_rows": 2**60}, f"source_rows is {2**60}"),
        ({"source_rows": 2**10000}, "source_rows is a number of 10001 bits"),
        ({"source_rows": True}, "source_rows is True"),
    ],
)
def test_split_with_inconsistent_counts_is_refused(change: dict[str, Any], says: str, npy_copy: Path) -> None:
    edit_dataset(npy_copy, lambda dataset: dataset["splits"]["val"].update(change))
    for use in (lambda: open_split(npy_copy, "train"), lambda: verify(npy_copy)):
        with pytest.raises(UserError, match=rf"dataset\.json is damaged .*{re.escape(says)}"):
            use()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": [0.5, math.nan, 0.5]}, "mean is"),
        ({"mean": [0.5, 10**400, 0.5]}, "mean is"),
        ({"std": [0.2, 0.0, 0.2]}, "std is 0"),
        ({"std": [0.2, -0.1, 0.2]}, "std is"),
        ({"classes": ["cat", 7]}, "classes are not all text"),
        ({"reencoded": {"train": {"PNG": "many"}}}, "PNG is 'many'"),
        ({"reencoded": {"train": 7}}, "not iterable"),
        ({"reencoded": {"train": [7]}}, "out of range"),
        ({"image_shape": [32, 2**40, 3]}, "image_shape is"),
        ({"image_shape": [32, 32, 1]}, "image_shape is"),
        ({"name": "x" * 2**25}, "more than 33,554,432 bytes"),
        ({"encoding": "x" * 1000}, "x..."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_contradictory_dataset_json_is_refused(change: dict[str, Any], says: str, npy_copy: Path) -> None:
    edit_dataset(npy_copy, lambda dataset: dataset.update(change))
    with pytest.raises(UserError, match=rf"dataset\.json is damaged .*{re.escape(says)}") as refusal:
        open_split(npy_copy, "train")
    assert len(str(refusal.value)) < 500


def test_file_listed_twice_is_refused(npy_copy: Path) -> None:
    def repeat(dataset: dict[str, Any]) -> None:
        shards = dataset["splits"]["train"]["shards"]
        shards[1]["file"] = shards[0]["file"]

    edit_dataset(npy_copy, repeat)
    with pytest.raises(UserError, match=r"'tiny-train-000000.tar' is listed twice"):
        open_split(npy_copy, "train")


@pytest.mark.parametrize("name", ["../tiny-train-000000.tar", "/etc/passwd", "a/b.tar", "..", ""])
@pytest.mark.parametrize("where", ["shard", "index"])
def test_file_names_leading_out_of_the_folder_are_refused(name: str, where: str, npy_copy: Path) -> None:
    def change(dataset: dict[str, Any]) -> None:
        entry = dataset["splits"]["train"]
        (entry["shards"][0] if where == "shard" else entry["index"])["file"] = name

    edit_dataset(npy_copy, change)
    for use in (lambda: open_split(npy_copy, "train"), lambda: verify(npy_copy)):
        with pytest.raises(UserError, match=r"dataset\.json.*not a plain file name"):
            use()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": "other"}', b"\xff\xfe", b"[" * 100_000])
def test_invalid_dataset_json_is_refused(content: bytes, npy_copy: Path) -> None:
    (npy_copy / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json is damaged or from another program"):
        open_split(npy_copy, "train")


def test_other_format_versions_are_refused(npy_copy: Path) -> None:
    edit_dataset(npy_copy, lambda dataset: (dataset.update(version=2), dataset.pop("splits")))
    with pytest.raises(UserError, match="format version 2, this program reads 1"):
        open_split(npy_copy, "train")


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Yield the path to every value inside nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, inner in items for found in paths_of(inner, (*path, key))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_no_change_to_dataset_json_makes_opening_crash(npy_copy: Path, npy_data: Path, data: st.DataObject) -> None:
    """Either opening raises UserError or all pixels can be read."""
    dataset = json.loads((npy_data / "dataset.json").read_text())
    *way, last = data.draw(st.sampled_from(paths_of(dataset)))
    changed = copy.deepcopy(dataset)
    holder = changed
    for key in way:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[last]
    else:
        holder[last] = data.draw(st.sampled_from([None, "x", -1, 0, 2**70, 0.5, [], {}, True, [1, 2, 3], math.nan]))
    (npy_copy / "dataset.json").write_text(json.dumps(changed))
    try:
        view, rows = open_split(npy_copy, "train").pixel_rows()
    except UserError:
        return
    assert rows_of(view[rows].reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


# Size

SAMPLES = 1_500_000


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an npy data set of 1.5 M samples of 96x96 in sparse files: 44 GB that take no disk space."""
    folder = tmp_path_factory.mktemp("million")
    shape, classes = (96, 96, 3), 1000
    size = len(tar_format.npy_header(shape)) + math.prod(shape)
    stride = sample_stride(size, True, classes)
    per_shard = 512 * 2**20 // stride
    sample = np.arange(SAMPLES)
    columns: dict[str, Any] = {
        "shard": sample // per_shard,
        "offset": sample % per_shard * stride + tar_format.BLOCK,
        "size": size,
        "label": sample % classes,
        "height": 96,
        "width": 96,
    }
    index = {name: np.broadcast_to(columns[name], SAMPLES).astype(kind) for name, kind in INDEX_COLUMNS.items()}
    np.savez(folder / "train.index.npz", **index)  # type: ignore[arg-type]
    shards = []
    for number, samples in enumerate(np.bincount(columns["shard"]).tolist()):
        bytes_ = samples * stride + len(tar_format.END_OF_ARCHIVE)
        shards.append({"file": f"m-{number:06d}.tar", "samples": samples, "bytes": bytes_, "sha256": "0" * 64})
        with (folder / shards[-1]["file"]).open("wb") as file:
            file.truncate(bytes_)
    content = (folder / "train.index.npz").read_bytes()
    entry = {"file": "train.index.npz", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    split = {
        "samples": SAMPLES,
        "labelled": True,
        "source_rows": SAMPLES,
        "quarantined": [],
        "index": entry,
        "shards": shards,
    }
    dataset = {
        "format": "model-zhu-shards",
        "version": 1,
        "name": "m",
        "classes": [str(c) for c in range(classes)],
        "encoding": "npy",
        "image_shape": shape,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "splits": {"train": split},
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    marked = 1_234_567
    with (folder / shards[marked // per_shard]["file"]).open("r+b") as file:
        file.seek(int(index["offset"][marked]) + size - math.prod(shape))
        file.write(marked_image(1, 96, 96).tobytes())
    return folder


def test_opening_a_million_samples_takes_less_than_200_mb(million: Path) -> None:
    script = f"""
import re
from pathlib import Path
import pipelines.cpu.sigbus_handler  # imports Numba, which training needs anyway
from pipelines.storage.open import open_split
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
split = open_split({str(million)!r}, "train", verify="off")
print(len(split), int(split.labels[-1]), peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    samples, label, growth = map(int, result.stdout.split())
    assert (samples, label) == (SAMPLES, (SAMPLES - 1) % 1000)
    assert growth < 200e6, growth


def test_million_samples_are_addressed_and_give_a_first_batch(million: Path) -> None:
    view, rows = open_split(million, "train", verify="off").pixel_rows()
    np.testing.assert_array_equal(view[rows[1_234_567]].reshape(96, 96, 3), marked_image(1, 96, 96))
    assert not view[rows[[0, 1_234_566, 1_234_568, SAMPLES - 1]]].any()
    data = DataConfig(path=str(million), batch_size=16, threads=1, verify="off")
    loader = build_train_loader(data, AugConfig(crop="random-resized"), device="cpu")
    assert len(loader) == SAMPLES // 16
    images, labels = next(iter(loader))
    assert images.shape == (16, 3, 96, 96)
    assert len(set(labels.tolist())) > 8
