"""Diagnosis of damaged shards: the affected sample, and whether the others can still be found."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import OnBadSample
from configs.utils import warnings
from configs.utils.errors import UserError
from helpers.damage import DAMAGE, adopt, claiming, damage
from helpers.memory_source import MemoryRows, memory_source, write
from pipelines.storage import tar_check, tar_format
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

BOTH = pytest.mark.parametrize("encoding", ["npy", "jpeg"])
SHARD, SAMPLE = 1, 270  # npy has 700 samples in four shards, jpeg 520 in several


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    warnings.warn.cache_clear()


@given(st.lists(st.tuples(st.integers(0, 10**9 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=20))
def test_headers_are_read_by_tarfile(rows: list[tuple[int, int]]) -> None:
    keys = [f"{row:09d}" for row, _ in rows]
    digits = tar_format.digits(np.array([row for row, _ in rows]), tar_format.KEY_DIGITS)
    found = tar_format.headers(digits, "jpg", np.array([size for _, size in rows]))
    for header, key, (_, size) in zip(found, keys, rows, strict=True):
        member = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "strict")  # checks the checksum
        assert (member.name, member.size) == (f"{key}.jpg", size)


def copy_of(encoding: str, request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{encoding}_copy")
    return folder


def change(split: Split, place: int, content: bytes) -> None:
    """Write bytes at an address of a split's shards."""
    with split.files[place // split.slot_bytes].open("r+b") as file:
        file.seek(place % split.slot_bytes)
        file.write(content)


def shard_of(split: Split, sample: int) -> int:
    return int(split.shard[sample])


def found_in(folder: Path, sample: int = SAMPLE) -> tar_check.Damage:
    split = open_split(folder, "train", verify="off")
    return tar_check.diagnose(split, shard_of(split, sample), "0" * 64)


@BOTH
def test_intact_shard_has_no_problem(encoding: str, request: pytest.FixtureRequest) -> None:
    split = open_split(request.getfixturevalue(f"{encoding}_data"), "train")
    for number in range(len(split.files)):
        assert tar_check.layout_error(split, number, np.flatnonzero(split.shard == number)) is None
    assert all(tar_check.image_error(split, sample) is None for sample in range(len(split)))


@BOTH
@pytest.mark.parametrize(
    ("place", "says"),
    [
        (-512 + 3, "damaged tar header (bad checksum)"),  # the key
        (-512 + 126, "damaged tar header (bad checksum)"),  # the size
        (-512 + 150, "damaged tar header"),  # the checksum
        (-512 + 500, "damaged tar header (bad checksum)"),  # an unused byte of the header
    ],
)
def test_flipped_header_bit_is_reported_with_its_sample(
    place: int, says: str, encoding: str, request: pytest.FixtureRequest
) -> None:
    folder = copy_of(encoding, request)
    split = open_split(folder, "train")
    begin = int(split.address[SAMPLE])
    change(split, begin + place, bytes([split.content[begin + place] ^ 4]))
    found = found_in(folder)
    assert says in found.text
    assert f"where the index places sample {SAMPLE} of split 'train'" in found.text
    assert not found.in_content_only


@BOTH
@pytest.mark.parametrize(("place", "says"), [(20, "as the label of"), (512, "it gives b'"), (600, "as the label of")])
def test_label_damage_is_reported_with_its_sample(
    place: int, says: str, encoding: str, request: pytest.FixtureRequest
) -> None:
    folder = copy_of(encoding, request)
    split = open_split(folder, "train")
    label = int(split.address[SAMPLE]) + tar_format.padded(int(split.size[SAMPLE]))
    if place == 600:  # unused padding
        change(split, label + place, b"x")
        assert found_in(folder) == ("headers, labels and sizes are correct, so image bytes differ", True)
        return
    change(split, label + place, bytes([split.content[label + place] ^ 1]))
    found = found_in(folder)
    assert says in found.text
    assert f"sample {SAMPLE} of split 'train'" in found.text
    assert not found.in_content_only


@pytest.mark.parametrize("key", ["000000700", "0000 0001", "of another sample"])
def test_unknown_and_repeated_keys_are_reported(key: str, npy_copy: Path) -> None:
    split = open_split(npy_copy, "train")
    begin = int(split.address[SAMPLE]) - tar_format.BLOCK
    if key == "of another sample":
        key = f"{split.source_rows()[SAMPLE - 1]:09d}"
    stride = int(split.address[SAMPLE + 1] - split.address[SAMPLE])
    digits = np.array([[*key.encode()]], np.uint8)
    image = tar_format.headers(digits, "npy", split.size[SAMPLE : SAMPLE + 1])
    label = tar_format.headers(digits, "cls", np.array([2]))
    change(split, begin, image.tobytes())
    change(split, begin + stride - 2 * tar_format.BLOCK, label.tobytes())
    found = found_in(npy_copy)
    assert "has a key that is not a row of the source, or that is used twice" in found.text
    assert not found.in_content_only


@BOTH
def test_bytes_after_the_last_sample_are_reported(encoding: str, request: pytest.FixtureRequest) -> None:
    folder = copy_of(encoding, request)
    split = open_split(folder, "train")
    size = split.files[0].stat().st_size
    change(split, size - 100, b"x")
    found = tar_check.diagnose(open_split(folder, "train", verify="off"), 0, "0" * 64)
    assert found == ("it does not end where the index says", False)


def test_swapped_shards_are_reported(npy_copy: Path) -> None:
    split = open_split(npy_copy, "train")
    shards = split.info.shards
    found = tar_check.diagnose(split, 1, shards[2].sha256)
    assert found == ("it has the content of tiny-train-000002.tar of split 'train'", False)


@pytest.mark.parametrize("kind", DAMAGE)
def test_undecodable_images_are_reported_and_the_rest_is_intact(kind: str, jpeg_copy: Path) -> None:
    where = [damage(jpeg_copy, sample, DAMAGE[kind]) for sample in (SAMPLE + 2, SAMPLE + 4)]
    found = found_in(jpeg_copy)
    assert found.in_content_only
    assert all(place in found.text for place in where)
    assert ("has 65,000 x 65,000 pixels" if "claims" in kind else "cannot be decoded") in found.text


def test_error_names_only_the_first_samples(jpeg_copy: Path) -> None:
    for sample in range(200, 206):
        damage(jpeg_copy, sample, DAMAGE["emptied"])
    assert found_in(jpeg_copy, 200).text.count("cannot be decoded") == tar_check.MAX_LISTED


def test_damaged_but_decodable_jpeg_differs_in_content_only(jpeg_copy: Path) -> None:
    split = open_split(jpeg_copy, "train")
    begin, size = int(split.address[SAMPLE]), int(split.size[SAMPLE])
    change(split, begin + size - 20, b"\x55")
    assert found_in(jpeg_copy) == ("headers, labels and sizes are correct, so image bytes differ", True)


def test_damaged_npy_header_is_reported(npy_copy: Path) -> None:
    split = open_split(npy_copy, "train")
    change(split, int(split.address[SAMPLE]) + 40, b"x")
    found = found_in(npy_copy)
    assert found.in_content_only
    assert "is not a .npy file of the data set's shape" in found.text


def test_only_damaged_jpeg_images_are_allowed_and_only_on_request(
    jpeg_copy: Path, npy_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (npy_copy, jpeg_copy):
        split = open_split(folder, "train")
        change(split, int(split.address[SAMPLE]) + 150, bytes(20))
        file = split.files[shard_of(split, SAMPLE)].name
        with pytest.raises(UserError, match=rf"{file} does not have the sha256 that dataset.json gives"):
            open_split(folder, "train")
    assert len(open_split(jpeg_copy, "train", on_bad_sample=OnBadSample.SKIP)) == 520
    assert f"{file} does not have the sha256" in capsys.readouterr().err
    with pytest.raises(UserError, match="image bytes differ; the data set is damaged"):
        open_split(npy_copy, "train", on_bad_sample=OnBadSample.SKIP)
    split = open_split(jpeg_copy, "train", verify="off")
    change(split, int(split.address[SAMPLE]) - 512, b"9")
    with pytest.raises(UserError, match="damaged tar header"):
        open_split(jpeg_copy, "train", on_bad_sample=OnBadSample.SKIP)


def test_images_above_the_pixel_limit_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index and file both claim a size of gigabytes."""
    out = tmp_path / "out"
    write(memory_source(train=MemoryRows(3, files=True)), out, "jpeg")
    damage(out, 1, claiming(60_000, 60_000))
    with np.load(out / "train.index.npz") as arrays:
        index = dict(arrays)
    index["height"][1] = index["width"][1] = 60_000
    buffer = io.BytesIO()
    np.savez(buffer, **index)  # type: ignore[arg-type]
    (out / "train.index.npz").write_bytes(buffer.getvalue())
    dataset = json.loads((out / "dataset.json").read_text())
    entry = dataset["splits"]["train"]["index"]
    entry["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (out / "dataset.json").write_text(json.dumps(dataset))
    adopt(out)
    split = open_split(out, "train")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(tar_check, "decode_with_pillow", refuse)
    assert tar_check.image_error(split, 1) is None
