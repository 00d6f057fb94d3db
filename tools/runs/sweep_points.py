"""Points of a sweep: parses `KEY=VALUES` arguments into named, validated configs.

The same command line always gives the same points, so that a sweep can resume. A longer random sweep starts with the
points of a shorter one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from tools.runs.records import compared_settings, format_value, settings_by_key
from train.optim.factory import with_timm_defaults

RANGE = re.compile(r"(loguniform|uniform)\((.*)\)\s*\Z")
SWEEP_OWNED = ("name", "output", "log")  # set by the sweep itself
MAX_NAME_LENGTH = 80
Settings = tuple[str, ...]  # KEY=VALUE, as --opts takes them


@dataclass(frozen=True)
class Axis:
    """One dimension of a sweep: the values of a setting, or the variants."""

    keys: tuple[str, ...]
    options: tuple[Settings, ...] = ()  # the values of a key, or the variants
    draw: Callable[[float], Settings] | None = None  # of a range: maps [0, 1) to a value
    names: tuple[str, ...] = ()  # of variants


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    name: str  # of its folder
    settings: Settings
    config: Config
    label: str = ""  # in plots, with the variant's name as given
    variant: str = ""  # name as given; empty without variants


def build_points(
    file: Path,
    axes: Sequence[str],
    variants: Sequence[str],
    *,
    fixed: Sequence[str],
    draws: int | None,
    seed: int,
    **replacements: Any,
) -> list[Point]:
    """Return all points of a sweep with their validated configs.

    Args:
        file: the config file.
        axes: `KEY=VALUES` arguments.
        variants: `NAME: KEY=VALUE …` arguments.
        fixed: `KEY=VALUE` overrides of all points, as in `load_config`.
        draws: number of random points; None: the full grid.
        seed: of the random points.
        **replacements: values of all points, as in `load_config`.
    """
    parsed = [_parse_axis(text) for text in axes] + ([_parse_variants(variants)] if variants else [])
    _check_keys(parsed, _override_keys(fixed))
    chosen = _grid_points(parsed) if draws is None else _random_points(parsed, draws, seed)
    return _name_points(
        parsed, [(point, _load_point(file, fixed, tuple(itertools.chain(*point)), replacements)) for point in chosen]
    )


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split at separators (a pattern of one character) outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if depth == 0 and not quote and re.match(separator, character):
            parts.append("")
        else:
            parts[-1] += character
    if depth or quote:
        raise UserError(f"{text!r} has unbalanced brackets or quotes; close each one that is opened")
    return [part.strip() for part in parts]


def _parse_axis(text: str) -> Axis:
    key, sign, values = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"{text!r} is not KEY=VALUE,VALUE; write for example train.lr=1e-3,3e-3")
    if found := RANGE.match(values.strip()):
        return Axis((key,), draw=_parse_range(key, found[1], found[2], text))
    texts = split_outside_brackets(values, ",")
    if "" in texts:
        raise UserError(f"{text!r} has an empty value; write null for none, or remove the comma")
    if "(" in values and any(RANGE.match(value) for value in texts):
        raise UserError(f"{text!r} mixes a range with other values; give a key either one range or a list")
    return Axis((key,), options=tuple((f"{key}={value}",) for value in texts))


def _parse_range(key: str, kind: str, inside: str, text: str) -> Callable[[float], Settings]:
    try:
        low, high = (float(part) for part in inside.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (kind == "uniform" or low > 0)):
        above = " above 0" if kind == "loguniform" else ""
        raise UserError(f"{text!r}: {kind} needs two finite numbers{above}, the smaller one first, such as 1e-4,1e-1")

    def draw(share: float) -> Settings:
        value = low + share * (high - low) if kind == "uniform" else low * (high / low) ** share
        value = min(high, max(low, float(f"{value:.4g}")))  # four digits are easy to read and to type
        return (f"{key}={value!r}",)

    return draw


def _parse_variants(texts: Sequence[str]) -> Axis:
    names, options = [], []
    for text in texts:
        name, colon, rest = text.partition(":")
        settings = tuple(filter(None, split_outside_brackets(rest, r"\s")))
        if not colon or not name.strip() or "=" in name:
            raise UserError(f"--variant {text!r} is not 'NAME: KEY=VALUE …'; write for example 'flip: aug.flip=0.5'")
        if bad := [setting for setting in settings if not re.match(r"[^=]+=.", setting)]:
            raise UserError(f"--variant {text!r}: {bad[0]!r} is not KEY=VALUE; separate settings by spaces")
        keys = [setting.partition("=")[0] for setting in settings]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UserError(f"--variant {text!r} sets {twice[0]} twice; keep one")
        names.append(name.strip())
        options.append(settings)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--variant {twice[0]!r} is given twice; give each variant a different name")
    keys = list(dict.fromkeys(setting.partition("=")[0] for settings in options for setting in settings))
    return Axis(tuple(keys), options=tuple(options), names=tuple(names))


def _check_keys(axes: Sequence[Axis], fixed: Sequence[str]) -> None:
    """Refuse settings that the sweep owns, or that are set twice, directly or through their section."""
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


def _override_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of --opts items, `KEY=VALUE` or `KEY VALUE`."""
    keys, remaining = [], iter(overrides)
    for item in remaining:
        key, sign, _ = item.partition("=")
        keys.append(key)
        if not sign:
            next(remaining, None)
    return keys


def _grid_points(axes: Sequence[Axis]) -> Iterator[tuple[Settings, ...]]:
    if ranges := [axis.keys[0] for axis in axes if axis.draw]:
        raise UserError(f"{ranges[0]} is a range and has no grid; add --random N, or list its values")
    return itertools.product(*(axis.options for axis in axes))


def _random_points(axes: Sequence[Axis], draws: int, seed: int) -> list[tuple[Settings, ...]]:
    """Draw `draws` different points. Uses random() only, whose sequence is the same in all Python versions."""
    if draws < 1:
        raise UserError(f"--random {draws} is not a positive whole number; use 1 or more")
    total = math.inf if any(axis.draw for axis in axes) else math.prod(len(axis.options) for axis in axes)
    if draws > total:
        raise UserError(
            f"--random {draws} exceeds the {total} points of the grid; use at most {total}, or leave it out"
        )
    generator = random.Random(seed)
    found: dict[tuple[Settings, ...], None] = {}
    for _ in range(1000 * draws + 1000):  # gives up where a narrow range has too few values
        shares = [generator.random() for _ in axes]
        found[
            tuple(
                axis.draw(share) if axis.draw else axis.options[int(share * len(axis.options))]
                for axis, share in zip(axes, shares, strict=True)
            )
        ] = None
        if len(found) == draws:
            return list(found)
    raise UserError(f"--random {draws}: only {len(found)} different points were found; use fewer, or wider ranges")


def _load_point(file: Path, fixed: Sequence[str], settings: Settings, replacements: dict[str, Any]) -> Config:
    try:
        return with_timm_defaults(load_config(file, [*fixed, *settings], **replacements))  # as recorded by the run
    except UserError as error:
        text = str(error).removeprefix("--opts: ")
        raise UserError(f"the point {' '.join(settings) or 'without settings'}: {text}") from None


def _name_points(axes: Sequence[Axis], chosen: Sequence[tuple[tuple[Settings, ...], Config]]) -> list[Point]:
    """Name the points independently of the order of the command line. Raises UserError for duplicates."""
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
        values = settings_by_key(config)
        pairs = zip(axes, options, strict=True)
        variant = next((one.names[one.options.index(option)] for one, option in pairs if one.names), "")
        parts = [variant]
        for key in sorted(short):
            text = next(text for text in settings if text.startswith(f"{key}=")).partition("=")[2]
            parts.append(f"{short[key]}={format_value(values[key]) if key in values else text}")
        name = re.sub(r"[^\w.,=+\-\[\]]+", "_", ",".join(filter(None, parts)))
        if len(name) > MAX_NAME_LENGTH or name in {point.name for point in result} or name.startswith("."):
            digest = hashlib.sha256(same.encode()).hexdigest()[:8]
            name = f"{name[: MAX_NAME_LENGTH - 9].lstrip('.')}_{digest}"
        label = ", ".join(filter(None, parts)) if variant else name
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
