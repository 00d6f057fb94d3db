"""Compare programs in the DALI graph with torchvision's functional operations for the same values, on photos.

The tests marked gpu compare a GPU with the CPU.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.schema import AugConfig
from helpers.photos import photos
from pipelines.augment.ops import GEOMETRIC, Op, Programs, SlotOps, blur_radius
from pipelines.gpu import dali_graph, dali_inputs
from pipelines.gpu.dali_inputs import program_inputs
from pipelines.gpu.dali_runner import DaliRunner

SIDES = pytest.mark.parametrize("side", [32, 96])
FACTORS = [0.0, 0.1, 0.5, 1.0, 1.3, 1.9]
VALUES: dict[Op, list[float]] = {
    Op.SHEAR_X: [-0.99, -0.3, 0, 0.1, 0.3],
    Op.SHEAR_Y: [-0.99, -0.3, 0, 0.1, 0.3],
    Op.TRANSLATE_X: [-32, -7, 0, 3, 14],
    Op.TRANSLATE_Y: [-32, -7, 0, 3, 14],
    Op.ROTATE: [-135, -90, -30, 0, 13.7, 90, 180],
    Op.BRIGHTNESS: FACTORS,
    Op.COLOR: FACTORS,
    Op.CONTRAST: FACTORS,
    Op.SHARPNESS: FACTORS,
    Op.POSTERIZE: [*range(9)],
    Op.SOLARIZE: [0, 1, 77.5, 100, 128, 255, 256],
    Op.SOLARIZE_ADD: [0, 50, 110, 128],
    Op.HUE: [-0.5, -0.3, -0.1, 0, 0.05, 0.25, 0.5],
    Op.BLUR: [0.1, 0.5, 1, 2],
}
# Mean and largest difference in grey levels. Operations not listed are equal except for single pixels.
LIMITS = {Op.COLOR: (0.6, 1), Op.CONTRAST: (0.1, 1), Op.EQUALIZE: (0.5, 1)}
NEARLY_EQUAL = (0.02, 1)
JITTER = frozenset({Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR})
RAND_AUGMENT = frozenset(Op) - {Op.IDENTITY, Op.SOLARIZE_ADD, Op.INVERT, Op.HUE, Op.GRAYSCALE, Op.BLUR}
EVERY = frozenset(Op) - {Op.IDENTITY}
COUNT = 8  # photos per value


def programs_of(slots: SlotOps, bilinear: bool = False, fill: tuple[int, int, int] = (120, 30, 200)) -> Programs:
    return Programs(slots, bilinear, fill, blur_radius(2.0))


@lru_cache(maxsize=4)
def built(programs: Programs, side: int, count: int, gpu: bool = False) -> DaliRunner:
    machine = dali_graph.PipelineConfig(0 if gpu else None, count, 2, 0.0)
    kind = dali_graph.ImageSpec("npy", (side, side, 3), False)
    pipeline = dali_graph.train_graph(kind, machine, AugConfig(flip=0), side, "bilinear", True, programs)
    return DaliRunner(lambda: pipeline, torch.device("cuda" if gpu else "cpu"))


def by_dali(
    programs: Programs, images: np.ndarray, ops: np.ndarray, values: np.ndarray, room: int = 0, gpu: bool = False
) -> np.ndarray:
    """Run a batch through a graph of batch size `room`: uint8 [B, side, side, 3]."""
    side = images.shape[1]
    runner = built(programs, side, room or len(images), gpu)
    feeds = program_inputs(programs, ops.astype(np.int32), values.astype(np.float32), side)
    given = torch.from_numpy(images.copy())
    runner.submit(given.pin_memory() if gpu else given, np.zeros(len(images), np.int64), feeds)
    return runner.result()[0].cpu().numpy()


def by_torchvision(programs: Programs, images: np.ndarray, ops: np.ndarray, values: np.ndarray) -> np.ndarray:
    results = []
    for image, own_ops, own_values in zip(images, ops.tolist(), values.tolist(), strict=True):
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
        for op, value in zip(own_ops, own_values, strict=True):
            tensor = one(Op(op), value, tensor, programs)
        results.append(tensor.permute(1, 2, 0).numpy())
    return np.stack(results)


def one(op: Op, value: float, image: torch.Tensor, programs: Programs) -> torch.Tensor:
    how = {
        "interpolation": InterpolationMode.BILINEAR if programs.bilinear else InterpolationMode.NEAREST,
        "fill": [float(level) for level in programs.fill],
    }

    def affine(translate: tuple[int, int] = (0, 0), tangents: tuple[float, float] = (0, 0)) -> torch.Tensor:
        shear = [math.degrees(math.atan(tangent)) for tangent in tangents]
        return F.affine(image, 0.0, [*translate], 1.0, shear, center=[0, 0], **how)  # type: ignore[arg-type]

    kernel = [2 * programs.radius + 1] * 2
    functions = {
        Op.IDENTITY: lambda: image,
        Op.SHEAR_X: lambda: affine(tangents=(value, 0)),
        Op.SHEAR_Y: lambda: affine(tangents=(0, value)),
        Op.TRANSLATE_X: lambda: affine((int(value), 0)),
        Op.TRANSLATE_Y: lambda: affine((0, int(value))),
        Op.ROTATE: lambda: F.rotate(image, value, **how),  # type: ignore[arg-type]
        Op.BRIGHTNESS: lambda: F.adjust_brightness(image, value),
        Op.COLOR: lambda: F.adjust_saturation(image, value),
        Op.CONTRAST: lambda: F.adjust_contrast(image, value),
        Op.SHARPNESS: lambda: F.adjust_sharpness(image, value),
        Op.POSTERIZE: lambda: F.posterize(image, int(value)),
        Op.SOLARIZE: lambda: F.solarize(image, value) if value <= 255 else image,
        Op.SOLARIZE_ADD: lambda: torch.where(image < 128, image + int(value), image),
        Op.AUTO_CONTRAST: lambda: F.autocontrast(image),
        Op.EQUALIZE: lambda: F.equalize(image),
        Op.INVERT: lambda: F.invert(image),
        Op.HUE: lambda: F.adjust_hue(image, value),
        Op.GRAYSCALE: lambda: F.rgb_to_grayscale(image, num_output_channels=3),
        Op.BLUR: lambda: F.gaussian_blur(image, kernel, [value, value]),
    }
    return functions[op]()


def each_value(op: Op, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return photos [B, side, side, 3] with every value of an operation, as programs of one slot."""
    values = np.repeat(np.array(VALUES.get(op, [0]), np.float32), COUNT)
    images = np.stack(photos(side, side, len(values)))
    return images, np.full((len(values), 1), op), values[:, None]


def drawn(slots: SlotOps, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return programs that cycle through the operations of each slot, in a different order per slot."""
    random = np.random.default_rng(1)
    ops, values = np.zeros((count, len(slots)), np.int32), np.zeros((count, len(slots)), np.float32)
    for slot, allowed in enumerate(slots):
        ops[:, slot] = random.permutation(np.resize(sorted({*allowed, Op.IDENTITY}), count))
        values[:, slot] = [random.choice(VALUES.get(Op(op), [0])) for op in ops[:, slot]]
    return ops, values


def differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    assert first.shape == second.shape
    assert first.dtype == second.dtype == np.uint8
    return np.abs(first.astype(int) - second)


@SIDES
@pytest.mark.parametrize("op", sorted(set(Op) - GEOMETRIC), ids=lambda op: op.name)
def test_pixel_operation_matches_torchvision(op: Op, side: int) -> None:
    programs, batch = programs_of((frozenset({op}),)), each_value(op, side)
    found = differences(by_dali(programs, *batch), by_torchvision(programs, *batch))
    mean, largest = LIMITS.get(op, NEARLY_EQUAL)
    assert found.reshape(-1, COUNT, side * side * 3).mean(axis=(1, 2)).max() <= mean  # of each value
    assert found.max() <= largest


@SIDES
@pytest.mark.parametrize("fill", [(120, 30, 200), (7, 7, 7)], ids=["color", "grey"])
@pytest.mark.parametrize("op", sorted(GEOMETRIC), ids=lambda op: op.name)
def test_nearest_warp_matches_torchvision(op: Op, fill: tuple[int, int, int], side: int) -> None:
    programs, batch = programs_of((frozenset({op}),), fill=fill), each_value(op, side)
    found = differences(by_dali(programs, *batch), by_torchvision(programs, *batch))
    assert found.mean(axis=(1, 2, 3)).max() < 2  # diagonals follow the edges of pixels
    assert np.median(found.mean(axis=(1, 2, 3))) == 0


@SIDES
@pytest.mark.parametrize("fill", [(120, 30, 200), (7, 7, 7)], ids=["color", "grey"])
@pytest.mark.parametrize("op", sorted(GEOMETRIC), ids=lambda op: op.name)
def test_bilinear_warp_matches_torchvision_except_at_edges(op: Op, fill: tuple[int, int, int], side: int) -> None:
    programs, batch = programs_of((frozenset({op}),), bilinear=True, fill=fill), each_value(op, side)
    found = differences(by_dali(programs, *batch), by_torchvision(programs, *batch))
    assert found.mean(axis=(1, 2, 3)).max() < 4
    assert (found > 1).any(axis=3).mean(axis=(1, 2)).max() < 5 / side  # torchvision blends the edge twice


@SIDES
def test_programs_match_torchvision(side: int) -> None:
    programs = programs_of((RAND_AUGMENT, RAND_AUGMENT, JITTER, JITTER, JITTER), fill=(0, 0, 0))
    images, (ops, values) = np.stack(photos(side, side, 56)), drawn(programs.slots, 56)
    found = differences(by_dali(programs, images, ops, values), by_torchvision(programs, images, ops, values))
    assert found.mean() < 0.6
    assert found.mean(axis=(1, 2, 3)).max() < 4  # later operations may amplify a difference of one level


def test_slots_of_all_operations_match_torchvision() -> None:
    programs = programs_of((EVERY, EVERY))
    images, (ops, values) = np.stack(photos(32, 32, 76)), drawn(programs.slots, 76)
    found = differences(by_dali(programs, images, ops, values), by_torchvision(programs, images, ops, values))
    assert found.mean() < 0.6


@pytest.mark.parametrize("threshold", [0.5, 85.0, 113.333336, 254.99])
def test_fractional_threshold_inverts_pixels_above_it(threshold: float) -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    ops, values = np.array([[Op.SOLARIZE]]), np.array([[threshold]])
    found = by_dali(programs_of((frozenset({Op.SOLARIZE}),)), images, ops, values)
    np.testing.assert_array_equal(found, np.where(images >= threshold, 255 - images, images))


@pytest.mark.parametrize("bilinear", [False, True])
def test_identity_is_exact_beside_other_operations(bilinear: bool) -> None:
    slots = (*(frozenset({op}) for op in sorted(EVERY)), RAND_AUGMENT, EVERY, JITTER)
    programs, images = programs_of(slots, bilinear), np.stack(photos(32, 32, 5))
    ops = np.full((5, len(slots)), Op.IDENTITY)
    np.testing.assert_array_equal(by_dali(programs, images, ops, np.zeros(ops.shape)), images)


def test_program_pixels_are_independent_of_batch() -> None:
    programs = programs_of((EVERY, RAND_AUGMENT, JITTER), bilinear=True)
    images, (ops, values) = np.stack(photos(32, 32, 38)), drawn(programs.slots, 38)
    together = by_dali(programs, images, ops, values)
    backwards = by_dali(programs, images[::-1], ops[::-1], values[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)
    for start in (0, 1, 20):
        alone = slice(start, start + 1 + start // 4)
        some = by_dali(programs, images[alone], ops[alone], values[alone], room=len(images))
        np.testing.assert_array_equal(some, together[alone])


@pytest.mark.parametrize(
    "op", [Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST, Op.HUE, Op.SHARPNESS], ids=lambda op: op.name
)
def test_images_of_few_levels_match_torchvision(op: Op) -> None:
    photo = photos(32, 32, 1)[0]
    bright, flat = photo.copy(), photo.copy()
    bright[:26] = 255  # equalize then has less than one pixel per other level
    flat[..., 1] = 77
    levels = [np.full_like(photo, level) for level in (0, 77, 255)]
    images = np.stack([*levels, bright, flat, photo & 0xC0, photo & 0x80])
    ops, values = np.full((len(images), 1), op), np.full((len(images), 1), 0.4)
    programs = programs_of((frozenset({op}),))
    found = differences(by_dali(programs, images, ops, values), by_torchvision(programs, images, ops, values))
    assert found.max() <= 1


def test_inputs_have_the_types_dali_requires() -> None:
    programs = programs_of((RAND_AUGMENT, JITTER))
    feeds = program_inputs(programs, *drawn(programs.slots, 20), 32)
    assert {name: (array.dtype.name, array.shape) for name, array in feeds.items()} == {
        "branches": ("int32", (20, 2)),
        "numbers": ("float32", (20, 2, dali_inputs.ROWS, dali_inputs.COLUMNS)),
    }
    assert all(array.flags.c_contiguous for array in feeds.values())


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ((JITTER, JITTER), {"numbers"}),
        ((frozenset({Op.EQUALIZE}),), {"branches"}),
        ((frozenset({Op.BLUR}),), {"branches", "numbers"}),
        ((frozenset(),), set()),
    ],
    ids=["jitter", "equalize", "blur", "nothing"],
)
def test_unused_inputs_are_omitted(slots: SlotOps, expected: set[str]) -> None:
    programs, images = programs_of(slots), np.stack(photos(32, 32, 10))
    ops, values = drawn(slots, 10)
    assert set(program_inputs(programs, ops, values, 32)) == expected
    found = differences(by_dali(programs, images, ops, values), by_torchvision(programs, images, ops, values))
    assert found.mean() < 0.6


# On a GPU


@pytest.mark.gpu
@SIDES
@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("op", sorted(Op), ids=lambda op: op.name)
def test_gpu_operation_equals_cpu(op: Op, bilinear: bool, side: int) -> None:
    programs, batch = programs_of((frozenset({op}),), bilinear), each_value(op, side)
    found = differences(by_dali(programs, *batch, gpu=True), by_dali(programs, *batch))
    assert found.mean(axis=(1, 2, 3)).max() <= 1


@pytest.mark.gpu
def test_gpu_identity_is_exact() -> None:
    slots = (*(frozenset({op}) for op in sorted(EVERY)), RAND_AUGMENT, EVERY, JITTER)
    programs, images = programs_of(slots, bilinear=True), np.stack(photos(32, 32, 5))
    ops = np.full((5, len(slots)), Op.IDENTITY)
    np.testing.assert_array_equal(by_dali(programs, images, ops, np.zeros(ops.shape), gpu=True), images)


@pytest.mark.gpu
def test_gpu_programs_equal_cpu_and_ignore_batch() -> None:
    programs = programs_of((EVERY, RAND_AUGMENT, JITTER))
    images, (ops, values) = np.stack(photos(32, 32, 76)), drawn(programs.slots, 76)
    together = by_dali(programs, images, ops, values, gpu=True)
    assert differences(together, by_dali(programs, images, ops, values)).mean() <= 1
    some = by_dali(programs, images[20:26], ops[20:26], values[20:26], room=76, gpu=True)
    np.testing.assert_array_equal(some, together[20:26])
