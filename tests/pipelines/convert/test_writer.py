"""Writing data sets: encoded samples, refused input, and identical bytes after a kill at any point."""

from __future__ import annotations

import fcntl
import io
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from configs.utils.errors import UserError
from helpers.memory_source import MemoryRows, jpeg_file, marked_image, memory_source, rows_of, tiny_source, write
from pipelines.convert import checks, layout, writer
from pipelines.convert.encode import Defect, encode
from pipelines.convert.shuffle import _huge_pages
from pipelines.convert.source import Encoding
from pipelines.storage.open import open_split
from pipelines.storage.split import Split
from pipelines.storage.verify import verify

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "helpers" / "memory_source.py"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files of a folder, including hidden ones."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def convert(out: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Convert tiny_source in a new process."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, out, *map(str, arguments)], env=environment, stderr=subprocess.PIPE
    )


def pixels_of(split: Split) -> np.ndarray:
    """uint8 [samples, H, W, 3]"""
    view, rows = split.pixel_rows()
    assert split.image_shape is not None
    return view[rows].reshape(-1, *split.image_shape)


def payloads(split: Split) -> list[bytes]:
    places = zip(split.address.tolist(), split.size.tolist(), strict=True)
    return [split.content[begin : begin + size].tobytes() for begin, size in places]


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a tiny PNG whose header claims a size."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "step"), [("npy", 11), ("jpeg", 9)])
def test_kill_between_any_two_file_operations_leaves_no_trace(
    encoding: str, step: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Kill conversions, each a few flushes or renames later than the last, until one finishes."""
    out = tmp_path / "tiny"
    for attempt in range(100):
        process = convert(out, encoding, 1, step + attempt)
        error = process.communicate()[1]
        if process.returncode != -9:
            break
        assert (
            not (out / "dataset.json").exists()
            or contents(out).keys() >= contents(request.getfixturevalue(f"{encoding}_data")).keys()
        )
    assert process.returncode == 0, error.decode()
    assert attempt >= 3
    assert contents(out) == contents(request.getfixturevalue(f"{encoding}_data"))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_random_kills_and_worker_counts_give_identical_bytes(
    encoding: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    chance = random.Random(seed)
    out = tmp_path / "tiny"
    for workers in (2, 1, 2):
        process = convert(out, encoding, workers)
        while not (out / ".spool").is_dir() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
        process.kill()
        process.communicate()
    process = convert(out, encoding, 2)
    error = process.communicate()[1]
    assert process.returncode == 0, error.decode()
    assert contents(out) == contents(request.getfixturevalue(f"{encoding}_data"))


@pytest.mark.parametrize("block_bytes", [2**29, 100_000])
@pytest.mark.parametrize(("encoding", "groups"), [("npy", 1), ("npy", 3), ("jpeg", 1)])
def test_spool_layout_does_not_change_the_result(
    groups: int,
    block_bytes: int,
    encoding: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "GROUPS", groups)
    monkeypatch.setattr(writer, "BLOCK_BYTES", block_bytes)
    write(tiny_source(encoding), tmp_path / "tiny", encoding)
    assert contents(tmp_path / "tiny") == contents(request.getfixturevalue(f"{encoding}_data"))


def test_train_is_shuffled_and_other_splits_keep_source_order(tmp_path: Path, npy_data: Path) -> None:
    write(tiny_source("npy"), tmp_path / "other", seed=1)
    splits = [open_split(folder, "train") for folder in (npy_data, tmp_path / "other")]
    orders = [rows_of(pixels_of(split).transpose(0, 3, 1, 2)) for split in splits]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(700))
    assert orders[0] != orders[1]
    assert abs(np.corrcoef(orders[0], np.arange(700))[0, 1]) < 0.2
    for split, rows in (("val", 107), ("test", 41)):
        images = pixels_of(open_split(npy_data, split))
        np.testing.assert_array_equal(images, [marked_image(row) for row in range(rows)])


@pytest.mark.parametrize("encoding", ["npy", "jpeg"])
def test_images_and_labels_stay_together(encoding: str, request: pytest.FixtureRequest) -> None:
    split = open_split(request.getfixturevalue(f"{encoding}_data"), "train")
    rows = tiny_source(encoding).splits["train"]
    assert rows.labels is not None
    assert split.labels is not None
    if encoding == "npy":
        stored = [image.tobytes() for image in pixels_of(split)]
        expected = {marked_image(row).tobytes(): rows.labels[row] for row in range(700)}
    else:
        stored = payloads(split)
        expected = {jpeg_file(row): rows.labels[row] for row in range(520)}
    assert len(set(stored)) == len(expected)
    assert split.labels.tolist() == [expected[image] for image in stored]


def defective(good: list[bytes]) -> list[bytes]:
    """Return ten files; numbers 0, 2, 3, 5, 6 and 8 are unusable."""
    jpeg = bytearray(good[0])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # claims 65,535 x 65,535
    return [
        b"",
        good[0],
        b"garbage",
        good[1][: len(good[1]) // 2],
        good[2],
        bytes(jpeg),
        png_header(20_000, 20_000),
        good[3],
        good[4][:20],
        good[5],
    ]


BAD = [0, 2, 3, 5, 6, 8]


@pytest.mark.parametrize("encoding", [Encoding("jpeg"), Encoding("npy", size=32)])
def test_unusable_samples_are_quarantined_counted_and_listed(encoding: Encoding, tmp_path: Path) -> None:
    files: list[np.ndarray | bytes] = [*defective([jpeg_file(row) for row in range(6)])]
    out = tmp_path / "out"
    dataset = write(memory_source(train=MemoryRows(files), val=MemoryRows(files, labelled=False)), out, encoding)
    for split in ("train", "val"):
        entry = dataset.splits[split]
        assert (entry.samples, entry.source_rows) == (4, 10)
        assert [defect.row for defect in entry.quarantined] == BAD
        assert [defect.name for defect in entry.quarantined] == [f"row[{row}]" for row in BAD]
        reasons = [defect.reason for defect in entry.quarantined]
        assert reasons[0] == "empty file"
        assert "truncated" in reasons[2]
        assert "65535 x 65535" in reasons[3]
        assert "20000 x 20000" in reasons[4]
        assert len(open_split(out, split)) == 4
    labels = MemoryRows(10).labels
    assert labels is not None
    stored = open_split(out, "train").labels
    assert stored is not None
    assert sorted(stored) == sorted(np.delete(labels, BAD))
    assert verify(out) == []


def test_strict_raises_for_a_defective_sample_by_name(tmp_path: Path) -> None:
    files: list[np.ndarray | bytes] = [jpeg_file(0), jpeg_file(1), b"garbage"]
    with pytest.raises(UserError, match=r"row\[2\].*cannot be decoded.*--strict"):
        write(memory_source(train=MemoryRows(files)), tmp_path / "out", "jpeg", strict=True)


def test_split_without_usable_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'train'.*could be decoded"):
        write(memory_source(train=MemoryRows([b"", b"garbage"])), tmp_path / "out", "jpeg")
    with pytest.raises(UserError, match=r"'train'.*no rows"):
        write(memory_source(train=MemoryRows([])), tmp_path / "empty", "jpeg")


def test_shard_with_only_quarantined_samples_is_valid(tmp_path: Path) -> None:
    good = [marked_image(row) for row in range(230)]
    first = next(iter(write(memory_source(val=MemoryRows([*good])), tmp_path / "whole").splits["val"].shards))
    lost = first.samples
    files: list[np.ndarray | bytes] = [b""] * lost + [*good[lost:]]
    dataset = write(memory_source(val=MemoryRows(files)), tmp_path / "out")
    assert dataset.splits["val"].shards[0].samples == 0
    np.testing.assert_array_equal(pixels_of(open_split(tmp_path / "out", "val")), good[lost:])
    assert verify(tmp_path / "out") == []


class Converted(NamedTuple):
    name: str
    file: bytes
    expected: np.ndarray


def convertible() -> Iterator[Converted]:
    """Yield files in other color spaces with their RGB pixels."""
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    triple = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.full((5, 7, 1), 90, np.uint8)
    yield Converted("greyscale", file_of(Image.fromarray(grey)), triple)
    yield Converted("greyscale with alpha", file_of(Image.fromarray(np.dstack([grey, alpha]), "LA")), triple)
    yield Converted("RGBA", file_of(Image.fromarray(np.dstack([rgb, alpha]))), rgb)
    yield Converted("CMYK", file_of(Image.fromarray(np.dstack([255 - rgb, alpha * 0]), "CMYK"), "TIFF"), rgb)
    palette = Image.fromarray(grey // 7, "P")
    palette.putpalette(rgb.tobytes())
    yield Converted("palette", file_of(palette), rgb)
    yield Converted("one bit", file_of(Image.fromarray(grey > 100)), np.where(triple > 100, 255, 0))
    wide = grey.astype(np.uint16) * 256 + 77
    yield Converted("16-bit greyscale", file_of(Image.fromarray(wide)), triple)
    yield Converted("16-bit TIFF", file_of(Image.fromarray(wide.astype(">u2")), "TIFF"), triple)


@pytest.mark.parametrize("case", convertible(), ids=lambda case: case.name)
def test_every_colour_space_becomes_rgb(case: Converted) -> None:
    encoded = encode(case.file, Encoding("npy"))
    np.testing.assert_array_equal(np.frombuffer(encoded.payload, np.uint8).reshape(5, 7, 3), case.expected)
    with Image.open(io.BytesIO(encode(case.file, Encoding("jpeg")).payload)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (7, 5))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_defects(mode: str) -> None:
    values = np.linspace(0, 1e6, 35).reshape(5, 7).astype(np.float32 if mode == "F" else np.int32)
    with pytest.raises(Defect, match="range"):
        encode(file_of(Image.fromarray(values), "TIFF"), Encoding("npy"))


def test_rgb_jpeg_files_keep_their_bytes(tmp_path: Path) -> None:
    files: list[np.ndarray | bytes] = [jpeg_file(row) for row in range(5)]
    write(memory_source(val=MemoryRows(files)), tmp_path / "out", "jpeg")
    assert payloads(open_split(tmp_path / "out", "val")) == files


def test_size_crops_npy_and_keeps_the_jpeg_aspect_ratio(tmp_path: Path) -> None:
    wide, tall = Image.fromarray(marked_image(1, 48, 90)), Image.fromarray(marked_image(2, 90, 48))
    files: list[np.ndarray | bytes] = [file_of(wide), file_of(tall)]
    write(memory_source(val=MemoryRows(files)), tmp_path / "npy", Encoding("npy", size=32))
    resized = [
        np.asarray(wide.resize((60, 32), Image.Resampling.BICUBIC))[:, 14:46],
        np.asarray(tall.resize((32, 60), Image.Resampling.BICUBIC))[14:46],
    ]
    np.testing.assert_array_equal(pixels_of(open_split(tmp_path / "npy", "val")), resized)
    write(memory_source(val=MemoryRows(files)), tmp_path / "jpeg", Encoding("jpeg", size=32))
    split = open_split(tmp_path / "jpeg", "val")
    assert (split.heights.tolist(), split.widths.tolist()) == ([32, 60], [60, 32])
    assert [Image.open(io.BytesIO(file)).size for file in payloads(split)] == [(60, 32), (32, 60)]


def test_jpeg_of_the_requested_size_keeps_its_bytes() -> None:
    file = file_of(Image.fromarray(marked_image(1, 32, 50)), "JPEG")
    assert encode(file, Encoding("jpeg", size=32)).payload == file
    assert encode(file, Encoding("jpeg", size=31)).payload != file


def test_resize_of_a_line_beyond_the_limit_is_a_defect() -> None:
    line = file_of(Image.fromarray(np.zeros((1, 60_000, 3), np.uint8)))
    with pytest.raises(Defect, match="limit"):
        encode(line, Encoding("jpeg", size=224))


def test_side_beyond_the_jpeg_limit_is_a_defect() -> None:
    long = file_of(Image.fromarray(np.zeros((2, 65_501, 3), np.uint8)))
    with pytest.raises(Defect, match="65501 x 2 pixels, but a JPEG has at most 65,500"):
        encode(long, Encoding("jpeg"))
    assert encode(long, Encoding("npy")).width == 65_501
    longest = file_of(Image.fromarray(np.zeros((2, 65_500, 3), np.uint8)))
    assert encode(longest, Encoding("jpeg")).width == 65_500


def test_quality_and_subsampling_options_are_applied() -> None:
    image = marked_image(3, 64, 64)
    files = {
        (quality, subsampling): encode(image, Encoding("jpeg", quality=quality, subsampling=subsampling)).payload
        for quality in (60, 95)
        for subsampling in ("4:4:4", "4:2:0")
    }
    assert len(files[60, "4:4:4"]) < len(files[95, "4:4:4"])
    assert len(files[95, "4:2:0"]) < len(files[95, "4:4:4"])


def test_npy_refuses_images_of_several_shapes(tmp_path: Path) -> None:
    mixed = MemoryRows([marked_image(0), marked_image(1, 32, 31)])
    with pytest.raises(UserError, match=r"row\[1\] has 32 x 31 pixels and others 32 x 32.*option size"):
        write(memory_source(train=mixed), tmp_path / "out")


def test_npy_refuses_splits_of_several_shapes(tmp_path: Path) -> None:
    source = memory_source(train=MemoryRows([marked_image(0)]), val=MemoryRows([marked_image(0, 16, 16)]))
    with pytest.raises(UserError, match=r"'train'.*32 x 32.*'val'.*16 x 16.*option size"):
        write(source, tmp_path / "out")


@pytest.mark.parametrize("labels", [[0, 12], [-1, 0], [0]])
def test_labels_without_a_class_are_refused(labels: list[int], tmp_path: Path) -> None:
    rows = MemoryRows([marked_image(0), marked_image(1)])
    rows.labels = np.array(labels, np.int64)
    with pytest.raises(UserError, match=r"'train'.*labels"):
        write(memory_source(train=rows), tmp_path / "out")


def test_folder_with_other_content_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "train.index.npz").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="not empty"):
        write(tiny_source("npy"), tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="is a file"):
        write(tiny_source("npy"), tmp_path / "thesis.txt")


def test_finished_data_set_refuses_other_options_and_is_unchanged(npy_copy: Path) -> None:
    before = contents(npy_copy)
    for other in ({"seed": 1}, {"shard_mib": 2}, {"strict": True}):
        with pytest.raises(UserError, match=r"already contains the data set 'tiny'"):
            write(tiny_source("npy"), npy_copy, **other)
    with pytest.raises(UserError, match="already contains"):
        write(tiny_source("npy"), npy_copy, Encoding("npy", size=16))
    assert contents(npy_copy) == before


def test_an_unfinished_data_set_refuses_other_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = convert(out, "npy", 1, 40)
    process.communicate()
    assert process.returncode == -9
    before = contents(out)
    with pytest.raises(UserError, match="unfinished conversion"):
        write(tiny_source("npy"), out, seed=1)
    assert contents(out) == before


def test_temporary_files_of_a_killed_conversion_are_removed(tmp_path: Path) -> None:
    """They are in the folders of their targets, which may already be complete when the conversion is resumed."""
    out = tmp_path / "out"
    with checks.lock_output(out, {"name": "x"}) as spool:
        left = [out / "x-train-000000.tar.tmp", spool / "request.json.tmp", spool / "train" / "block-000000.npz.tmp"]
        (spool / "train").mkdir()
        for file in left:
            file.write_bytes(b"part of a file")
    with checks.lock_output(out, {"name": "x"}):
        assert not [file for file in left if file.exists()]


def test_unfinished_conversion_by_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks may contain files that this version would encode differently."""
    out = tmp_path / "out"
    convert(out, "npy", 1, 40).communicate()
    monkeypatch.setattr(writer, "RULES_VERSION", writer.RULES_VERSION + 1)
    with pytest.raises(UserError, match="unfinished conversion"):
        write(tiny_source("npy"), out)


class Unreadable(MemoryRows):
    def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
        raise AssertionError("read")


def test_a_second_identical_call_reads_and_writes_nothing(npy_copy: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in npy_copy.rglob("*")}

    source = memory_source(train=Unreadable(700), val=Unreadable(107), test=Unreadable(41, labelled=False))
    before = state()
    dataset = write(source, npy_copy)
    assert dataset.splits["train"].samples == 700
    assert state() == before


def test_a_second_writer_into_the_same_folder_is_refused(tmp_path: Path, npy_data: Path) -> None:
    refusals = []

    class Racing(MemoryRows):
        def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
            if (tmp_path / "tiny" / ".spool" / "train").exists():  # the first writer has started
                with pytest.raises(UserError, match="another process is converting") as refusal:
                    write(tiny_source("npy"), tmp_path / "tiny")
                refusals.append(refusal)
            return super().read(start, stop)

    source = tiny_source("npy")
    source.splits["train"] = Racing(700)
    write(source, tmp_path / "tiny")
    assert refusals
    assert contents(tmp_path / "tiny") == contents(npy_data)


def test_writer_started_as_another_finishes_changes_nothing(
    tmp_path: Path, npy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def finish_first(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        write(tiny_source("npy"), tmp_path / "tiny")
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(UserError, match="another process"):
        write(tiny_source("npy"), tmp_path / "tiny")
    assert contents(tmp_path / "tiny") == contents(npy_data)


def test_mean_and_std_are_those_of_the_train_pixels(tmp_path: Path) -> None:
    images = [(marked_image(row) * [1.0, 0.5, 0.1] + [0, 20, 90]).astype(np.uint8) for row in range(300)]
    dark = MemoryRows([np.zeros((32, 32, 3), np.uint8)])
    dataset = write(memory_source(train=MemoryRows([*images]), val=dark), tmp_path / "out")
    pixels = np.stack(images).reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=0), atol=1e-6)


def test_constant_channel_has_a_nonzero_std(tmp_path: Path) -> None:
    dataset = write(memory_source(train=MemoryRows([np.full((8, 8, 3), 7, np.uint8)])), tmp_path / "out")
    assert dataset.std == pytest.approx([1 / 255] * 3, abs=1e-6)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**6))
        with pytest.raises(UserError, match=r"has 1 MiB free.*needs about 69 MiB"):
            write(tiny_source("npy"), tmp_path / "out")
    assert contents(tmp_path) == {}
    write(tiny_source("npy"), tmp_path / "out", shard_mib=2)  # so that other options can be tried


def test_source_with_too_few_rows_is_an_error(tmp_path: Path) -> None:
    class Short(MemoryRows):
        def read(self, start: int, stop: int) -> Iterator[np.ndarray | bytes]:
            return super().read(start, min(stop, 9))

    with pytest.raises(UserError, match="returned 9 rows instead of 10"):
        write(memory_source(train=Short(10)), tmp_path / "out")


def test_recorded_reason_of_a_defect_is_reproducible(tmp_path: Path) -> None:
    files: list[np.ndarray | bytes] = [b"no image at all", jpeg_file(0), jpeg_file(1)[:200]]
    first, second = (
        write(memory_source(val=MemoryRows(list(files))), tmp_path / name, "jpeg").splits["val"].quarantined
        for name in ("first", "second")
    )
    assert first == second
    assert [defect.row for defect in first] == [0, 2]


def test_scans_after_the_image_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phones append a video to a photo, and its bytes may look like any marker."""
    image = marked_image(3, 40, 48)
    film = b"\xff\xda\xff\xdb" * 500
    sound = file_of(Image.fromarray(image), "JPEG", comment=film[:2000], progressive=True) + film
    assert sound.count(b"\xff\xda") > 1000
    assert encode(sound, Encoding("jpeg")).payload == sound
    monkeypatch.setattr("pipelines.jpeg_format.MAX_SCANS", 5)  # a progressive photo has ten
    with pytest.raises(Defect, match="a JPEG of more than 5 scans"):
        encode(sound, Encoding("jpeg"))
    plain = file_of(Image.fromarray(image), "JPEG") + film
    assert encode(plain, Encoding("jpeg")).payload == plain
    monkeypatch.setattr("pipelines.jpeg_format.MAX_SEGMENTS", 3)
    with pytest.raises(Defect, match="more than 5 scans"):
        encode(plain, Encoding("jpeg"))


@pytest.mark.parametrize("sizes", [[], [0], [1, 2, 3], [2 << 20] * 3, [1 << 20, 3 << 20, 5], [(2 << 20) - 1, 2]])
def test_shards_are_written_in_huge_pages(sizes: list[int]) -> None:
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    blocks = [bytes(block) for block in _huge_pages(map(memoryview, pieces))]
    assert b"".join(blocks) == b"".join(pieces)
    assert {len(block) for block in blocks[:-1]} <= {2 << 20}
    assert len(blocks[-1]) <= 2 << 20
