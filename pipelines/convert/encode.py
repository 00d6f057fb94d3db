"""Decode one source sample, convert it to RGB, resize it, and encode it for a shard as raw pixels (npy) or JPEG.

An unusable sample raises `Defect`. Unless `Options.strict` is set, the conversion leaves such samples out and lists
them in dataset.json.
"""

from __future__ import annotations

import io
import warnings
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from pipelines import jpeg_format, memory_limit
from pipelines.convert import greyscale, stderr_capture
from pipelines.convert.source import SUBSAMPLINGS, Encoding

ImageFile.LOAD_TRUNCATED_IMAGES = False
# Formats that Pillow decodes without starting other programs. Pillow opens an MPO as JPEG. The extensions are listed in
# tools/sources/folder_scan.py.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "PPM", "GIF", "TIFF")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_MESSAGE = 150  # maximum number of characters of libtiff's message in a reason
JPEG_SIDE = 65_500  # pixels; libjpeg's limit
EXIF_ORIENTATION = 0x0112  # tag; 1 is upright
ROTATED = "rotated by its EXIF orientation"  # reason to re-encode
# Memory for decoding, in addition to the file: the largest allowed images take up to 18 bytes per pixel.
DECODING_BYTES, DECODING_BYTES_PER_PIXEL = 512 << 20, 24


class Defect(Exception):
    """Raised for an unusable sample. The message is the reason recorded in dataset.json."""


@dataclass(frozen=True)
class Encoded:
    """One encoded image, with the values that the index and the data set's statistics need."""

    payload: bytes  # npy: pixels without the .npy header; jpeg: the file
    height: int
    width: int
    sums: np.ndarray  # int64 [2, 3]: per-channel sums of the values and of their squares over all pixels
    reencoded: str | None = None  # reason a file was re-encoded to jpeg, or None if it was not


def encode(source: np.ndarray | bytes, encoding: Encoding) -> Encoded:
    """Encode one sample.

    With the jpeg encoding, a JPEG file is stored byte for byte if it needs no resizing, is RGB or grayscale, and uses
    no feature that decoders handle differently (see `jpeg_format.inspect`).

    Args:
        source: Pixels, uint8 [H, W, 3], or the bytes of an image file in one of `FORMATS`.
        encoding: Storage format.

    Raises:
        Defect: The sample cannot be decoded or encoded, or exceeds a limit on size or memory.
    """
    changed: str | None = "pixels"  # reason the source bytes cannot be stored unchanged
    if isinstance(source, np.ndarray):
        pixels = source
    else:
        pixels, changed = _decode(source, encoding)
    if encoding.size is not None and (resized := _resize(pixels, encoding)) is not pixels:
        pixels, changed = resized, changed or "resized"
    height, width = pixels.shape[:2]
    if encoding.name == "npy":
        payload = np.ascontiguousarray(pixels).tobytes()
    elif changed is None and isinstance(source, bytes):
        payload = source
    else:
        if max(height, width) > JPEG_SIDE:
            raise Defect(f"{width} x {height} pixels, but a JPEG has at most {JPEG_SIDE:,} per side (option size)")
        buffer = io.BytesIO()
        subsampling = SUBSAMPLINGS[encoding.subsampling]
        Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.quality, subsampling=subsampling)
        payload = buffer.getvalue()
    is_file = encoding.name == "jpeg" and isinstance(source, bytes)
    return Encoded(payload, height, width, _sums(pixels), changed if is_file else None)


def _sums(pixels: np.ndarray) -> np.ndarray:
    """Return the per-channel sums of the values and of their squares: int64 [2, 3].

    The sums are exact, so mean and std do not depend on the order in which samples are added.
    """
    histograms = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    values = np.arange(256, dtype=np.int64)
    return np.array([[h @ values for h in histograms], [h @ (values * values) for h in histograms]], np.int64)


def _decode(content: bytes, encoding: Encoding) -> tuple[np.ndarray, str | None]:
    """Decode an image file, and rotate it if `encoding.orientation` says so.

    Returns:
        A tuple (pixels, reason). `pixels` are RGB, uint8 [H, W, 3]. `reason` says why the file cannot be stored
        unchanged as a JPEG, or is None if it can.

    Raises:
        Defect: The file cannot be decoded, or exceeds a limit on size or memory.
    """
    if not content:
        raise Defect("empty file")
    scans, reason = jpeg_format.inspect(content) if content.startswith(b"\xff\xd8") else (0, None)
    if scans > jpeg_format.MAX_SCANS:
        raise Defect(f"a JPEG of more than {jpeg_format.MAX_SCANS} scans")
    max_pixels = encoding.max_pixels
    extra_bytes = DECODING_BYTES + DECODING_BYTES_PER_PIXEL * max_pixels
    messages: list[str] = []  # lines printed by libtiff
    try:
        with warnings.catch_warnings(), memory_limit.at_most(extra_bytes), ExitStack() as captured:
            if content.startswith(TIFF_MAGIC):
                captured.enter_context(stderr_capture.capture_stderr(messages))
            warnings.simplefilter("ignore")  # max_pixels replaces Pillow's own limit
            Image.MAX_IMAGE_PIXELS = None
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise Defect(f"{width} x {height} pixels exceed the limit of {max_pixels:,} (--max-pixels)")
                kind = "JPEG" if image.format == "MPO" else image.format  # a JPEG followed by further images
                if kind != "JPEG":
                    reason = kind
                elif reason is not None or image.mode not in ("RGB", "L"):
                    reason = f"JPEG {reason or f'of mode {image.mode}'}"
                pixels = _rgb(image, content)
                if encoding.orientation == "apply" and (number := _orientation(image)) in range(2, 9):
                    pixels, reason = _rotate(pixels, number), reason or ROTATED
    except Defect:
        raise
    except MemoryError:
        raise Defect(f"cannot be decoded within {extra_bytes >> 20:,} MiB of memory") from None
    except UnidentifiedImageError:  # its own message contains a memory address
        if content.startswith(TIFF_MAGIC):
            raise Defect(
                "cannot be decoded: a broken TIFF, or one whose bits per sample, sample format or colours Pillow does "
                "not read; save it with 8 or 16 bits"
            ) from None
        raise Defect(f"cannot be decoded: not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises many exception types for malformed files; none may end a conversion
        said = f"; {messages[-1][:MAX_MESSAGE]}" if messages else ""
        raise Defect(f"cannot be decoded ({type(error).__name__}: {error}{said})") from None
    return pixels, reason


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation of a decoded image, or 1 if it has none or its EXIF data are damaged.

    Pillow has already rotated a TIFF, and gives 1.
    """
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # the pixels are intact
        return 1


def _rotate(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an image [H, W, 3] upright, for an EXIF orientation from 2 to 8."""
    if orientation >= 5:  # the stored rows are columns
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _rgb(image: ImageFile.ImageFile, content: bytes) -> np.ndarray:
    """Convert an image to RGB, uint8 [H, W, 3]. Transparency is dropped.

    `content` is the file that `image` was opened from.

    Raises:
        Defect: The range of the pixel values is unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        if (grey := greyscale.to_eight_bits(image, content)) is None:
            raise Defect(f"pixels of mode {image.mode!r} have no known range; save it with 8 or 16 bits")
        return np.repeat(grey[..., None], 3, axis=2)
    is_wide = ";16" in str(image.tile[:1])  # 16-bit color; Pillow keeps the upper bytes
    opened = image.convert("LA") if image.mode == "La" else image  # Pillow converts La to LA only
    pixels = np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))
    if is_wide and pixels.max() < 1 << 4:  # the upper bytes of 12 bits
        raise Defect("16-bit colours within 0..4095 have no known range; save it with 8 bits")
    return pixels


def _resize(pixels: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Resize the shorter side to `encoding.size` pixels (bicubic, antialiased). For npy, crop the central square.

    If neither is needed, return `pixels` itself.

    Raises:
        Defect: The resized image would exceed `encoding.max_pixels`.
    """
    size = encoding.size or 0
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if shorter != size:
        to = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
        if to[0] * to[1] > encoding.max_pixels:  # a one-pixel line grows in both directions
            raise Defect(
                f"resized to {to[0]} x {to[1]} pixels, above the limit of {encoding.max_pixels:,} (--max-pixels)"
            )
        pixels = np.asarray(Image.fromarray(pixels).resize(to, Image.Resampling.BICUBIC))
        height, width = pixels.shape[:2]
    if encoding.name == "npy" and height != width:
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[top : top + size, left : left + size]
    return pixels
