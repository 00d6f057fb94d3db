"""Convert the draws of `AugmentationSampler` to inputs of the DALI training graph. This module does not import DALI.

A branch is a function in `dali_ops`. Each slot of a program is encoded as a branch index and the arguments of that
branch. Nearly all arguments are affine in the operation's value, so those of a whole batch are computed as
`constants + slopes * value`, where `constants` and `slopes` come from lookup tables.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from configs.schema import AugConfig, PaddingMode
from pipelines.augment.ops import GEOMETRIC, Op, Programs
from pipelines.interfaces import Draws

ROWS, COLUMNS = 3, 8  # shape of the arguments (`numbers`) of one operation
GREY = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
TRUNCATED = -0.499  # added where torchvision truncates and DALI rounds; above -0.5, so whole levels are kept
SLACK = 255.999 / 255  # torchvision scales the result of hue from [0, 1] by 255.999 instead of 255

# Function in `dali_ops` for each operation.
OP_BRANCH = {
    **dict.fromkeys(GEOMETRIC, "affine"),
    **dict.fromkeys((Op.BRIGHTNESS, Op.COLOR, Op.GRAYSCALE, Op.INVERT), "linear"),
    Op.CONTRAST: "about_mean",
    Op.SHARPNESS: "sharpness",
    Op.POSTERIZE: "posterize",
    Op.SOLARIZE: "solarize",
    Op.SOLARIZE_ADD: "solarize_add",
    Op.AUTO_CONTRAST: "auto_contrast",
    Op.EQUALIZE: "equalize",
    Op.HUE: "hue",
    Op.BLUR: "blur",
}
# Branches that can leave every pixel unchanged, cheapest first; a slot with one of them needs no branch for IDENTITY.
NEUTRAL = ("linear", "affine", "about_mean", "posterize", "solarize", "solarize_add", "sharpness", "hue")
WITHOUT_NUMBERS = frozenset({"identity", "auto_contrast", "equalize"})


def branches(allowed: frozenset[Op]) -> tuple[str, ...]:
    """Return the names of the branches of a slot that allows the operations `allowed`.

    The graph's input `branches` holds indices into the returned tuple. `about_mean` can compute all operations of
    `linear`, so a slot never has both branches.
    """
    names = {OP_BRANCH[op] for op in allowed if op is not Op.IDENTITY}
    if "about_mean" in names:
        names.discard("linear")
    if names.isdisjoint(NEUTRAL):
        names.add("identity")
    return tuple(sorted(names))


def has_choice(programs: Programs) -> bool:
    """Return True if any slot has more than one branch. The graph then has the input `branches`."""
    return any(len(branches(allowed)) > 1 for allowed in programs.slots)


def has_numbers(programs: Programs) -> bool:
    """Return True if any branch takes numeric arguments. The graph then has the input `numbers`."""
    return any(not WITHOUT_NUMBERS.issuperset(branches(allowed)) for allowed in programs.slots)


def program_inputs(programs: Programs, ops: np.ndarray, values: np.ndarray, size: int) -> Draws:
    """Convert the programs of a batch to inputs of the graph.

    Args:
        programs: Result of `build_programs`.
        ops, values: int32 and float32 [B, S] for S slots, the result of `draw_programs`.
        size: Height and width of the images, pixels.

    Returns:
        A dict with `branches`, int32 [B, S], and `numbers`, float32 [B, S, 3, 8]. Inputs that the graph does not have
        are omitted.
    """
    tables = _tables(programs)
    rows = (ops + len(Op) * np.arange(ops.shape[1])).reshape(-1)
    feeds: Draws = {}
    if has_choice(programs):
        feeds["branches"] = tables.branches.take(rows).reshape(ops.shape)
    if has_numbers(programs):
        ops, values = ops.reshape(-1), values.reshape(-1)
        values = np.where(ops == Op.SOLARIZE, np.ceil(values), values)  # otherwise one level would be partly inverted
        numbers = tables.slopes.take(ops, axis=0)
        numbers *= values[:, None]
        numbers += tables.constants.take(rows, axis=0)
        _write_nonlinear(numbers, ops, values, size)
        feeds["numbers"] = numbers.reshape(-1, len(programs.slots), ROWS, COLUMNS)
    return feeds


def shifts(offsets: np.ndarray, padding: int) -> np.ndarray:
    """Convert crop offsets to filters that translate images.

    Filters are used because DALI's filter operator is the only one with reflected borders. The translation is exact,
    since each output pixel is 1 times one input pixel plus 0 times the others.

    Args:
        offsets: int32 [B, 2] (y, x), from -padding to padding.
        padding: Maximum absolute offset, pixels.

    Returns:
        float32 [B, 2 * padding + 1, 2 * padding + 1]. Each filter has a single 1 and is 0 elsewhere.
    """
    filters = np.zeros((len(offsets), 2 * padding + 1, 2 * padding + 1), np.float32)
    filters[np.arange(len(offsets)), offsets[:, 0] + padding, offsets[:, 1] + padding] = 1
    return filters


def graph_inputs(draws: Draws, aug: AugConfig, programs: Programs | None, size: int) -> Draws:
    """Convert the draws of `AugmentationSampler` to the inputs of `dali_graph.train_graph`.

    Args:
        draws: Augmentation parameters of one batch, as returned by `AugmentationSampler`.
        aug, programs: The sampler's `aug` config and augmentation programs.
        size: Height and width of training images, pixels.

    Returns:
        A dict of all inputs of the graph except `images`, keyed by name.
    """
    inputs = dict(draws)
    if "offset" in inputs and aug.padding_mode == PaddingMode.REFLECT:
        inputs["shift"] = shifts(inputs.pop("offset"), aug.padding)
    if programs is not None:
        inputs |= program_inputs(programs, inputs.pop("ops"), inputs.pop("values"), size)
    if aug.erase.probability > 0:
        boxes, colors = inputs.pop("erase_box"), inputs.pop("erase_color")
        inputs["erase_start"], inputs["erase_shape"] = boxes[:, :2].astype(np.float32), boxes[:, 2:].astype(np.float32)
        if aug.erase.fill == "random":  # other colors are constants of the graph
            inputs["erase_color"] = colors.astype(np.float32)
    return inputs


class _Tables(NamedTuple):
    """Lookup tables for branches and arguments. The arguments are `numbers = constants + slopes * value`."""

    branches: np.ndarray  # int32 [S * len(Op)]
    constants: np.ndarray  # float32 [S * len(Op), ROWS * COLUMNS]
    slopes: np.ndarray  # float32 [len(Op), ROWS * COLUMNS]


@lru_cache(maxsize=8)
def _tables(programs: Programs) -> _Tables:
    constants, slopes = _lines()
    numbers = np.full((len(programs.slots), len(Op)), -1, np.int32)
    by_slot = np.tile(constants, (len(programs.slots), 1, 1, 1))
    for slot, allowed in enumerate(programs.slots):
        names = branches(allowed)
        for op in allowed - {Op.IDENTITY}:
            name = OP_BRANCH[op]
            numbers[slot, op] = names.index(name if name in names else "about_mean")
        neutral = next((name for name in NEUTRAL if name in names), "identity")
        numbers[slot, Op.IDENTITY] = names.index(neutral)
        by_slot[slot, Op.IDENTITY] = _identity_numbers(neutral)
    return _Tables(numbers.reshape(-1), by_slot.reshape(-1, ROWS * COLUMNS), slopes.reshape(-1, ROWS * COLUMNS))


def _lines() -> tuple[np.ndarray, np.ndarray]:
    """Return the constants and slopes of all operations (see `_Tables`), float32 [len(Op), ROWS, COLUMNS] each."""
    constants, slopes = np.zeros((2, len(Op), ROWS, COLUMNS), np.float32)
    same, grey = np.eye(3), np.tile(GREY, (3, 1))

    # M and T of M @ pixel + T. torchvision blends with a truncated gray, half a level darker on average, and truncates
    # the result too.
    constants[[Op.BRIGHTNESS, Op.COLOR, Op.GRAYSCALE, Op.CONTRAST, Op.INVERT, Op.POSTERIZE], :, 3] = TRUNCATED
    slopes[Op.BRIGHTNESS, :, :3] = slopes[Op.CONTRAST, :, :3] = same
    constants[Op.COLOR, :, :3], slopes[Op.COLOR, :, :3] = grey, same - grey
    constants[Op.COLOR, :, 3] -= 0.5
    slopes[Op.COLOR, :, 3] = 0.5
    constants[Op.GRAYSCALE, :, :3] = grey
    constants[Op.INVERT, :, :3] = -same
    constants[Op.INVERT, :, 3] += 255
    # M and T for the mean pixel, which is added to the result
    constants[Op.CONTRAST, :, 4:7], slopes[Op.CONTRAST, :, 4:7] = grey, -grey
    constants[Op.CONTRAST, :, 7], slopes[Op.CONTRAST, :, 7] = -0.5, 0.5

    # rows x and y of the map from target to source positions, relative to the top-left corner
    constants[list(GEOMETRIC), :2, :2] = np.eye(2)
    slopes[Op.SHEAR_X, 0, 1] = slopes[Op.SHEAR_Y, 1, 0] = 1
    slopes[Op.TRANSLATE_X, 0, 2] = slopes[Op.TRANSLATE_Y, 1, 2] = -1

    # saturating steps (255 from the threshold on, otherwise 0), then the level that a step of 255 adds
    constants[Op.SOLARIZE, :, :3], constants[Op.SOLARIZE, :, 3], slopes[Op.SOLARIZE, :, 3] = 255 * same, 255, -255
    slopes[Op.SOLARIZE_ADD, :, :3] = same / 255

    constants[Op.SHARPNESS, :, 3:6] = same  # applied to the smoothed image
    slopes[Op.SHARPNESS, :, :3], slopes[Op.SHARPNESS, :, 3:6] = same, -same
    slopes[Op.BLUR, 0, 0] = 1
    return constants, slopes


def _identity_numbers(branch: str) -> np.ndarray:
    """Return arguments with which a branch leaves every pixel unchanged: float32 [ROWS, COLUMNS]."""
    numbers, same = np.zeros((ROWS, COLUMNS), np.float32), np.eye(3)
    if branch == "affine":
        numbers[:2, :2] = np.eye(2)
    elif branch in ("linear", "about_mean", "posterize", "sharpness"):
        numbers[:, :3] = same
    elif branch == "hue":
        numbers[:, 3:4] = _hue_distances(np.zeros(1, np.float32))
        numbers[:, 4] = -numbers[:, 3]
    if branch == "posterize":
        numbers[:, 4:7] = same
    return numbers  # all 0 for solarize and solarize_add: their steps are then 0 everywhere


def _write_nonlinear(numbers: np.ndarray, ops: np.ndarray, values: np.ndarray, size: int) -> None:
    """Write the arguments that are not affine in the operation's value.

    Args:
        numbers: float32 [B * S, ROWS * COLUMNS], changed in place.
        ops: int32 [B * S].
        values: float32 [B * S].
        size: Height and width of the images, pixels.
    """
    rows = np.flatnonzero(ops == Op.ROTATE)
    if rows.size:
        angles = np.radians(values[rows].astype(np.float64))
        cosine, sine = np.cos(angles), np.sin(angles)
        middle = size / 2
        turn = (cosine, -sine, middle * (1 - cosine + sine)), (sine, cosine, middle * (1 - sine - cosine))
        for row, entries in enumerate(turn):
            for column, entry in enumerate(entries):
                numbers[rows, row * COLUMNS + column] = entry
    rows = np.flatnonzero(ops == Op.POSTERIZE)
    if rows.size:
        step = np.exp2(8 - values[rows])
        for channel in range(ROWS):
            numbers[rows, channel * COLUMNS + channel] = 1 / step
            numbers[rows, channel * COLUMNS + 4 + channel] = step
    rows = np.flatnonzero(ops == Op.HUE)
    if rows.size:
        for channel, away in enumerate(_hue_distances(values[rows])):
            numbers[rows, channel * COLUMNS + 3] = away  # times the largest channel
            numbers[rows, channel * COLUMNS + 4] = -away  # times the smallest


def _hue_distances(shifts: np.ndarray) -> np.ndarray:
    """Return the signed distances of hue shifts from the hues of red, green and blue.

    Args:
        shifts: float32 [n], fractions of the full circle.

    Returns:
        float32 [3, n], in sixths of the circle, multiplied by SLACK.
    """
    return SLACK * ((6 * shifts - np.array([[0], [2], [-2]], np.float32) + 3) % 6 - 3)
