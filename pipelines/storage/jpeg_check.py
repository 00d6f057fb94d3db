"""What counts as a stored JPEG file that cannot be decoded. Knows opened splits, no graphs.

A header is looked at before anything is made of its size: the index says which size that is, and one that claims
65,000 x 65,000 pixels would else cost 12 GB.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

UNDECODABLE = "cannot be decoded"
ImageSize = tuple[int, int]  # height, width, pixels


def header_error(file: np.ndarray, sides: ImageSize) -> str | None:
    """What is wrong with a file whose image should have these sides, as far as its header says; decodes nothing."""
    try:
        claimed = simplejpeg.decode_jpeg_header(file)[:2]
    except ValueError:  # also for a way to store colours that libjpeg-turbo has no name for
        try:
            with _open_jpeg(file) as image:
                claimed = image.height, image.width
        except MemoryError:
            raise
        except Exception:  # Pillow raises many types on damaged bytes
            return UNDECODABLE
    if claimed == sides:
        return None
    return f"has {claimed[0]:,} x {claimed[1]:,} pixels where the index says {sides[0]:,} x {sides[1]:,}"


def decode_with_pillow(file: np.ndarray, sides: ImageSize) -> np.ndarray | None:
    """uint8 [H, W, 3]; None where Pillow cannot decode it, or it is of other sides, of which it then makes nothing."""
    try:
        with _open_jpeg(file) as image:
            return np.asarray(image.convert("RGB")) if (image.height, image.width) == sides else None
    except MemoryError:
        raise
    except Exception:  # as above
        return None


def _open_jpeg(file: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(file.tobytes()), formats=["JPEG"])
