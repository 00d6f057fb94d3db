"""What one source sample becomes in a shard: raw pixels (npy) or JPEG bytes. Decodes, converts to RGB, resizes.

A sample that cannot be used raises `Defect`; the writer quarantines and counts it.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pipelines import memory_limit

ImageFile.LOAD_TRUNCATED_IMAGES = False
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")  # not those that start other programs
MAX_PIXELS = 64_000_000  # 8,000 x 8,000; a JPEG of 4 KB can claim 65,535 x 65,535
JPEG_SIDE = 65_500  # pixels; libjpeg's limit
MAX_SCANS = 100  # of a JPEG, each as dear as the whole image; a progressive one has about ten, a bomb thousands
MAX_SEGMENTS = 100_000  # that are looked through for scans
_SEGMENT = re.compile(b"\xff[\x02-\xcf\xd9-\xfe]")  # a marker that a length follows, or the image's end
# What decoding may take beyond the file itself: the largest allowed images take up to 18 bytes per pixel.
DECODING_BYTES, DECODING_BYTES_PER_PIXEL = 512 << 20, 24


class Defect(Exception):
    """A sample that cannot be used; the message is the reason that dataset.json records."""


@dataclass(frozen=True)
class Encoding:
    """How images are stored."""

    name: Literal["npy", "jpeg"]
    quality: int = 95  # of JPEG, 1 to 100
    subsampling: str = "4:2:0"  # of JPEG chroma
    size: int | None = (
        None  # pixels: npy crops to size x size after the shorter side got that length; jpeg keeps the rest
    )
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class Encoded:
    """One stored image with what the index and the statistics need."""

    payload: bytes  # npy: the pixels, without the .npy header; jpeg: the file
    height: int
    width: int
    sums: np.ndarray  # int64 [2, 3]: per channel, the sum of values and of squares over all pixels


def encode(source: np.ndarray | bytes, encoding: Encoding) -> Encoded:
    """Encode one sample: uint8 [H, W, 3], or the bytes of an image file in any format that Pillow reads."""
    if isinstance(source, np.ndarray):
        pixels, original = source, None
    else:
        pixels, original = _decode(source, encoding.max_pixels)
    if encoding.size is not None and (resized := _resize(pixels, encoding)) is not pixels:
        pixels, original = resized, None
    height, width = pixels.shape[:2]
    if encoding.name == "npy":
        payload = np.ascontiguousarray(pixels).tobytes()
    elif original is not None:
        payload = original
    else:
        if max(height, width) > JPEG_SIDE:
            raise Defect(f"{width} x {height} pixels, of which a JPEG holds up to {JPEG_SIDE:,} on a side (--size)")
        buffer = io.BytesIO()
        subsampling = SUBSAMPLINGS[encoding.subsampling]
        Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.quality, subsampling=subsampling)
        payload = buffer.getvalue()
    return Encoded(payload, height, width, _sums(pixels))


def _sums(pixels: np.ndarray) -> np.ndarray:
    """Exact per-channel sums of values and squares, so that mean and std do not depend on the order of samples."""
    histograms = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    values = np.arange(256, dtype=np.int64)
    return np.array([[h @ values for h in histograms], [h @ (values * values) for h in histograms]], np.int64)


def _decode(content: bytes, max_pixels: int) -> tuple[np.ndarray, bytes | None]:
    """RGB pixels [H, W, 3], and the bytes themselves where they are an RGB JPEG that can be stored as it is."""
    if not content:
        raise Defect("empty file")
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS and _has_too_many_scans(content):
        raise Defect(f"a JPEG of more than {MAX_SCANS} scans")
    extra_bytes = DECODING_BYTES + DECODING_BYTES_PER_PIXEL * max_pixels
    try:
        with warnings.catch_warnings(), memory_limit.at_most(extra_bytes):
            warnings.simplefilter("ignore")  # our own limit stands in for Pillow's warning about large images
            Image.MAX_IMAGE_PIXELS = None
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Defect(f"{width} x {height} pixels exceed the limit of {max_pixels:,} (--max-pixels)")
                keep = image.format in ("JPEG", "MPO") and image.mode == "RGB"
                pixels = _rgb(image)
    except Defect:
        raise
    except MemoryError:
        raise Defect(f"cannot be decoded within {extra_bytes >> 20:,} MiB of memory") from None
    except UnidentifiedImageError:  # whose own message holds a memory address
        raise Defect(f"cannot be decoded: no image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises many types on hostile bytes; none may stop a conversion
        raise Defect(f"cannot be decoded ({type(error).__name__}: {error})") from None
    return pixels, content if keep else None


def _has_too_many_scans(content: bytes) -> bool:
    """Of a JPEG: what lies within its segments or behind its end, such as a phone's film of the moment, is no scan."""
    place = scans = 0
    for _ in range(MAX_SEGMENTS):
        if (marker := _SEGMENT.search(content, place)) is None or marker.group() == b"\xff\xd9":
            return False
        scans += marker.group() == b"\xff\xda"
        if scans > MAX_SCANS:
            return True
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return True


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]; transparency is dropped, and 16-bit greyscale scaled, which Pillow would clip at 255."""
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise Defect(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _resize(pixels: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Shorter side to `encoding.size` (bicubic, antialiased); for npy, the central square of it."""
    size = encoding.size or 0
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter != size:
        to = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
        if to[0] * to[1] > encoding.max_pixels:  # a line of pixels grows in both directions
            raise Defect(
                f"resized to {to[0]} x {to[1]} pixels, above the limit of {encoding.max_pixels:,} (--max-pixels)"
            )
        pixels = np.asarray(Image.fromarray(pixels).resize(to, Image.Resampling.BICUBIC))
        height, width = pixels.shape[:2]
    if encoding.name == "npy" and height != width:
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[top : top + size, left : left + size]
    return pixels
