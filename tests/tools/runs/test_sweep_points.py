"""Tests of tools.runs.sweep_points."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from configs.utils.errors import UserError
from helpers.sweeps import points_of


def names(*axes: str, **changes: Any) -> list[str]:
    return [point.name for point in points_of(*axes, **changes)]


def error_of(*axes: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        points_of(*axes, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_grid_is_product_of_lists_with_order_independent_names() -> None:
    grid = points_of("train.lr=1e-3,0.01", "data.batch_size=64,128")
    assert [point.name for point in grid] == [
        "batch_size=64,lr=0.001", "batch_size=128,lr=0.001", "batch_size=64,lr=0.01", "batch_size=128,lr=0.01",
    ]  # fmt: skip
    assert [(p.config.train.lr, p.config.data.batch_size) for p in grid] == [
        (1e-3, 64), (1e-3, 128), (1e-2, 64), (1e-2, 128),
    ]  # fmt: skip
    assert grid[0].settings == ("train.lr=1e-3", "data.batch_size=64")
    assert all(point.config.name == point.name for point in grid)
    turned = names("data.batch_size=64,128", "train.lr=1e-3,0.01")
    assert set(turned) == {point.name for point in grid}


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("train.optimizer.betas=[0.9,0.999],[0.9, 0.99]", ["betas=[0.9,0.999]", "betas=[0.9,0.99]"]),
        ("train.optimizer.betas=(0.9,0.999),(0.8,0.9)", ["betas=[0.9,0.999]", "betas=[0.8,0.9]"]),
        ("aug.crop=none,pad", ["crop=none", "crop=pad"]),
        ("data.image_size=null,64", ["image_size=null", "image_size=64"]),
        ("model.name=lenet,timm/resnet18", ["name=lenet", "name=timm_resnet18"]),
        ("train.clip_grad_norm=None,1", ["clip_grad_norm=null", "clip_grad_norm=1"]),
        ("train.optimizer.nesterov=true,false", ["nesterov=true", "nesterov=false"]),
        ("train.lr=0.1234567,0.1234568", ["lr=0.1234567", "lr=0.1234568"]),
        ("seed=0, 1", ["seed=0", "seed=1"]),
    ],
)
def test_values_split_outside_brackets_and_are_named_by_parsed_value(axis: str, expected: list[str]) -> None:
    assert names(axis) == expected


def test_point_names_are_unique_and_limited_in_length() -> None:
    assert names("train.optimizer.name=adamw", "model.name=lenet") == ["model.name=lenet,optimizer.name=adamw"]
    long = names(*(f"train.optimizer.{key}_lr=0.111111,0.222222" for key in ("norm_bias", "bias", "linear")),
                 "train.optimizer.newton_schulz_steps=1,2", "train.optimizer.weight_decay=0.01")  # fmt: skip
    assert len(set(long)) == 16
    assert max(map(len, long)) <= 80


def test_variants_set_settings_together_and_multiply_with_lists() -> None:
    variants = ("plain: aug.crop=none aug.flip=0", "crop+flip: aug.crop=pad aug.flip=0.5", "as is:")
    result = points_of("seed=1,2", variants=variants)
    assert [point.name for point in result] == [
        "plain,seed=1", "crop+flip,seed=1", "as_is,seed=1", "plain,seed=2", "crop+flip,seed=2", "as_is,seed=2",
    ]  # fmt: skip
    assert (result[1].config.aug.crop, result[1].config.aug.flip) == ("pad", 0.5)
    assert result[1].settings == ("seed=1", "aug.crop=pad", "aug.flip=0.5")
    spaced = points_of(variants=("small: aug.scale=[0.5, 1.0] aug.crop=random-resized",))
    assert spaced[0].config.aug.scale == (0.5, 1.0)


@hypothesis_settings(max_examples=20)
@given(draws=st.integers(1, 12), seed=st.integers(0, 5))
def test_random_sweep_is_reproducible_and_extendable(draws: int, seed: int) -> None:
    axes = ("train.lr=1,2,3,4", "seed=1,2,3")
    drawn = names(*axes, draws=draws, seed=seed)
    assert len(set(drawn)) == draws
    assert set(drawn) <= set(names(*axes))
    assert drawn == names(*axes, draws=draws, seed=seed)
    assert drawn == names(*axes, draws=12, seed=seed)[:draws]  # a longer sweep starts with the same points


def test_random_points_match_earlier_versions() -> None:
    assert names("train.lr=loguniform(1e-4,1e-1)", "aug.flip=uniform(0,0.5)", draws=2, seed=3) == [
        "flip=0.2721,lr=0.0005175", "flip=0.302,lr=0.001288",
    ]  # fmt: skip


@given(seed=st.integers(0, 1000))
def test_ranges_respect_their_bounds(seed: int) -> None:
    (point,) = points_of("train.lr=loguniform(1e-4,1e-1)", "aug.flip=uniform(0.25,0.5)", draws=1, seed=seed)
    assert 1e-4 <= point.config.train.lr <= 1e-1
    assert 0.25 <= point.config.aug.flip <= 0.5


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        (
            ["train.epoch=1,2"],
            {},
            "the point train.epoch=1: train.epoch=1 is unknown; did you mean train.epochs or train.first_epoch?",
        ),
        (["train.lr=1e-3,fast"], {}, 'the point train.lr=fast: train.lr="fast" must be a valid number'),
        (["train.lr"], {}, "'train.lr' is not KEY=VALUE,VALUE"),
        (["train.lr=1,,2"], {}, "'train.lr=1,,2' has an empty value"),
        (["train.lr=[1,2"], {}, "unbalanced brackets or quotes"),
        (["train.lr=1,2", "train.lr=3"], {}, "train.lr and train.lr are varied separately; give a setting once"),
        (["train.optimizer={name: sgd}", "train.optimizer.name=adamw"], {}, "are varied separately"),
        (["train.lr=1,2"], {"variants": ["a: train.lr=3"]}, "train.lr and train.lr are varied separately"),
        (["train.lr=1,2"], {"fixed": ["train.lr", "3"]}, "train.lr is varied, but --opts sets train.lr"),
        (["train.lr=1e-3,0.001"], {}, "'train.lr=1e-3' and 'train.lr=0.001' are the same run"),
        (["data.threads=1,2"], {}, "are the same run"),  # does not affect results
        (["name=a,b"], {}, "name cannot be varied"),
        (["train.lr=uniform(0,1)"], {}, "train.lr is a range and has no grid; add --random N"),
        (["train.lr=uniform(1,0)"], {"draws": 1}, "the smaller one first"),
        (["train.lr=loguniform(0,1)"], {"draws": 1}, "two finite numbers above 0"),
        (["train.lr=uniform(1)"], {"draws": 1}, "uniform needs two finite numbers"),
        (["train.lr=uniform(1,2),3"], {"draws": 1}, "mixes a range with other values"),
        (["train.lr=1,2"], {"draws": 3}, "--random 3 exceeds the 2 points of the grid; use at most 2"),
        (["train.lr=1,2"], {"draws": 0}, "--random 0 is not a positive whole number"),
        ([], {"variants": ["aug.flip=0"]}, "is not 'NAME: KEY=VALUE …'"),
        ([], {"variants": ["a: aug.flip"]}, "'aug.flip' is not KEY=VALUE"),
        ([], {"variants": ["a: aug.flip=0 aug.flip=1"]}, "sets aug.flip twice"),
        ([], {"variants": ["a: aug.flip=0", "a: aug.flip=1"]}, "--variant 'a' is given twice"),
        ([], {"variants": ["a: aug.flip=0", "a-2: aug.flip=1"]}, "'a-2' would be taken for a second run of 'a'"),
    ],
)
def test_invalid_sweep_is_a_one_line_error(axes: list[str], changes: dict[str, Any], message: str) -> None:
    assert message in error_of(*axes, **{"variants": (), **changes})
