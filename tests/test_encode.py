"""Greyscale of every depth keeps its brightness or is a defect with a reason; libtiff's messages become reasons."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.encode import Defect, Encoding, encode

RAMP = np.linspace(0, 255, 35).round().astype(np.uint8).reshape(5, 7)
RAMP_12 = np.linspace(0, 4095, 35).round().astype(np.uint16).reshape(5, 7)
RAMP_16 = np.linspace(0, 65535, 35).round().astype(np.uint16).reshape(5, 7)


def file_of(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(samples: np.ndarray, colour: int = 0, significant: int | None = None) -> bytes:
    """A PNG of 16-bit samples [H, W] or [H, W, C]; significant: the bits of an sBIT chunk."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    declared = [b"sBIT" + bytes([significant])] if significant else []
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [header, *declared, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff_of(samples: np.ndarray, bits: int, order: str = "<", photometric: int = 1, kind: int = 1) -> bytes:
    """An uncompressed greyscale TIFF; photometric: 1 black is zero, 0 white is; kind: 1 unsigned, 2 signed, 3 float."""
    height, width = samples.shape
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row) for row in samples.tolist()]
        data = b"".join(int(row.ljust(-len(row) // 8 * -8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    else:
        data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    start = 8 + 2 + 10 * 12 + 4  # of the pixels, behind ten tags
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, start), (277, 1),
            (278, height), (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + data


def pgm_of(samples: np.ndarray, maximum: int) -> bytes:
    height, width = samples.shape
    return b"P5 %d %d %d\n" % (width, height, maximum) + samples.astype(">u2" if maximum > 255 else "u1").tobytes()


def grey_of(file: bytes) -> np.ndarray:
    """The stored pixels of a greyscale file, [5, 7]."""
    pixels = np.frombuffer(encode(file, Encoding("npy")).payload, np.uint8).reshape(5, 7, 3)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    "file",
    [
        file_of(RAMP.astype(np.uint16), "PNG"),
        file_of(RAMP.astype(np.uint16), "TIFF"),
        file_of(RAMP.astype(np.int32), "TIFF"),
        tiff_of(RAMP.astype(np.int32), 32, ">", kind=2),
        tiff_of(RAMP.astype(np.int16), 16, kind=2),
        tiff_of(RAMP.astype(np.uint32), 32),
        tiff_of(RAMP.astype(np.uint16), 16, ">"),
        tiff_of(255 - RAMP.astype(np.uint16), 16, photometric=0),
        file_of(RAMP.astype(np.float32), "TIFF"),
        file_of(RAMP.astype(np.float32) + 0.4 * (RAMP < 255), "TIFF"),
        png_of(RAMP, significant=8),
        pgm_of(RAMP, 255),
    ],
)
def test_values_within_8_bits_stay_as_they_are_in_any_container(file: bytes) -> None:
    np.testing.assert_array_equal(grey_of(file), RAMP)


@pytest.mark.parametrize(
    ("file", "bits"),
    [
        (file_of(RAMP_12, "PNG"), 12),
        (file_of(RAMP_12, "TIFF"), 12),
        (png_of(RAMP_12, significant=12), 12),
        (png_of(RAMP_12 // 4, significant=10), 10),
        (png_of(RAMP_12 * 4 + 3, significant=14), 14),
        (tiff_of(RAMP_12, 12), 12),
        (pgm_of(RAMP_12, 4095), 12),
        (pgm_of(RAMP_12 // 4, 1023), 10),
        (file_of(RAMP_16, "PNG"), 16),
        (file_of(RAMP_16, "TIFF"), 16),
        (tiff_of(RAMP_16, 16, ">"), 16),
        (tiff_of(65535 - RAMP_16, 16, photometric=0), 16),
        (png_of(RAMP_16, significant=12), 16),
        (pgm_of(RAMP_16, 65535), 16),
    ],
)
def test_wide_greyscale_is_scaled_by_the_range_of_the_file(file: bytes, bits: int) -> None:
    assert np.abs(grey_of(file).astype(int) - RAMP).max() <= 1, bits


def test_a_declared_range_counts_for_dark_images_too() -> None:
    dark = RAMP_12 // 20  # up to 204 of 4095
    for file in (tiff_of(dark, 12), png_of(dark, significant=12), pgm_of(dark, 4095)):
        np.testing.assert_array_equal(grey_of(file), dark >> 4)
    scaled = RAMP_16 // 64 & 0xFFF0  # of 12 bits, as the PNG standard wants them: up to 1008 of 65535
    np.testing.assert_array_equal(grey_of(png_of(scaled, significant=12)), scaled >> 8)
    np.testing.assert_array_equal(grey_of(png_of(RAMP_12, significant=16)), RAMP_12 >> 8)


@pytest.mark.parametrize(
    "file",
    [
        file_of(RAMP_12.astype(np.int32), "TIFF"),
        file_of(RAMP_16.astype(np.int32), "TIFF"),
        tiff_of(RAMP.astype(np.int16) - 1, 16, kind=2),
        tiff_of(RAMP_12.astype(np.int16), 16, kind=2),
        tiff_of(RAMP.astype(np.uint32) << 24, 32),
        file_of(np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7), "TIFF"),
        file_of(np.full((5, 7), np.nan, np.float32), "TIFF"),
        png_of(np.repeat(RAMP_12[..., None], 3, axis=2), colour=2),
        png_of(np.repeat(RAMP[..., None], 3, axis=2), colour=2),
        png_of(np.stack([RAMP_12, RAMP_16], axis=2), colour=4),
    ],
)
def test_values_of_an_unknown_range_are_a_defect(file: bytes) -> None:
    with pytest.raises(Defect, match="have no known range; save it with 8"):
        encode(file, Encoding("npy"))


def test_16_bit_colours_that_use_their_range_keep_their_upper_bytes() -> None:
    colours = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    stored = np.frombuffer(encode(png_of(colours, colour=2), Encoding("npy")).payload, np.uint8)
    np.testing.assert_array_equal(stored.reshape(5, 7, 3), colours >> 8)
    np.testing.assert_array_equal(grey_of(png_of(np.stack([RAMP_16, RAMP_16], axis=2), colour=4)), RAMP_16 >> 8)


@pytest.mark.parametrize("file", [tiff_of(RAMP_12, 12, ">"), tiff_of(RAMP_12 // 4, 10)])
def test_a_tiff_that_pillow_does_not_read_says_why(file: bytes) -> None:
    with pytest.raises(Defect, match="cannot be decoded: a broken TIFF, or one whose bits per sample, sample format"):
        encode(file, Encoding("npy"))


def test_one_bit_and_premultiplied_greyscale_become_rgb() -> None:
    np.testing.assert_array_equal(grey_of(file_of(RAMP > 100, "PNG")), np.where(RAMP > 100, 255, 0))
    with_alpha = file_of(np.dstack([RAMP, np.full_like(RAMP, 255)]), "TIFF")
    extra_samples = [struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1)]  # alpha as it is, premultiplied
    premultiplied = with_alpha.replace(*extra_samples)
    assert Image.open(io.BytesIO(premultiplied)).mode == "La"
    np.testing.assert_array_equal(grey_of(premultiplied), RAMP)


@pytest.mark.parametrize("kind", ["MPO", "DIB"])
def test_mpo_gives_its_first_frame_and_dib_is_read(kind: str) -> None:
    first = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    options = {"save_all": True, "append_images": [Image.new("RGB", (7, 5))]} if kind == "MPO" else {}
    file = file_of(first, kind, **options)
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == (kind, 1 + (kind == "MPO"))
        expected = np.asarray(image.convert("RGB"))
    stored = np.frombuffer(encode(file, Encoding("npy")).payload, np.uint8).reshape(5, 7, 3)
    np.testing.assert_array_equal(stored, expected)


def test_what_libtiff_prints_becomes_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    file = bytearray(file_of(noise, "TIFF", compression="tiff_deflate"))
    file[200:300] = bytes(100)
    with pytest.raises(Defect, match=r"decoder error -2; ZIPDecode: Decoding error at scanline 0"):
        encode(bytes(file), Encoding("npy"))
    assert capfd.readouterr().err == ""
    encode(file_of(noise, "TIFF", compression="tiff_deflate"), Encoding("npy"))
    os.write(2, b"said\n")
    assert capfd.readouterr().err == "said\n", "stderr is as before"
