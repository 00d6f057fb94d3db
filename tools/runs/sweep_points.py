"""Build the points of a sweep (a grid or random search over its axes) as named and validated configs.

The same command line always gives the same points, so that a sweep can resume. If only the number of random points is
increased, the sweep starts with the same points as before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.load import load_config, split_overrides
from configs.schema import Config, settings_by_key
from configs.utils.errors import UserError
from tools.runs.records import compared_settings, format_setting
from tools.runs.sweep_axes import Axis, Settings, parse_axis, parse_variants
from train.optim.factory import with_timm_defaults

SWEEP_OWNED = ("name", "output", "log")  # set by the sweep itself
MAX_NAME_LENGTH = 80


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    name: str  # name of the run's folder
    settings: Settings
    config: Config
    label: str = ""  # label in plots, with the variant's name as given
    variant: str = ""  # the variant's name as given, or empty without variants


def build_points(
    file: Path,
    axes: Sequence[str],
    variants: Sequence[str],
    *,
    fixed: Sequence[str],
    draws: int | None,
    seed: int,
    **replacements: object,
) -> list[Point]:
    """Return all points of a sweep with their validated configs.

    Args:
        file: The config file.
        axes: Arguments of the form `KEY=VALUES`.
        variants: Arguments of the form `NAME: KEY=VALUE …`.
        fixed: Overrides for all points, as in `load_config`.
        draws: Number of random points, or None for the full grid.
        seed: Seed of the random points.
        **replacements: Values by dotted key for all points, as in `load_config`.

    Raises:
        UserError: An argument, a setting or a config is invalid, two points are the same run, or the name of a point is
            ambiguous.
    """
    parsed = [parse_axis(text) for text in axes] + ([parse_variants(variants)] if variants else [])
    _check_keys(parsed, [key for key, _ in split_overrides(fixed)])
    chosen = _grid_points(parsed) if draws is None else _random_points(parsed, draws, seed)
    return _name_points(
        parsed, [(point, _load_point(file, fixed, tuple(itertools.chain(*point)), replacements)) for point in chosen]
    )


def _check_keys(axes: Sequence[Axis], fixed: Sequence[str]) -> None:
    """Raise UserError if an axis varies a setting that the sweep itself, `fixed` or another axis sets.

    Two keys also conflict if one is a section that contains the other.
    """
    owners = [(key, axis) for axis in axes for key in axis.keys]
    for key, _ in owners:
        if key.split(".")[0] in SWEEP_OWNED:
            raise UserError(f"{key} cannot be varied: the sweep names its runs and their folders itself; remove it")
        if other := next((other for other in fixed if _overlap(key, other)), ""):
            raise UserError(f"{key} is varied, but --opts sets {other} for all runs; remove one of them")
    for (key, axis), (other, other_axis) in itertools.combinations(owners, 2):
        if axis is not other_axis and _overlap(key, other):
            raise UserError(f"{key} and {other} are varied separately; give a setting once, with all of its values")


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _grid_points(axes: Sequence[Axis]) -> Iterator[tuple[Settings, ...]]:
    if ranges := [axis.keys[0] for axis in axes if axis.draw]:
        raise UserError(f"{ranges[0]} is a range and has no grid; add --random N, or list its values")
    return itertools.product(*(axis.options for axis in axes))


def _random_points(axes: Sequence[Axis], draws: int, seed: int) -> list[tuple[Settings, ...]]:
    """Draw `draws` different points.

    Only `Random.random` is used, since its sequence is the same in all Python versions.

    Raises:
        UserError: `draws` is below 1, or not enough different points exist or are found.
    """
    if draws < 1:
        raise UserError(f"--random {draws} is not a positive whole number; use 1 or more")
    total = math.inf if any(axis.draw for axis in axes) else math.prod(len(axis.options) for axis in axes)
    if draws > total:
        raise UserError(
            f"--random {draws} exceeds the {total} points of the grid; use at most {total}, or leave it out"
        )
    generator = random.Random(seed)
    found: dict[tuple[Settings, ...], None] = {}
    for _ in range(1000 * draws + 1000):  # gives up if a narrow range has too few values
        found[tuple(axis.option_at(generator.random()) for axis in axes)] = None
        if len(found) == draws:
            return list(found)
    raise UserError(f"--random {draws}: only {len(found)} different points were found; use fewer, or wider ranges")


def _load_point(file: Path, fixed: Sequence[str], settings: Settings, replacements: Mapping[str, object]) -> Config:
    try:
        return with_timm_defaults(load_config(file, [*fixed, *settings], **replacements))  # as recorded by the run
    except UserError as error:
        text = str(error).removeprefix("--opts: ")
        raise UserError(f"the point {' '.join(settings) or 'without settings'}: {text}") from None


def _name_points(axes: Sequence[Axis], chosen: Sequence[tuple[tuple[Settings, ...], Config]]) -> list[Point]:
    """Give each point a name that does not depend on the order of the axes.

    Raises:
        UserError: Two points are the same run, or a name is ambiguous.
    """
    short = _short_keys([key for axis in axes if not axis.names for key in axis.keys])
    result: list[Point] = []
    seen: dict[str, str] = {}
    for options, config in chosen:
        settings = tuple(itertools.chain(*options))
        same = json.dumps(compared_settings(config), sort_keys=True)
        if same in seen:
            raise UserError(
                f"the points {seen[same]!r} and {' '.join(settings)!r} are the same run; remove one of them"
            )
        seen[same] = " ".join(settings)
        pairs = zip(axes, options, strict=True)
        variant = next((one.names[one.options.index(option)] for one, option in pairs if one.names), "")
        values = dict(setting.split("=", 1) for setting in settings) | settings_by_key(config)  # parsed, if known
        parts = [*filter(None, [variant]), *(f"{short[key]}={format_setting(values[key])}" for key in sorted(short))]
        name = re.sub(r"[^\w.,=+\-\[\]]+", "_", ",".join(parts))
        if len(name) > MAX_NAME_LENGTH or name in {point.name for point in result} or name.startswith("."):
            digest = hashlib.sha256(same.encode()).hexdigest()[:8]
            name = f"{name[: MAX_NAME_LENGTH - 9].lstrip('.')}_{digest}"
        label = ", ".join(parts) if variant else name
        result.append(Point(name, settings, config.model_copy(update={"name": name}), label, variant))
    names = {point.name for point in result}
    for name in names:  # NAME-2 is also the second run of NAME, so such names would be ambiguous
        if (found := re.fullmatch(r"(.+)-\d+", name)) and found[1] in names:
            raise UserError(f"{name!r} would be taken for a second run of {found[1]!r}; give the variant another name")
    return result


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest unique ending of each dotted key."""
    result = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        result[key] = next(
            end for end in ends if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)
        )
    return result
