"""Operations of augmentation programs, and the meaning of their values.

A program is the list of operations that are applied to one sample after crop and flip. It has one operation per slot,
and all programs of a run have the same number of slots. The programs of a batch are two arrays: `ops`, int32 [B,
slots], holds members of `Op`, and `values`, float32 [B, slots], holds their values for uint8 images of the training
size. `policies` draws programs; `gpu.dali_ops` runs them in DALI and `cpu.programs` on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Op(IntEnum):
    """Augmentation operations.

    Each comment gives the meaning of the operation's value, then the matching function in
    torchvision.transforms.v2.functional.
    """

    IDENTITY = 0  # no value
    SHEAR_X = 1  # tangent of the angle about the top-left corner; affine(shear=[degrees(atan(v)), 0], center=[0, 0])
    SHEAR_Y = 2  # tangent of the angle about the top-left corner; affine(shear=[0, degrees(atan(v))], center=[0, 0])
    TRANSLATE_X = 3  # whole pixels to the right; affine(translate=[value, 0])
    TRANSLATE_Y = 4  # whole pixels down; affine(translate=[0, value])
    ROTATE = 5  # degrees counter-clockwise about the center, keeping the image size; rotate
    BRIGHTNESS = 6  # factor; adjust_brightness
    COLOR = 7  # factor; adjust_saturation
    CONTRAST = 8  # factor, about the mean gray of the image; adjust_contrast
    SHARPNESS = 9  # factor; adjust_sharpness
    POSTERIZE = 10  # bits to keep, 0 to 8; posterize
    SOLARIZE = 11  # threshold, 0 to 256: pixels at or above it are inverted; solarize
    SOLARIZE_ADD = 12  # 0 to 128, added to pixels below 128; timm's solarize_add, not in torchvision
    AUTO_CONTRAST = 13  # no value; autocontrast
    EQUALIZE = 14  # no value; equalize
    INVERT = 15  # no value; invert
    HUE = 16  # shift as a share of the circle, -0.5 to 0.5; adjust_hue
    GRAYSCALE = 17  # no value; rgb_to_grayscale(num_output_channels=3)
    BLUR = 18  # standard deviation in pixels; gaussian_blur with the kernel size of `blur_radius`


GEOMETRIC = frozenset({Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.ROTATE})
SlotOps = tuple[frozenset[Op], ...]  # possible operations of each slot, in addition to IDENTITY


def blur_radius(largest_sigma: float) -> int:
    """Return the kernel radius for blurs with standard deviations up to `largest_sigma`, both in pixels.

    The kernel has 2 * radius + 1 pixels.
    """
    return max(1, round(3 * largest_sigma))


def grey_levels(mean: Sequence[float]) -> tuple[int, int, int]:
    """Convert an RGB color from floats in 0..1 to integers in 0..255."""
    red, green, blue = (round(255 * share) for share in mean)
    return red, green, blue


@dataclass(frozen=True)
class Programs:
    """Settings shared by all augmentation programs of a run."""

    slots: SlotOps
    bilinear: bool  # whether GEOMETRIC operations interpolate; otherwise they take the nearest pixel
    fill: tuple[int, int, int]  # RGB color outside the image, 0 to 255
    radius: int  # kernel radius of BLUR, see `blur_radius`
