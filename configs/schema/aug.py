"""Augmentation settings."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from configs.schema.rand_augment import parse_rand_augment
from configs.schema.section import IsCode, Range, Section, ShareRange
from configs.utils.code import FORMS, is_reference

POLICIES = (
    "none",
    "randaugment",
    "trivialaugment",
    "autoaugment-imagenet",
    "autoaugment-cifar10",
    "autoaugment-svhn",
)


class ColorJitterConfig(Section):
    """Color jitter as in torchvision's ColorJitter.

    Brightness, contrast and saturation factors are drawn from [max(0, 1 - strength), 1 + strength].
    """

    brightness: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    contrast: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    saturation: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Maximum hue shift as a share of the color circle; shifts are drawn from [-hue, hue]; 0: off."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Probability that a sample is jittered."""


def color_jitter_section(value: object) -> object:
    """Expand a number to a section with this strength of brightness, contrast and saturation.

    Return other values unchanged.
    """
    if type(value) not in (int, float):
        return value
    return {"brightness": value, "contrast": value, "saturation": value}


def auto_augment_section(value: object) -> object:
    """Expand a policy name to a section. Return other values unchanged."""
    return {"policy": value} if isinstance(value, str) else value


class AutoAugmentConfig(Section):
    """Operations drawn by a policy: RandAugment, TrivialAugment or AutoAugment."""

    policy: str = "none"
    """none; randaugment (arXiv:1909.13719), trivialaugment (wide space, arXiv:2103.10158), autoaugment-imagenet,
    autoaugment-cifar10 or autoaugment-svhn (arXiv:1805.09501), as defined by torchvision; or a timm RandAugment string
    such as rand-m9-mstd0.5-inc1."""
    num_ops: int = Field(default=2, ge=1, le=8)
    """Operations per sample, for the randaugment policy."""
    magnitude: int = Field(default=9, ge=0)
    """Magnitude bin, counted from 0, for the randaugment policy."""
    bins: int = Field(default=31, ge=2, validate_default=True)
    """Number of magnitude bins, for the randaugment and trivialaugment policies."""
    interpolation: Literal["nearest", "bilinear"] | None = None
    """Resampling of shears, translations and rotations; null: bilinear for timm strings, nearest for other policies."""
    fill: Literal["black", "mean"] | None = None
    """Color of pixels from outside the image: black, or the data set's mean; null: mean for timm strings, black for
    other policies."""

    @field_validator("policy")
    @classmethod
    def _known(cls, policy: str) -> str:
        if policy not in POLICIES:
            parse_rand_augment(policy)  # raises ValueError
        return policy

    @field_validator("bins")
    @classmethod
    def _holds_magnitude(cls, bins: int, info: ValidationInfo) -> int:
        if info.data.get("magnitude", 0) >= bins:
            raise ValueError(f"must exceed aug.auto.magnitude={info.data['magnitude']}")
        return bins


class BlurConfig(Section):
    """Gaussian blur."""

    probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sample is blurred; 0: off."""
    sigma: Range = (0.1, 2.0)
    """Minimum and maximum standard deviation in pixels."""


class EraseConfig(Section):
    """Random erasing (arXiv:1708.04896) of a rectangle."""

    probability: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle of a sample is erased; 0: off."""
    scale: ShareRange = (0.02, 0.33)
    """Minimum and maximum share of the image's area."""
    ratio: Range = (0.3, 3.3)
    """Minimum and maximum height / width."""
    fill: Literal["mean", "black", "random"] = "mean"
    """Fill of the rectangle: the data set's mean color (mean), black, or one color per sample, drawn from the normal
    distribution with the data set's mean and standard deviation (random)."""


class MixConfig(Section):
    """Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899).

    Samples 2i and 2i + 1 of a batch are neighbors. The image and label of each sample are mixed with its neighbor's.
    """

    mixup: float = Field(default=0.0, ge=0)
    """Alpha of the Beta(alpha, alpha) distribution of the mixing weight, for mixup; 0: no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """Alpha of the Beta(alpha, alpha) distribution of the area share, for CutMix; 0: no CutMix."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Probability of mixing; decided as often as the other mixing parameters are drawn (see mode)."""
    switch_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of CutMix instead of mixup, if both are enabled."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw mixing parameters once for all samples of an optimizer step (batch), for each pair of neighbors (pair), or
    for each sample (elem)."""
    off_epoch: int | None = Field(default=None, ge=0)
    """First epoch without mixing; null: mix in all epochs."""


class PaddingMode(str, Enum):
    """Content of the padding of a crop."""

    CONSTANT = "constant"  # black
    REFLECT = "reflect"  # the image mirrored at its edge pixels, which are not repeated


class AugConfig(Section):
    """Augmentation, in training only.

    Applied in this order: crop, flip, auto, color_jitter, grayscale, blur, erase, cutout, custom, mix.
    """

    crop: Literal["none", "squash", "pad", "random-resized"] = "none"
    """Central square of the image (none), the whole image resized to image_size x image_size (squash), a random crop of
    the padded central square (pad), or torchvision's RandomResizedCrop (random-resized)."""
    padding: int = Field(default=4, ge=0)
    """Padding in pixels on each side, for the pad crop; with padding_mode reflect, it must be less than image_size."""
    padding_mode: Annotated[PaddingMode, Field(strict=False)] = PaddingMode.CONSTANT
    """Content of the padding, for the pad crop: black (constant), or the image mirrored at its edge pixels
    (reflect)."""
    scale: ShareRange = (0.08, 1.0)
    """Minimum and maximum share of the image's area, for the random-resized crop."""
    ratio: Range = (3 / 4, 4 / 3)
    """Minimum and maximum width / height, for the random-resized crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip; 0: off."""
    flip_mode: Literal["random", "alternating"] = "random"
    """Draw flips independently in every epoch (random), or draw them once and invert them in every other epoch
    (alternating, arXiv:2404.00498)."""
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    """One number (strength of brightness, contrast and saturation), or the section."""
    auto: AutoAugmentConfig = AutoAugmentConfig()
    """Name of the policy, or the section."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sample is converted to grayscale; 0: off."""
    blur: BlurConfig = BlurConfig()
    """Gaussian blur."""
    erase: EraseConfig = EraseConfig()
    """Random erasing."""
    mix: MixConfig = MixConfig()
    """Mixup and CutMix."""
    cutout: int = Field(default=0, ge=0)
    """Height and width in pixels of a randomly placed square to fill with the data set's mean color; 0: off."""

    custom: Annotated[str | None, IsCode] = None
    """path/to/file.py:NAME or package.module:NAME of your own function (images, generator) -> images, for each batch
    on its device: uint8 [B, 3, H, W]. Its draws depend on the number of ranks; null: off."""

    @field_validator("custom")
    @classmethod
    def _names_code(cls, custom: str | None) -> str | None:
        if custom is not None and not is_reference(custom):
            raise ValueError(f"must be your own function as {FORMS}, e.g. my_augment.py:cutout")
        return custom

    @field_validator("color_jitter", "auto", mode="before")
    @classmethod
    def _expand_shorthand(cls, value: object, info: ValidationInfo) -> object:
        is_jitter = info.field_name == "color_jitter"
        section = color_jitter_section(value) if is_jitter else auto_augment_section(value)
        if not isinstance(section, dict | Section):
            single = "one number or a section of brightness, contrast, saturation and hue"
            raise ValueError(f"must be {single if is_jitter else 'the name of a policy or a section'}")
        return section
