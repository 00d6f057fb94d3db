"""libjpeg-turbo, called from kernels: whole images, parts, reduced images, errors and warnings."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.utils.errors import UserError
from helpers.jpeg import decode_files
from pipelines.cpu.graph import Parts
from pipelines.cpu.jpeg import libjpeg
from pipelines.cpu.jpeg.decoder import JpegDecoder

RANDOM = np.random.default_rng(0)


def photo(height: int, width: int) -> Image.Image:
    drift = np.cumsum(RANDOM.normal(0, 6, (height, width, 3)), axis=1)
    return Image.fromarray(np.clip(128 + drift + RANDOM.normal(0, 9, drift.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(file: bytes, denominator: int = 1) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        if denominator > 1:
            image.draft("RGB", (image.width // denominator, image.height // denominator))
        return np.asarray(image.convert("RGB"))


def random_file(height: int, width: int) -> bytes:
    """Return a file of random quality, subsampling, mode, scan order and restart interval."""
    options: dict[str, Any] = {"quality": int(RANDOM.integers(20, 98)), "progressive": bool(RANDOM.integers(2))}
    if RANDOM.random() < 0.2:
        options["restart_marker_blocks"] = int(RANDOM.integers(1, 9))
    if RANDOM.random() < 0.15:
        return saved(photo(height, width).convert("L"), **options)
    return saved(photo(height, width), subsampling=int(RANDOM.integers(3)), **options)


def test_whole_images_equal_those_of_pillow() -> None:
    sides = [(int(height), int(width)) for height, width in RANDOM.integers(1, 150, (80, 2))]
    files = [random_file(*one) for one in sides]
    failed, found = decode_files(files, sides)
    assert failed == len(files)
    for file, pixels in zip(files, found, strict=True):
        np.testing.assert_array_equal(pixels, by_pillow(file))


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_reduced_images_equal_those_of_pillow(denominator: int) -> None:
    sides = [(64, 96), (100, 75), (33, 250), (8, 8)]
    files = [saved(photo(*one), subsampling=sub) for one in sides for sub in (0, 1, 2)]
    sides = [one for one in sides for _ in range(3)]
    boxes = np.array([[0, 0, -(-height // denominator), -(-width // denominator)] for height, width in sides])
    _, found = decode_files(files, sides, Parts(boxes, np.full(len(files), denominator)))
    for file, pixels in zip(files, found, strict=True):
        expected = by_pillow(file, denominator)
        assert pixels.shape == expected.shape
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("to_end", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_parts_equal_those_of_the_whole_image(fast: bool, to_end: bool) -> None:
    for _ in range(150):
        height, width = (int(side) for side in RANDOM.integers(1, 180, 2))
        file, denominator = random_file(height, width), np.array([2 ** RANDOM.integers(0, 4)])
        whole = np.array([[0, 0, -(-height // denominator[0]), -(-width // denominator[0])]])
        _, (expected,) = decode_files([file], [(height, width)], Parts(whole, denominator), fast=fast)
        top, bottom = np.sort(RANDOM.choice(whole[0, 2] + 1, 2, replace=False))
        left, right = np.sort(RANDOM.choice(whole[0, 3] + 1, 2, replace=False))
        parts = Parts(np.array([[top, left, bottom, right]]), denominator)
        failed, (found,) = decode_files([file], [(height, width)], parts, fast=fast, to_end=to_end)
        assert failed == 1
        np.testing.assert_array_equal(found, expected[top:bottom, left:right])


def test_fast_decoding_is_close_to_exact() -> None:
    file = saved(photo(96, 128), quality=90)
    _, (fast,) = decode_files([file], [(96, 128)], fast=True)
    difference = np.abs(fast.astype(int) - by_pillow(file))
    assert 0 < difference.max() <= 8
    assert difference.mean() < 2


FILE = saved(photo(64, 80), quality=90)
DAMAGED = {
    "empty": b"",
    "not a JPEG": b"\x89PNG" + bytes(100),
    "header only": FILE[:200],
    "cut in the middle": FILE[: len(FILE) // 2],
    "bytes between segments": FILE[:2] + b"\xff\xfe\x00\x02" + bytes(5) + FILE[2:],
    "broken Huffman table": FILE.replace(b"\xff\xc4", b"\xff\xc4\x00\x05abc\xff\xc4", 1),
    "frame of no components": b"\xff\xd8\xff\xc0\x00\x08\x08\x00\x40\x00\x50\x00",
    "CMYK": saved(photo(64, 80).convert("CMYK")),
    "another size": saved(photo(64, 79)),
    "height and width swapped": saved(photo(80, 64)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_with_an_error_or_a_warning_stops_the_batch(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    decoder = JpegDecoder()
    failed, (first, _, _) = decode_files([FILE, DAMAGED[kind], FILE], [(64, 80)] * 3, decoder=decoder)
    assert failed == 1
    np.testing.assert_array_equal(first, by_pillow(FILE))
    failed, (again,) = decode_files([FILE], [(64, 80)], decoder=decoder)  # the decoder works on
    assert failed == 1
    np.testing.assert_array_equal(again, by_pillow(FILE))
    assert capfd.readouterr() == ("", "")  # libjpeg prints nothing


def test_errors_leak_no_references() -> None:
    decoder = JpegDecoder()
    before = sys.getrefcount(decoder._words), sys.getrefcount(decoder._fields)
    for _ in range(50):
        decode_files([FILE, DAMAGED["broken Huffman table"]], [(64, 80)] * 2, decoder=decoder)
    assert (sys.getrefcount(decoder._words), sys.getrefcount(decoder._fields)) == before


def test_damage_below_a_part_is_found_only_when_reading_to_the_end() -> None:
    top = Parts(np.array([[0, 0, 8, 80]]), np.array([1]))
    cut = DAMAGED["cut in the middle"]
    assert decode_files([cut], [(64, 80)], top)[0] == 1
    assert decode_files([cut], [(64, 80)], top, to_end=True)[0] == 0


def test_threads_decode_at_the_same_time() -> None:
    files = [saved(photo(40, 50)) for _ in range(60)]
    files[31] = files[31][:400]

    def run(_: int) -> tuple[int, list[np.ndarray]]:
        return decode_files(files, [(40, 50)] * len(files))

    with ThreadPoolExecutor(4) as threads:
        for failed, found in threads.map(run, range(16)):
            assert failed == 31
            for file, pixels in zip(files[:31], found, strict=False):
                np.testing.assert_array_equal(pixels, by_pillow(file))


def test_a_library_without_libjpeg_turbo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libjpeg, "FUNCTIONS", (*libjpeg.FUNCTIONS, "jpeg_no_such_function"))
    with pytest.raises(UserError, match=r"not linked with .* libjpeg-turbo \(.*jpeg_no_such_function.*pip install"):
        libjpeg.load.__wrapped__()


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libjpeg, "ABIS", ((62, 600), (61, 632)))
    with pytest.raises(UserError, match="unknown ABI"):
        JpegDecoder()
