"""The settings of augmentation; see `configs.schema`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from configs.schema.rand_augment import parse_rand_augment
from configs.schema.section import Pair, Section, check_range

POLICIES = (
    "none", "randaugment", "trivialaugment", "autoaugment-imagenet", "autoaugment-cifar10", "autoaugment-svhn",
)  # fmt: skip


class ColorJitterConfig(Section):
    """torchvision's ColorJitter: a strength b draws a factor from [max(0, 1 - b), 1 + b]."""

    brightness: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    contrast: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    saturation: float = Field(default=0.0, ge=0)
    """Strength; 0: off."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the colour circle, drawn from [-hue, hue]; 0: off."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Share of the samples that are jittered at all."""


def color_jitter_section(value: Any) -> Any:
    """One number is the strength of brightness, contrast and saturation (hue stays off); all else is returned as is."""
    if type(value) not in (int, float):
        return value
    return {"brightness": value, "contrast": value, "saturation": value}


def auto_augment_section(value: Any) -> Any:
    """One word is the policy; all else is returned as is."""
    return {"policy": value} if isinstance(value, str) else value


class AutoAugmentConfig(Section):
    """Operations by a policy: RandAugment, TrivialAugment or AutoAugment."""

    policy: str = "none"
    """none; randaugment (arXiv:1909.13719), trivialaugment (its wide space, arXiv:2103.10158), autoaugment-imagenet,
    autoaugment-cifar10 or autoaugment-svhn (arXiv:1805.09501), each as torchvision defines it; or RandAugment as timm
    writes it, such as rand-m9-mstd0.5-inc1."""
    num_ops: int = Field(default=2, ge=1, le=8)
    """Operations per sample, for policy randaugment."""
    magnitude: int = Field(default=9, ge=0)
    """Number of the magnitude bin, counted from 0, for policy randaugment."""
    bins: int = Field(default=31, ge=2, validate_default=True)
    """Magnitude bins, for randaugment and trivialaugment."""
    interpolation: Literal["nearest", "bilinear"] | None = None
    """How shears, shifts and rotations resample; null: bilinear for timm's strings, nearest for the others."""
    fill: Literal["black", "mean"] | None = None
    """What they show outside of the image: black or the data set's mean colour; null: mean for timm's strings, black
    for the others."""

    @field_validator("policy")
    @classmethod
    def _known(cls, policy: str) -> str:
        if policy not in POLICIES:
            parse_rand_augment(policy)  # a ValueError says what is wrong
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
    """Share of the samples that are blurred; 0: off."""
    sigma: Pair = (0.1, 2.0)
    """Smallest and largest standard deviation in pixels."""

    @field_validator("sigma")
    @classmethod
    def _ordered(cls, pair: tuple[float, float]) -> tuple[float, float]:
        return check_range(pair)


class EraseConfig(Section):
    """Random erasing (arXiv:1708.04896): a rectangle is painted over."""

    probability: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples that lose a rectangle; 0: off."""
    scale: Pair = (0.02, 0.33)
    """Smallest and largest share of the image's area."""
    ratio: Pair = (0.3, 3.3)
    """Smallest and largest height / width."""
    fill: Literal["mean", "black", "random"] = "mean"
    """Colour of the rectangle: the data set's mean, black, or drawn from the normal distribution with the data set's
    mean and standard deviation."""

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, pair: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        return check_range(pair, at_most_one=info.field_name == "scale")


class MixConfig(Section):
    """Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899): each sample of a batch is mixed with its neighbour,
    images and labels alike."""

    mixup: float = Field(default=0.0, ge=0)
    """Parameter alpha of the distribution Beta(alpha, alpha) of mixup's share; 0: no mixup."""
    cutmix: float = Field(default=0.0, ge=0)
    """The same for the share that CutMix cuts out; 0: no CutMix."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Probability that anything is mixed."""
    switch_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of CutMix instead of mixup, where both are on."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """Draws are one for all samples of an optimizer step (batch), one for each two neighbours (pair), or one for each
    sample (elem)."""
    off_epoch: int | None = Field(default=None, ge=0)
    """First epoch without mixing; null: all are mixed."""


class AugConfig(Section):
    """Augmentation, in training only; in this order: crop, flip, auto, color_jitter, grayscale, blur, erase, cutout,
    mix."""

    crop: Literal["none", "squash", "pad", "random-resized"] = "none"
    """The central square of the image (none), the whole of it with both sides resized to image_size (squash), a random
    crop of the padded central square (pad), or torchvision's RandomResizedCrop (random-resized)."""
    padding: int = Field(default=4, ge=0)
    """Pixels on each side, for crop: pad; with padding_mode reflect less than the image's side."""
    padding_mode: Literal["constant", "reflect"] = "constant"
    """What the padding holds, for crop: pad: black, or the image mirrored at its edge pixels."""
    scale: Pair = (0.08, 1.0)
    """Smallest and largest share of the image's area, for crop: random-resized."""
    ratio: Pair = (3 / 4, 4 / 3)
    """Smallest and largest width / height, for crop: random-resized."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip; 0: none at all."""
    flip_mode: Literal["random", "alternating"] = "random"
    """Flips are drawn anew in every epoch, or once and then turned over from epoch to epoch (arXiv:2404.00498)."""
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    """One number (brightness, contrast and saturation) or the section."""
    auto: AutoAugmentConfig = AutoAugmentConfig()
    """One word (the policy) or the section."""
    grayscale: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sample loses its colours; 0: off."""
    blur: BlurConfig = BlurConfig()
    """Gaussian blur."""
    erase: EraseConfig = EraseConfig()
    """Random erasing."""
    mix: MixConfig = MixConfig()
    """Mixup and CutMix."""
    cutout: int = Field(default=0, ge=0)
    """Side in pixels of a square inside the image that is painted in the data set's mean colour; 0: off."""

    @field_validator("color_jitter", mode="before")
    @classmethod
    def _number_to_section(cls, value: Any) -> Any:
        section = color_jitter_section(value)
        if not isinstance(section, dict | ColorJitterConfig):
            raise ValueError("must be one number or a section of brightness, contrast, saturation and hue")
        return section

    @field_validator("auto", mode="before")
    @classmethod
    def _word_to_section(cls, value: Any) -> Any:
        section = auto_augment_section(value)
        if not isinstance(section, dict | AutoAugmentConfig):
            raise ValueError("must be the name of a policy or a section")
        return section

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, pair: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        return check_range(pair, at_most_one=info.field_name == "scale")
