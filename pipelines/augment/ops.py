"""Names the operations of augmentation programs: what an operation is called, and what its one value means.

A program is what is done to the pixels of one sample after crop and flip: one operation in each of a fixed number of
slots, in their order. For a batch it is two arrays, `ops` int32 [B, slots] (numbers of `Op`) and `values` float32
[B, slots]. `policies` draws programs, `dali_ops` runs them in DALI, `program_kernels` on the CPU. Values are what
torchvision's functional operations take (transforms.v2.functional), on uint8 images of the size that training sees;
`tests` hold both to them. Knows no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Op(IntEnum):
    """Name = number; its value; torchvision's function."""

    IDENTITY = 0  # no value
    SHEAR_X = 1  # tangent of the angle about the top-left corner; affine(shear=[degrees(atan(v)), 0], center=[0, 0])
    SHEAR_Y = 2  # the same; affine(shear=[0, degrees(atan(v))], center=[0, 0])
    TRANSLATE_X = 3  # whole pixels to the right; affine(translate=[value, 0])
    TRANSLATE_Y = 4  # whole pixels down; affine(translate=[0, value])
    ROTATE = 5  # degrees counter-clockwise about the centre, keeping the size; rotate
    BRIGHTNESS = 6  # factor; adjust_brightness
    COLOR = 7  # factor; adjust_saturation
    CONTRAST = 8  # factor, about the mean grey of the image; adjust_contrast
    SHARPNESS = 9  # factor; adjust_sharpness
    POSTERIZE = 10  # bits that are kept, 0 to 8; posterize
    SOLARIZE = 11  # threshold 0 to 256: pixels at or above it are inverted; solarize
    SOLARIZE_ADD = 12  # 0 to 128, added to pixels below 128; none of torchvision's, timm's solarize_add
    AUTO_CONTRAST = 13  # no value; autocontrast
    EQUALIZE = 14  # no value; equalize
    INVERT = 15  # no value; invert
    HUE = 16  # shift as a share of the circle, -0.5 to 0.5; adjust_hue
    GRAYSCALE = 17  # no value; rgb_to_grayscale(num_output_channels=3)
    BLUR = 18  # standard deviation in pixels; gaussian_blur with the kernel size of `blur_radius`


GEOMETRIC = frozenset({Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE})
SlotOps = tuple[frozenset[Op], ...]  # of each slot, the operations that may stand there, IDENTITY aside


def blur_radius(largest_sigma: float) -> int:
    """Pixels on each side that a blur of at most this standard deviation looks at; the kernel has 2 * radius + 1."""
    return max(1, round(3 * largest_sigma))


def grey_levels(mean: Sequence[float]) -> tuple[int, int, int]:
    """A colour of three shares from 0 to 1, such as the data set's mean, in whole grey levels: red, green, blue."""
    red, green, blue = (round(255 * share) for share in mean)
    return red, green, blue


@dataclass(frozen=True)
class Programs:
    """What all programs of a run have in common."""

    slots: SlotOps
    bilinear: bool  # how GEOMETRIC operations resample; else the nearest pixel
    fill: tuple[int, int, int]  # grey levels, red green blue, that they show outside of the image
    radius: int  # of BLUR, see `blur_radius`
