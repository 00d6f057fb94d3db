"""CPU operations against torchvision's on the same uint8 photos, alone and in programs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from helpers.threads import THREADS, at_once
from pipelines.augment.ops import GEOMETRIC, Op
from pipelines.cpu.programs import apply_programs, paint

PHOTOS = load_sample_images().images
BLACK, PAINT = (0, 0, 0), (124, 116, 104)
RADIUS = 6
SIDES = [32, 33, 96]
FACTORS = [0.0, 0.1, 0.5, 0.99, 1.0, 1.27, 1.9, 5.0]
SHEARS = [-0.99, -0.3, -0.09, 0.0, 0.17, 0.3]
SHIFTS = [-200.0, -40.0, -3.0, 0.0, 5.0, 31.0, 32.0]
VALUES: dict[Op, list[float]] = {
    Op.IDENTITY: [0],
    Op.SHEAR_X: SHEARS,
    Op.SHEAR_Y: SHEARS,
    Op.TRANSLATE_X: SHIFTS,
    Op.TRANSLATE_Y: SHIFTS,
    Op.ROTATE: [-180, -136.3, -29.7, -9, 0, 0.5, 17.3, 90, 134.2, 270],
    Op.BRIGHTNESS: FACTORS,
    Op.COLOR: FACTORS,
    Op.CONTRAST: FACTORS,
    Op.SHARPNESS: FACTORS,
    Op.POSTERIZE: [*range(9)],
    Op.SOLARIZE: [0, 1, 77.5, 128, 255],
    Op.SOLARIZE_ADD: [0, 1, 57, 128],
    Op.AUTO_CONTRAST: [0],
    Op.EQUALIZE: [0],
    Op.INVERT: [0],
    Op.HUE: [-0.5, -0.1, -0.01, 0, 0.07, 0.3, 0.5],
    Op.GRAYSCALE: [0],
    Op.BLUR: [0.1, 0.3, 0.7, 1.3, 2.0],
}
# No value maps a pixel halfway between two pixels: rounding errors would decide which one torch takes.
# Largest share of values that may differ by one grey level, for operations with another order of float32 sums.
ROUNDED = {Op.HUE: 0.001, Op.BLUR: 0.001}
BILINEAR_ROUNDED = 0.03


def photos(side: int, count: int = 8, seed: int = 0) -> np.ndarray:
    """Return crops of scikit-learn's two photographs, some subsampled: uint8 [count, side, side, 3]."""
    random, parts = np.random.default_rng(seed), []
    for number in range(count):
        step = 1 + number % 4
        photo = PHOTOS[number % len(PHOTOS)][::step, ::step]
        top, left = (random.integers(0, length - side + 1) for length in photo.shape[:2])
        parts.append(photo[top : top + side, left : left + side])
    return np.stack(parts)


def run(
    images: np.ndarray,
    ops: np.ndarray,
    values: np.ndarray,
    bilinear: bool = False,
    fill: tuple[int, int, int] = BLACK,
    radius: int = RADIUS,
) -> np.ndarray:
    out = images.copy()
    apply_programs(out, ops.astype(np.int32), values.astype(np.float32), bilinear, np.array(fill, np.uint8), radius)
    return out


def apply(images: np.ndarray, op: Op, value: float, bilinear: bool = False, radius: int = RADIUS) -> np.ndarray:
    """Apply one operation to all images."""
    shape = (len(images), 1)
    return run(images, np.full(shape, int(op)), np.full(shape, value), bilinear, radius=radius)


def torchvisions(images: np.ndarray, op: Op, value: float, bilinear: bool = False) -> np.ndarray:
    """Apply torchvision's operation, with the value rounded to float32."""
    value = float(np.float32(value))
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.NEAREST

    def affine(image: torch.Tensor, shift: tuple[float, float], shear: tuple[float, float]) -> torch.Tensor:
        degrees = [math.degrees(math.atan(tangent)) for tangent in shear]
        center = [0, 0] if any(shear) else None
        return F.affine(image, 0, [int(pixels) for pixels in shift], 1.0, degrees, mode, center=center)

    functions: dict[Op, Callable[[torch.Tensor], torch.Tensor]] = {
        Op.IDENTITY: lambda image: image,
        Op.SHEAR_X: lambda image: affine(image, (0, 0), (value, 0)),
        Op.SHEAR_Y: lambda image: affine(image, (0, 0), (0, value)),
        Op.TRANSLATE_X: lambda image: affine(image, (value, 0), (0, 0)),
        Op.TRANSLATE_Y: lambda image: affine(image, (0, value), (0, 0)),
        Op.ROTATE: lambda image: F.rotate(image, value, mode),
        Op.BRIGHTNESS: lambda image: F.adjust_brightness(image, value),
        Op.COLOR: lambda image: F.adjust_saturation(image, value),
        Op.CONTRAST: lambda image: F.adjust_contrast(image, value),
        Op.SHARPNESS: lambda image: F.adjust_sharpness(image, value),
        Op.POSTERIZE: lambda image: F.posterize(image, int(value)),
        Op.SOLARIZE: lambda image: F.solarize(image, value),
        Op.AUTO_CONTRAST: F.autocontrast,
        Op.EQUALIZE: F.equalize,
        Op.INVERT: F.invert,
        Op.HUE: lambda image: F.adjust_hue(image, value),
        Op.GRAYSCALE: lambda image: F.rgb_to_grayscale(image, 3),
        Op.BLUR: lambda image: F.gaussian_blur(image, [2 * RADIUS + 1] * 2, [value] * 2),
    }
    if op is Op.SOLARIZE_ADD:
        changed = [auto_augment.solarize_add(Image.fromarray(image), int(value)) for image in images]
        return np.stack([np.asarray(image) for image in changed])
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return torch.stack([functions[op](image) for image in planes]).permute(0, 2, 3, 1).numpy()


def assert_same_but_for_rounding(first: np.ndarray, second: np.ndarray, share: float) -> None:
    difference = np.abs(first.astype(int) - second)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


def every_value(ops: frozenset[Op] | set[Op]) -> list[tuple[Op, float]]:
    return [(op, value) for op, values in VALUES.items() if op in ops for value in values]


def test_all_operations_are_tested() -> None:
    assert VALUES.keys() == set(Op)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("op", [op for op in Op if op not in ROUNDED], ids=lambda op: op.name)
def test_operations_equal_torchvision_bitwise(op: Op, side: int) -> None:
    images = photos(side)
    for value in VALUES[op]:
        assert np.array_equal(apply(images, op, value), torchvisions(images, op, value)), value


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("op", ROUNDED, ids=lambda op: op.name)
def test_hue_and_blur_equal_torchvision_up_to_rounding(op: Op, side: int) -> None:
    images = photos(side)
    for value in VALUES[op]:
        assert_same_but_for_rounding(apply(images, op, value), torchvisions(images, op, value), ROUNDED[op])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("op", sorted(GEOMETRIC), ids=lambda op: op.name)
def test_bilinear_warps_equal_torchvision_up_to_rounding(op: Op, side: int) -> None:
    images = photos(side)
    for value in VALUES[op]:
        expected = torchvisions(images, op, value, bilinear=True)
        assert_same_but_for_rounding(apply(images, op, value, bilinear=True), expected, BILINEAR_ROUNDED)


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize(("op", "value"), every_value(GEOMETRIC))
def test_fill_appears_outside_of_image(op: Op, value: float, bilinear: bool) -> None:
    images, shape = photos(32, 4), (4, 1)
    ops, values = np.full(shape, int(op)), np.full(shape, value)
    # The fill's share of each pixel is the level that a white image loses on black.
    white = run(np.full_like(images, 255), ops, values, bilinear).astype(float) / 255
    expected = run(images, ops, values, bilinear) + (1 - white) * np.array(PAINT)
    assert np.abs(run(images, ops, values, bilinear, PAINT) - expected).max() <= (1.5 if bilinear else 0)


def test_solarize_threshold_256_changes_nothing() -> None:
    images = photos(32)
    assert np.array_equal(apply(images, Op.SOLARIZE, 256), images)


@pytest.mark.parametrize(("op", "value"), every_value(set(Op)))
def test_images_of_few_levels_equal_torchvision(op: Op, value: float) -> None:
    levels = [0, 1, 127, 128, 254, 255]
    flat = np.stack([np.full((14, 14, 3), level) for level in levels]).astype(np.uint8)
    board = np.where(np.indices((14, 14)).sum(0)[..., None] % 2 == 0, 0, np.array([255, 0, 7])).astype(np.uint8)
    images = np.concatenate([flat, board[None]])
    assert_same_but_for_rounding(apply(images, op, value), torchvisions(images, op, value), ROUNDED.get(op, 0))


def test_identity_is_exact() -> None:
    images, shape = photos(33), (8, 3)
    assert np.array_equal(run(images, np.zeros(shape), np.full(shape, 7.0)), images)


@pytest.mark.parametrize("bilinear", [False, True])
def test_neutral_values_change_nothing(bilinear: bool) -> None:
    images = photos(33)
    nothing = dict.fromkeys(GEOMETRIC, 0.0) | dict.fromkeys((Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS), 1.0)
    nothing |= {Op.POSTERIZE: 8, Op.SOLARIZE: 256, Op.SOLARIZE_ADD: 0, Op.BLUR: 0.05}
    for op, value in nothing.items():
        assert np.array_equal(apply(images, op, value, bilinear), images), op.name


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("bilinear", [False, True])
def test_tiny_images_write_nothing_outside(side: int, bilinear: bool) -> None:
    size = side * side * 3
    for op, value in every_value(set(Op)):
        memory = np.full(size + 2 * 64, 77, np.uint8)
        image = memory[64 : 64 + size].reshape(1, side, side, 3)
        image[:] = photos(side, 1)
        before = image.copy()
        ops, values = np.array([[op]], np.int32), np.array([[value]], np.float32)
        apply_programs(image, ops, values, bilinear, np.zeros(3, np.uint8), RADIUS)
        assert (memory[:64] == 77).all(), op.name
        assert (memory[64 + size :] == 77).all(), op.name
        if op is not Op.BLUR:  # torch's reflection needs more pixels than the kernel's radius
            share = 1 if bilinear and op in GEOMETRIC else ROUNDED.get(op, 0)
            assert_same_but_for_rounding(image, torchvisions(before, op, value, bilinear), share)


def test_blur_of_tiny_image_keeps_its_mean() -> None:
    for side in (1, 2, 3):
        flat = np.full((1, side, side, 3), 200, np.uint8)
        assert np.array_equal(apply(flat, Op.BLUR, 2.0), flat)


def random_programs(count: int, slots: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return random operations with random values: ops and values [count, slots]."""
    random, choices = np.random.default_rng(seed), every_value(set(Op))
    drawn = random.integers(0, len(choices), (count, slots))
    ops = np.array([int(op) for op, _ in choices])[drawn]
    return ops, np.array([value for _, value in choices], np.float32)[drawn]


def test_program_equals_its_operations_in_sequence() -> None:
    images = photos(32, 200)
    ops, values = random_programs(200, 4)
    expected = images
    for slot in range(4):
        expected = run(expected, ops[:, slot : slot + 1], values[:, slot : slot + 1])
    assert np.array_equal(run(images, ops, values), expected)


def test_programs_equal_torchvision_up_to_rounding() -> None:
    images = photos(32, 60)
    ops, values = random_programs(60, 2)
    for image, own_ops, own_values, found in zip(images, ops, values, run(images, ops, values), strict=True):
        expected = image[None]
        for op, value in zip(own_ops, own_values, strict=True):
            expected = torchvisions(expected, Op(op), float(value))
        difference = np.abs(found.astype(int) - expected[0])
        assert difference.mean() < 0.1, (own_ops, own_values)


@pytest.mark.parametrize("bilinear", [False, True])
def test_pixels_are_independent_of_batch(bilinear: bool) -> None:
    images = photos(33, 100)
    ops, values = random_programs(100, 3)
    whole = run(images, ops, values, bilinear)
    order = np.random.default_rng(2).permutation(100)
    assert np.array_equal(run(images[order], ops[order], values[order], bilinear), whole[order])
    alone = [run(images[i : i + 1], ops[i : i + 1], values[i : i + 1], bilinear)[0] for i in range(100)]
    assert np.array_equal(alone, whole)


def test_concurrent_threads_give_same_pixels() -> None:
    images = photos(32, 400)
    ops, values = random_programs(400, 3)
    expected = run(images, ops, values)
    found = at_once(lambda: run(images, ops, values))
    assert len(found) == THREADS
    assert all(np.array_equal(one, expected) for one in found)


def test_painted_rectangles_equal_slice_assignment() -> None:
    random, images = np.random.default_rng(3), photos(33, 300)
    boxes = random.integers(-5, 40, (300, 4)).astype(np.int32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 0)
    boxes[::7, 2] = 0
    colors = random.integers(0, 256, (300, 3), dtype=np.uint8)
    expected = images.copy()
    for image, (top, left, height, width), color in zip(expected, boxes, colors, strict=True):
        image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = color
    paint(images, boxes, colors)
    assert np.array_equal(images, expected)
