"""Unusual image files of cameras, browsers, scanners and failed downloads."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from helpers.damage import claiming, segments, stray_bytes

HEIGHT, WIDTH = 24, 32
# Arithmetic coding, which Pillow decodes but does not encode: `cjpeg -arithmetic -quality 60`, 32 x 24 pixels.
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`kO^Py"
    "gEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2J01*fP7yuvx0U`hb5di}c0sqV"
    "Z3IGrg1pyEd1^?Or3<CiG0ucid06zf#0Gg<udPI@SI7o}Mbh&@u7N+nKcHkB4pZk<wH+!(FJELm8_@}xXshYaEtRuGpQ4Y)?$i@-PqH#TSSENAy*"
    "#"
)


def pixels() -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]"""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 7, y * 10, (x + y) * 4], axis=2).astype(np.uint8)


GREY = pixels()[..., 0]
RGB = Image.fromarray(pixels())
ALPHA = np.where(GREY > 100, 255, 60).astype(np.uint8)


def saved(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def with_inserted(file: bytes, content: bytes, segment: int) -> bytes:
    """Return a JPEG with bytes inserted before a segment, counted from 0."""
    place = segments(file)[segment][1]
    return file[:place] + content + file[place:]


def ycck() -> bytes:
    """Return a CMYK JPEG that its Adobe segment declares as YCCK."""
    file = bytearray(saved(RGB.convert("CMYK"), "JPEG"))
    adobe = next(place for marker, place in segments(bytes(file)) if marker == 0xEE)
    file[adobe + 15] = 2
    return bytes(file)


def frame_of(file: bytes, offset: int, value: int) -> bytes:
    """Return a JPEG with one changed byte in the frame header; offset 1: type, 4: bits, 5 and 6: height."""
    place = next(place for marker, place in segments(file) if marker in (0xC0, 0xC2))
    return file[: place + offset] + bytes([value]) + file[place + offset + 1 :]


def png_of(samples: np.ndarray, colour: int = 0, significant: int | None = None) -> bytes:
    """Return a PNG of 16-bit samples [H, W] or [H, W, C]. significant: bits of an sBIT chunk."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    declared = [b"sBIT" + bytes([significant])] if significant else []
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [header, *declared, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def tiff_of(samples: np.ndarray, bits: int, order: str = "<", photometric: int = 1, kind: int = 1) -> bytes:
    """Return an uncompressed greyscale TIFF.

    photometric: 1 if black is zero, 0 if white is. kind: 1 unsigned, 2 signed, 3 float.
    """
    height, width = samples.shape
    if bits == 12:
        rows = ["".join(f"{value:012b}" for value in row) for row in samples.tolist()]
        data = b"".join(int(row.ljust(-len(row) // 8 * -8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    else:
        data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    start = 8 + 2 + 10 * 12 + 4  # start of the pixels, after ten tags
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, start),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, kind),
    ]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + data


def animated(kind: str) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[Image.fromarray(255 - pixels())] * 2)


def oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, "JPEG", exif=exif)


def kept_files() -> dict[str, bytes]:
    """Return JPEG files whose bytes are kept."""
    jpeg = saved(RGB, "JPEG")
    return {
        "baseline.jpg": jpeg,
        "upper.JPEG": jpeg,
        "quality-1.jpg": saved(RGB, "JPEG", quality=1),
        "quality-100.jpg": saved(RGB, "JPEG", quality=100),
        "444.jpg": saved(RGB, "JPEG", subsampling=0),
        "422.jpg": saved(RGB, "JPEG", subsampling=1),
        "progressive.jpg": saved(RGB, "JPEG", progressive=True),
        "optimized.jpg": saved(RGB, "JPEG", optimize=True),
        "grey.jpg": saved(GREY, "JPEG"),
        "grey-progressive.jpg": saved(GREY, "JPEG", progressive=True),
        "restart.jpg": saved(RGB, "JPEG", restart_marker_blocks=2),
        "comment.jpg": saved(RGB, "JPEG", comment=b"\xff\xd9\xff\xda" * 100),
        "profile.jpg": saved(RGB, "JPEG", icc_profile=bytes(70_000)),
        "fill.jpg": with_inserted(jpeg, b"\xff\xff\xff", 1),
        "fill-scan.jpg": with_inserted(jpeg, b"\xff", -1),
        "trailing.jpg": jpeg + b"\0\xff\xc9" * 99,
        "photo.mpo": saved(RGB, "MPO", save_all=True, append_images=[RGB]),
        "mpo.jpg": saved(RGB, "MPO", save_all=True, append_images=[RGB]),
        "jpeg.png": jpeg,
        "jpeg.jfif": jpeg,
        **{f"orientation-{number}.jpg": oriented(number) for number in range(1, 9)},
    }


def reencoded_files() -> dict[str, bytes]:
    """Return files that are stored as new JPEG files."""
    jpeg, rgb_jpeg = saved(RGB, "JPEG"), saved(RGB, "JPEG", keep_rgb=True)
    palette = RGB.quantize(16)
    wide = GREY.astype(np.uint16)
    return {
        "cmyk.jpg": saved(RGB.convert("CMYK"), "JPEG"),
        "ycck.jpg": ycck(),
        "rgb.jpg": rgb_jpeg,
        "rgb-names.jpg": rgb_jpeg[:2] + rgb_jpeg[segments(rgb_jpeg)[1][1] :],
        "arithmetic.jpg": ARITHMETIC,
        "stray.jpg": with_inserted(jpeg, bytes(4), 1),
        "stray-one.jpg": with_inserted(jpeg, b"A", 1),
        "stray-stuffed.jpg": with_inserted(jpeg, b"\xff\0", 1),
        "stray-scan.jpg": with_inserted(jpeg, b"\0", -1),
        "stray-shortened.jpg": stray_bytes(jpeg),
        **{f"segment-of-{length}.jpg": with_inserted(jpeg, bytes((0xFF, 0xE1, 0, length)), 1) for length in (0, 1)},
        "png.jpg": saved(RGB, "PNG"),
        "rgb.png": saved(RGB, "PNG"),
        "rgba.png": saved(np.dstack([pixels(), ALPHA]), "PNG"),
        "grey.png": saved(GREY, "PNG"),
        "grey-alpha.png": saved(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"),
        "one-bit.png": saved(GREY > 100, "PNG"),
        "palette.png": saved(palette, "PNG"),
        "palette-transparent.png": saved(palette, "PNG", transparency=0),
        "grey-16.png": png_of(wide * 257),
        "grey-16-holds-8.png": png_of(wide),
        "grey-16-holds-12.png": png_of(wide * 16),
        "rgb-16.png": png_of(pixels().astype(np.uint16) * 257, 2),
        "animated.png": animated("PNG"),
        "still.gif": saved(palette, "GIF"),
        "animated.gif": animated("GIF"),
        "transparent.gif": saved(palette, "GIF", transparency=0),
        "lossy.webp": saved(RGB, "WEBP"),
        "lossless.webp": saved(RGB, "WEBP", lossless=True),
        "animated.webp": animated("WEBP"),
        "alpha.webp": saved(np.dstack([pixels(), ALPHA]), "WEBP"),
        "rgb.bmp": saved(RGB, "BMP"),
        "palette.bmp": saved(palette, "BMP"),
        "one-bit.bmp": saved(GREY > 100, "BMP"),
        "rgb.tiff": saved(RGB, "TIFF"),
        "lzw.tif": saved(RGB, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": saved(RGB, "TIFF", compression="jpeg"),
        "cmyk.tif": saved(RGB.convert("CMYK"), "TIFF"),
        "pages.tif": saved(RGB, "TIFF", save_all=True, append_images=[RGB]),
        "grey-16.tif": saved((wide * 257).astype(">u2"), "TIFF"),
        "grey-12.tif": tiff_of(wide * 16, 12),
        "int32-holds-8.tif": saved(GREY.astype(np.int32), "TIFF"),
        "rgb.ppm": saved(RGB, "PPM"),
        "grey.pgm": saved(GREY, "PPM"),
        "one-bit.pbm": saved(GREY > 100, "PPM"),
        "grey-12.pgm": b"P5 32 24 4095\n" + (wide * 16).astype(">u2").tobytes(),
    }


def defective_files() -> dict[str, bytes]:
    """Return files that are quarantined, each with a reason."""
    jpeg, png, tiff = saved(RGB, "JPEG"), saved(RGB, "PNG"), saved(RGB, "TIFF", compression="tiff_lzw")
    return {
        "empty.jpg": b"",
        "empty.png": b"",
        "zeros.jpg": bytes(500),
        "text.jpg": b"<html>404 Not Found</html>",
        "start-only.jpg": jpeg[:2],
        "header-only.jpg": jpeg[: segments(jpeg)[-1][1]],
        "half.jpg": jpeg[: len(jpeg) - 150],
        "claims.jpg": claiming(65_000, 65_000)(jpeg),
        "lossless-frame.jpg": frame_of(jpeg, 1, 0xC3),
        "12-bit.jpg": frame_of(jpeg, 4, 12),
        "no-height.jpg": frame_of(frame_of(jpeg, 5, 0), 6, 0),
        "half.png": png[: len(png) // 2],
        "half.tif": tiff[: len(tiff) // 2],
        "int32-large.tif": saved(GREY.astype(np.int32) * 10**6, "TIFF"),
        "float.tif": saved(GREY.astype(np.float32) / 250_000 * 1e9, "TIFF"),
        "half.gif": animated("GIF")[:200],
        "half.webp": saved(RGB, "WEBP")[:40],
    }
