"""Check that stored JPEG files can be decoded and have the image size that the index gives.

The header is compared with the index before memory for the pixels is allocated. A damaged header may claim
65,000 x 65,000 pixels, which take 12 GB.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

UNDECODABLE = "cannot be decoded"
Result = TypeVar("Result")
ImageSize = tuple[int, int]  # height and width in pixels


def header_error(file: np.ndarray, sides: ImageSize) -> str | None:
    """Describe what is wrong with the header of a JPEG file, or return None if it is valid and matches the index.

    Args:
        file: Content of the file, uint8 [bytes].
        sides: Height and width in pixels according to the index.
    """
    claimed = _read_with_pillow(file, lambda image: (image.height, image.width))
    if claimed is None:
        return UNDECODABLE
    if claimed == sides:
        return None
    return f"has {claimed[0]:,} x {claimed[1]:,} pixels where the index says {sides[0]:,} x {sides[1]:,}"


def decode_with_pillow(file: np.ndarray, sides: ImageSize) -> np.ndarray | None:
    """Decode a JPEG file, uint8 [bytes], to RGB, uint8 [H, W, 3].

    Return None if Pillow cannot decode the file, or if the height and width of the image differ from `sides`.
    """
    return _read_with_pillow(
        file, lambda image: np.asarray(image.convert("RGB")) if (image.height, image.width) == sides else None
    )


def _read_with_pillow(file: np.ndarray, read: Callable[[Image.Image], Result]) -> Result | None:
    """Return what `read` returns for the opened JPEG file, or None if Pillow cannot read the file."""
    try:
        with Image.open(io.BytesIO(file.tobytes()), formats=["JPEG"]) as image:
            return read(image)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many exception types on damaged bytes
        return None
