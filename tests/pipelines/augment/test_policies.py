"""Programs are distributed as in torchvision and independent of each other and of the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from configs.schema.aug import AugConfig
from helpers.draws import LEAST, MANY, compressed, p_of_counts, p_of_numbers, record_torchvision
from pipelines.augment.ops import GEOMETRIC, Op, Programs
from pipelines.augment.policies import build_programs, draw_programs

SIZE = 48
IMAGE = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
MEAN = (0.485, 0.456, 0.406)
JITTER = {"brightness": 0.4, "contrast": 0.3, "saturation": 1.2, "hue": 0.1}
JITTER_OPS = {"brightness": Op.BRIGHTNESS, "contrast": Op.CONTRAST, "saturation": Op.COLOR, "hue": Op.HUE}
EVERYTHING: dict[str, Any] = {
    "auto": "randaugment",
    "color_jitter": {**JITTER, "probability": 0.8},
    "grayscale": 0.2,
    "blur": {"probability": 0.5},
}
SETTINGS: list[dict[str, Any]] = [
    EVERYTHING,
    *({"auto": policy} for policy in (
        "randaugment", "trivialaugment", "autoaugment-imagenet", "autoaugment-cifar10", "autoaugment-svhn",
        "rand-m9-mstd0.5-inc1", "rand-m7-n3", "rand-m5-mstd101-p0.8-tweights", "rand-m9-mstd1-t3a", "rand-n3-t3aw-p1",
    )),
]  # fmt: skip


def programs(samples: Any = None, seed: int = 3, epoch: int = 1, **aug: Any) -> tuple[np.ndarray, np.ndarray]:
    indices = np.arange(MANY) if samples is None else np.asarray(samples)
    return draw_programs(AugConfig(**aug), indices, seed, epoch, SIZE)


def facts(**aug: Any) -> Programs:
    found = build_programs(AugConfig(**aug), MEAN)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("auto", "transform"),
    [
        ("randaugment", v2.RandAugment()),
        ({"policy": "randaugment", "num_ops": 1, "magnitude": 4, "bins": 11}, v2.RandAugment(1, 4, 11)),
        ("trivialaugment", v2.TrivialAugmentWide()),
        ({"policy": "trivialaugment", "bins": 5, "magnitude": 0}, v2.TrivialAugmentWide(5)),
        *((f"autoaugment-{policy.value}", v2.AutoAugment(policy)) for policy in v2.AutoAugmentPolicy),
    ],
)
def test_program_frequencies_match_torchvision(
    auto: Any, transform: v2.Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    run = record_torchvision(monkeypatch)
    theirs = [run(partial(transform.forward, IMAGE)) for _ in range(MANY)]
    both = [
        [tuple((op, round(value, 4)) for op, value in program) for program in side]
        for side in (compressed(*programs(auto=auto)), theirs)
    ]
    assert p_of_counts(*both) > LEAST


@pytest.mark.parametrize(
    ("jitter", "probability"),
    [(JITTER, 1.0), ({**JITTER, "hue": 0.0}, 0.5), ({"hue": 0.5}, 1.0), ({"contrast": 1.0, "saturation": 1.0}, 0.2)],
)
def test_jitter_factors_and_orders_match_torchvision_distribution(jitter: dict[str, float], probability: float) -> None:
    torch.manual_seed(0)
    transform = v2.ColorJitter(**jitter)
    theirs = [transform.make_params([IMAGE]) for _ in range(MANY)]
    ops, values = programs(color_jitter={**jitter, "probability": probability})
    applied = ops.any(axis=1)
    ops, values = ops[applied], values[applied]
    names = list(JITTER_OPS)  # in the order of torchvision's fn_idx
    used = {names.index(name): op for name, op in JITTER_OPS.items() if jitter.get(name)}
    orders = [tuple(used[i] for i in drawn["fn_idx"].tolist() if i in used) for drawn in theirs]
    assert p_of_counts([tuple(row) for row in ops.tolist()], orders) > LEAST
    for i, op in used.items():
        assert p_of_numbers(values[ops == op], [drawn[f"{names[i]}_factor"] for drawn in theirs]) > LEAST, op


def test_jitter_factors_and_order_are_independent() -> None:
    ops, values = programs(color_jitter=JITTER)
    slots = np.argsort(ops, axis=1)  # position of each operation
    table = np.concatenate([np.take_along_axis(values, slots, axis=1), slots[:, :3]], axis=1)
    correlation = np.corrcoef(table, rowvar=False)[:4]
    correlation[:, :4] -= np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(MANY)


@pytest.mark.parametrize(
    ("aug", "share"),
    [
        ({"color_jitter": {**JITTER, "probability": 0.8}}, 0.8),
        ({"grayscale": 0.2}, 0.2),
        ({"blur": {"probability": 0.5}}, 0.5),
        ({"auto": "rand-n1-p0.3"}, 0.3),
    ],
)
def test_augmentation_is_applied_with_its_probability(aug: dict[str, Any], share: float) -> None:
    ops, _ = programs(**aug)
    applied = ops[:, 0] != Op.IDENTITY
    assert ((ops != Op.IDENTITY) == applied[:, None]).all()
    assert stats.binomtest(int(applied.sum()), MANY, share).pvalue > LEAST


def test_blur_sigmas_match_torchvision_distribution() -> None:
    torch.manual_seed(0)
    transform = v2.GaussianBlur(7, (0.3, 1.7))
    theirs = [transform.make_params([IMAGE])["sigma"][0] for _ in range(MANY)]
    ops, values = programs(blur={"probability": 0.5, "sigma": (0.3, 1.7)})
    assert p_of_numbers(values[ops == Op.BLUR], theirs) > LEAST


@pytest.mark.parametrize("aug", SETTINGS, ids=lambda aug: str(aug["auto"]))
def test_slots_draw_exactly_their_operations(aug: dict[str, Any]) -> None:
    ops, values = programs(**aug)
    slots = facts(**aug).slots
    assert (ops.dtype, values.dtype, ops.shape, values.shape) == ("int32", "float32", *2 * ((MANY, len(slots)),))
    for column, slot in zip(ops.T, slots, strict=True):
        assert set(column.tolist()) - {Op.IDENTITY} == slot
    assert (values[ops == Op.IDENTITY] == 0).all()


@pytest.mark.parametrize("aug", SETTINGS, ids=lambda aug: str(aug["auto"]))
def test_values_are_in_range_of_operations(aug: dict[str, Any]) -> None:
    ops, values = programs(**aug)
    limits = {Op.POSTERIZE: (0, 8), Op.SOLARIZE: (0, 256), Op.SOLARIZE_ADD: (0, 128), Op.HUE: (-0.5, 0.5)}
    for op, (low, high) in limits.items():
        assert ((values[ops == op] >= low) & (values[ops == op] <= high)).all()
    for op in (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS):
        assert (values[ops == op] >= 0).all()
    for op in (Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.POSTERIZE):
        assert (values[ops == op] == np.trunc(values[ops == op])).all()
    assert (np.abs(values[np.isin(ops, list(GEOMETRIC))]) <= 135).all()
    radius = facts(**aug).radius
    assert (values[ops == Op.BLUR] * 3 <= radius + 0.5).all()


@pytest.mark.parametrize("aug", SETTINGS, ids=lambda aug: str(aug["auto"]))
def test_programs_are_independent_of_batch(aug: dict[str, Any]) -> None:
    samples = np.random.default_rng(0).permutation(1_500_000)[:64]
    whole = programs(samples, **aug)
    for part in ([17], [63, 0, 5], np.arange(64)[::-1]):
        for array, of_part in zip(whole, programs(samples[part], **aug), strict=True):
            np.testing.assert_array_equal(array[part], of_part)


@pytest.mark.parametrize("aug", SETTINGS, ids=lambda aug: str(aug["auto"]))
def test_programs_differ_between_epochs_and_seeds(aug: dict[str, Any]) -> None:
    first = np.concatenate(programs(**aug), axis=1)
    varies = first.std(axis=0) > 0  # grayscale has no value
    for key in ({"epoch": 2}, {"seed": 4}):
        other = np.concatenate(programs(**key, **aug), axis=1)
        related = np.corrcoef(first[:, varies], other[:, varies], rowvar=False)
        assert np.abs(related[: varies.sum(), varies.sum() :]).max() < 5 / np.sqrt(MANY)


def test_augmentations_are_drawn_independently() -> None:
    ops, values = programs(**EVERYTHING)
    auto, jitter, grayscale, blur = ops[:, :2], ops[:, 2:6], ops[:, 6:7], ops[:, 7:8]
    of = [
        [auto, values[:, :2]],
        [jitter, values[:, 2:6], jitter.any(axis=1)[:, None]],
        [grayscale],
        [blur, values[:, 7:]],
    ]
    groups = [np.concatenate(arrays, axis=1) for arrays in of]
    owner = np.repeat(range(4), [group.shape[1] for group in groups])
    related = np.abs(np.corrcoef(np.concatenate(groups, axis=1), rowvar=False))
    assert related[owner[:, None] != owner].max() < 5 / np.sqrt(MANY)


@pytest.mark.parametrize("off", list(EVERYTHING))
def test_disabling_an_augmentation_keeps_other_draws(off: str) -> None:
    slots = {"auto": 2, "color_jitter": 4, "grayscale": 1, "blur": 1}
    stays = np.repeat([name != off for name in EVERYTHING], [slots[name] for name in EVERYTHING])
    fewer = programs(**{name: value for name, value in EVERYTHING.items() if name != off})
    for with_all, without in zip(programs(**EVERYTHING), fewer, strict=True):
        np.testing.assert_array_equal(with_all[:, stays], without)


@pytest.mark.parametrize("off", list(JITTER))
def test_disabling_a_jitter_keeps_other_factors_and_order(off: str) -> None:
    with_all = compressed(*programs(np.arange(200), color_jitter=JITTER))
    without = compressed(*programs(np.arange(200), color_jitter={**JITTER, off: 0.0}))
    assert without == [tuple(pair for pair in program if pair[0] != JITTER_OPS[off]) for program in with_all]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-t3aw", "randaugment"])
def test_adding_a_layer_keeps_draws_of_earlier_layers(policy: str) -> None:
    more: Any = {"policy": policy, "num_ops": 3} if policy == "randaugment" else f"{policy}-n3"
    for two, three in zip(programs(auto=policy), programs(auto=more), strict=True):
        np.testing.assert_array_equal(two, three[:, :2])


@pytest.mark.parametrize(
    "aug", [{}, {"color_jitter": {**JITTER, "probability": 0.0}}, {"blur": {"probability": 0.0}}, {"auto": "none"}]
)
def test_no_programs_without_augmentation(aug: dict[str, Any]) -> None:
    assert build_programs(AugConfig(**aug), MEAN) is None
    assert [array.shape for array in programs(**aug)] == [(MANY, 0)] * 2


GREYS = (124, 116, 104)  # MEAN


@pytest.mark.parametrize(
    ("auto", "bilinear", "fill"),
    [
        ({"policy": "randaugment"}, False, (0, 0, 0)),
        ({"policy": "autoaugment-svhn", "fill": "mean"}, False, GREYS),
        ({"policy": "trivialaugment", "interpolation": "bilinear"}, True, (0, 0, 0)),
        ({"policy": "rand-m9"}, True, GREYS),
        ({"policy": "rand-m9", "interpolation": "nearest", "fill": "black"}, False, (0, 0, 0)),
    ],
)
def test_fill_and_interpolation_default_to_policy(
    auto: dict[str, Any], bilinear: bool, fill: tuple[int, int, int]
) -> None:
    found = facts(auto=auto)
    assert (found.bilinear, found.fill) == (bilinear, fill)


@pytest.mark.parametrize(
    ("aug", "radius"),
    [
        ({"blur": {"probability": 0.5, "sigma": (0.1, 1.0)}}, 3),
        ({"blur": {"probability": 0.5, "sigma": (0.1, 1.0)}, "auto": "rand-t3a"}, 6),
        ({"blur": {"probability": 0.5, "sigma": (0.1, 4.0)}, "auto": "rand-t3a"}, 12),
        ({"auto": "rand-t3aw"}, 6),
    ],
)
def test_blur_radius_fits_the_largest_sigma(aug: dict[str, Any], radius: int) -> None:
    assert facts(**aug).radius == radius
