"""Encoding: greyscale of any depth keeps its brightness or is a defect; libtiff's messages become reasons."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from helpers.odd_files import png_of, saved, tiff_of
from pipelines.convert.encode import EXIF_ORIENTATION, ROTATED, Defect, encode
from pipelines.convert.source import Encoding

RAMP = np.linspace(0, 255, 35).round().astype(np.uint8).reshape(5, 7)
RAMP_12 = np.linspace(0, 4095, 35).round().astype(np.uint16).reshape(5, 7)
RAMP_16 = np.linspace(0, 65535, 35).round().astype(np.uint16).reshape(5, 7)


def pgm_of(samples: np.ndarray, maximum: int) -> bytes:
    height, width = samples.shape
    return b"P5 %d %d %d\n" % (width, height, maximum) + samples.astype(">u2" if maximum > 255 else "u1").tobytes()


def grey_of(file: bytes) -> np.ndarray:
    """Return the stored pixels of a greyscale file, [5, 7]."""
    pixels = np.frombuffer(encode(file, Encoding("npy")).payload, np.uint8).reshape(5, 7, 3)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize(
    "file",
    [
        saved(RAMP.astype(np.uint16), "PNG"),
        saved(RAMP.astype(np.uint16), "TIFF"),
        saved(RAMP.astype(np.int32), "TIFF"),
        tiff_of(RAMP.astype(np.int32), 32, ">", kind=2),
        tiff_of(RAMP.astype(np.int16), 16, kind=2),
        tiff_of(RAMP.astype(np.uint32), 32),
        tiff_of(RAMP.astype(np.uint16), 16, ">"),
        tiff_of(255 - RAMP.astype(np.uint16), 16, photometric=0),
        saved(RAMP.astype(np.float32), "TIFF"),
        saved(RAMP.astype(np.float32) + 0.4 * (RAMP < 255), "TIFF"),
        png_of(RAMP, significant=8),
        pgm_of(RAMP, 255),
    ],
)
def test_values_within_8_bits_are_unchanged_in_any_container(file: bytes) -> None:
    np.testing.assert_array_equal(grey_of(file), RAMP)


@pytest.mark.parametrize(
    ("file", "bits"),
    [
        (saved(RAMP_12, "PNG"), 12),
        (saved(RAMP_12, "TIFF"), 12),
        (png_of(RAMP_12, significant=12), 12),
        (png_of(RAMP_12 // 4, significant=10), 10),
        (png_of(RAMP_12 * 4 + 3, significant=14), 14),
        (tiff_of(RAMP_12, 12), 12),
        (pgm_of(RAMP_12, 4095), 12),
        (pgm_of(RAMP_12 // 4, 1023), 10),
        (saved(RAMP_16, "PNG"), 16),
        (saved(RAMP_16, "TIFF"), 16),
        (tiff_of(RAMP_16, 16, ">"), 16),
        (tiff_of(65535 - RAMP_16, 16, photometric=0), 16),
        (png_of(RAMP_16, significant=12), 16),
        (pgm_of(RAMP_16, 65535), 16),
    ],
)
def test_wide_greyscale_is_scaled_by_its_declared_range(file: bytes, bits: int) -> None:
    assert np.abs(grey_of(file).astype(int) - RAMP).max() <= 1, bits


def test_fewer_declared_bits_than_eight_are_scaled_up() -> None:
    values = (RAMP // 17).astype(np.uint16)  # 0 to 15
    np.testing.assert_array_equal(grey_of(png_of(values, significant=4)), values * 17)


def test_declared_range_applies_to_dark_images() -> None:
    dark = RAMP_12 // 20  # up to 204 of 4095
    for file in (tiff_of(dark, 12), png_of(dark, significant=12), pgm_of(dark, 4095)):
        np.testing.assert_array_equal(grey_of(file), dark >> 4)
    scaled = RAMP_16 // 64 & 0xFFF0  # 12 bits scaled by the PNG standard: up to 1008 of 65535
    np.testing.assert_array_equal(grey_of(png_of(scaled, significant=12)), scaled >> 8)
    np.testing.assert_array_equal(grey_of(png_of(RAMP_12, significant=16)), RAMP_12 >> 8)


@pytest.mark.parametrize(
    "file",
    [
        saved(RAMP_12.astype(np.int32), "TIFF"),
        saved(RAMP_16.astype(np.int32), "TIFF"),
        tiff_of(RAMP.astype(np.int16) - 1, 16, kind=2),
        tiff_of(RAMP_12.astype(np.int16), 16, kind=2),
        tiff_of(RAMP.astype(np.uint32) << 24, 32),
        saved(np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7), "TIFF"),
        saved(np.full((5, 7), np.nan, np.float32), "TIFF"),
        png_of(np.repeat(RAMP_12[..., None], 3, axis=2), colour=2),
        png_of(np.repeat(RAMP[..., None], 3, axis=2), colour=2),
        png_of(np.stack([RAMP_12, RAMP_16], axis=2), colour=4),
    ],
)
def test_unknown_range_is_a_defect(file: bytes) -> None:
    with pytest.raises(Defect, match="have no known range; save it with 8"):
        encode(file, Encoding("npy"))


def test_16_bit_colors_are_reduced_to_upper_bytes() -> None:
    colours = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    stored = np.frombuffer(encode(png_of(colours, colour=2), Encoding("npy")).payload, np.uint8)
    np.testing.assert_array_equal(stored.reshape(5, 7, 3), colours >> 8)
    np.testing.assert_array_equal(grey_of(png_of(np.stack([RAMP_16, RAMP_16], axis=2), colour=4)), RAMP_16 >> 8)


@pytest.mark.parametrize("file", [tiff_of(RAMP_12, 12, ">"), tiff_of(RAMP_12 // 4, 10)])
def test_tiff_unsupported_by_pillow_gives_a_reason(file: bytes) -> None:
    with pytest.raises(Defect, match="cannot be decoded: a broken TIFF, or one whose bits per sample, sample format"):
        encode(file, Encoding("npy"))


def test_one_bit_and_premultiplied_greyscale_become_rgb() -> None:
    np.testing.assert_array_equal(grey_of(saved(RAMP > 100, "PNG")), np.where(RAMP > 100, 255, 0))
    with_alpha = saved(np.dstack([RAMP, np.full_like(RAMP, 255)]), "TIFF")
    extra_samples = [struct.pack("<HHIHH", 338, 3, 1, value, 0) for value in (2, 1)]  # alpha as it is, premultiplied
    premultiplied = with_alpha.replace(*extra_samples)
    assert Image.open(io.BytesIO(premultiplied)).mode == "La"
    np.testing.assert_array_equal(grey_of(premultiplied), RAMP)


@pytest.mark.parametrize("kind", ["MPO", "DIB"])
def test_first_mpo_frame_and_dib_files_are_read(kind: str) -> None:
    first = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    options = {"save_all": True, "append_images": [Image.new("RGB", (7, 5))]} if kind == "MPO" else {}
    file = saved(first, kind, **options)
    with Image.open(io.BytesIO(file)) as image:
        assert (image.format, getattr(image, "n_frames", 1)) == (kind, 1 + (kind == "MPO"))
        expected = np.asarray(image.convert("RGB"))
    stored = np.frombuffer(encode(file, Encoding("npy")).payload, np.uint8).reshape(5, 7, 3)
    np.testing.assert_array_equal(stored, expected)


def test_libtiff_output_becomes_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    file = bytearray(saved(noise, "TIFF", compression="tiff_deflate"))
    file[200:300] = bytes(100)
    with pytest.raises(Defect, match=r"decoder error -2; ZIPDecode: Decoding error at scanline 0"):
        encode(bytes(file), Encoding("npy"))
    assert capfd.readouterr().err == ""
    encode(saved(noise, "TIFF", compression="tiff_deflate"), Encoding("npy"))
    os.write(2, b"said\n")
    assert capfd.readouterr().err == "said\n", "stderr is as before"


def photo(orientation: int | None, kind: str = "JPEG", exif: bytes | None = None) -> bytes:
    """Return a file of 16 x 24 pixels, different in each corner."""
    pixels = np.zeros((24, 16, 3), np.uint8)
    pixels[:12, :8], pixels[12:, 8:, 1] = 255, 200
    tags = Image.Exif()
    if orientation is not None:
        tags[EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=tags.tobytes() if exif is None else exif)
    return buffer.getvalue()


def decoded(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def stored(file: bytes, encoding: Encoding) -> np.ndarray:
    encoded = encode(file, encoding)
    return np.frombuffer(encoded.payload, np.uint8).reshape(encoded.height, encoded.width, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_by_pillow(orientation: int, kind: str) -> None:
    file = photo(orientation, kind)
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(stored(file, Encoding("npy", orientation="apply")), expected)
    encoded = encode(file, Encoding("jpeg", orientation="apply", quality=100, subsampling="4:4:4"))
    assert (encoded.height, encoded.width) == expected.shape[:2]
    assert np.abs(decoded(encoded.payload).astype(int) - expected).max() <= 8
    if kind == "JPEG":
        assert encoded.reencoded == (None if orientation == 1 else ROTATED)
        assert (encoded.payload == file) == (orientation == 1)
        assert encode(encoded.payload, Encoding("jpeg", orientation="apply")).payload == encoded.payload


@pytest.mark.parametrize("orientation", range(1, 9))
def test_ignored_orientation_keeps_bytes_and_pixels(orientation: int) -> None:
    file = photo(orientation)
    assert encode(file, Encoding("jpeg")).payload == file
    np.testing.assert_array_equal(stored(file, Encoding("npy")), decoded(file))


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"garbage"]
)
@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_image_with_damaged_orientation_is_kept(exif: bytes, orientation: int) -> None:
    for file in (photo(None, exif=exif), photo(orientation)):
        assert encode(file, Encoding("jpeg", orientation="apply")).payload == file
