"""Convert grayscale images of more than 8 bits to 8 bits.

Pillow clips values at 255, and most files use only a part of the range of their data type. The first of these rules
that applies determines the range of an image:

- The file declares the range: BitsPerSample of a 12-bit TIFF, the maximum of a PGM, or sBIT of a PNG.
- Values within 0..255 are kept. Floating-point images with values up to 1 are an exception: their range may be 0..1 or
  0..255, so it counts as unknown.
- Unsigned 16-bit images with values up to 4095 have 12 bits, as is usual for sensors. Those with larger values have 16.
- The range of all other images (32-bit integers, floating point) is unknown.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # two TIFF tags, and a value of the second


def to_eight_bits(image: Image.Image, content: bytes) -> np.ndarray | None:
    """Convert an image of mode I, I;16 or F to uint8 [H, W]. Return None if the range of the pixel values is unknown.

    `content` is the file that `image` was opened from.
    """
    grey = np.asarray(image)
    low, high = grey.min(), grey.max()
    bits = _declared_bits(image, content, grey)
    if bits is None and image.mode.startswith("I;16") and high > 255:
        bits = 12 if high < 1 << 12 else 16
    if bits is not None:
        grey = grey >> bits - 8 if bits > 8 else grey * 255 // ((1 << bits) - 1)
    elif not (low >= 0 and high <= 255) or (image.mode == "F" and high <= 1):  # the negation is also true for NaN
        return None
    result = (np.rint(grey) if image.mode == "F" else grey).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    return 255 - result if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else result  # Pillow inverts only 8-bit images


def _declared_bits(image: Image.Image, content: bytes, grey: np.ndarray) -> int | None:
    if image.format == "PPM":
        return None if image.mode == "F" else 16  # Pillow has scaled the values by the file's maximum
    if image.format == "TIFF" and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):  # type: ignore[attr-defined]
        return 12
    if image.format != "PNG" or (significant := _significant_bits(content)) is None:
        return None
    # By the PNG standard, the encoder scales samples to 16 bits. The low bits of small values are then 0 or 1. Some
    # writers set sBIT without scaling the samples.
    low_bits = grey & ((1 << (16 - significant)) - 1)
    return significant if grey.max() < 1 << significant and low_bits.max() > 1 else 16


def _significant_bits(png: bytes) -> int | None:
    """Return the number of significant bits (1 to 16) that a grayscale PNG declares, or None if it declares none.

    The number is in the sBIT chunk, which precedes the pixels.
    """
    place = 8
    while (kind := png[place + 4 : place + 8]) and kind != b"IDAT":
        if kind == b"sBIT":
            return png[place + 8] if 1 <= png[place + 8] <= 16 else None
        place += 12 + int.from_bytes(png[place : place + 4], "big")
    return None
