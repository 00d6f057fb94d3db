"""The points of a sweep: from `KEY=VALUES` on the command line to checked configs with names. Pure: starts nothing.

The same command line gives the same points in every start, so that a sweep goes on where it stopped; a longer random
sweep begins with the points of a shorter one.
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
SWEEP_OWNED = ("name", "output", "log")  # the sweep itself sets these
MAX_NAME_LENGTH = 80
Settings = tuple[str, ...]  # KEY=VALUE, as --opts takes them


@dataclass(frozen=True)
class Axis:
    """One thing that is varied."""

    keys: tuple[str, ...]
    options: tuple[Settings, ...] = ()  # the values of a key, or the variants
    draw: Callable[[float], Settings] | None = None  # from [0, 1), for a range
    names: tuple[str, ...] = ()  # of variants


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    name: str  # of its folder
    settings: Settings
    config: Config
    label: str = ""  # in pictures: variants with their names as given
    variant: str = ""  # its name as given; empty: without variants


def build_points(
    file: Path, axes: Sequence[str], variants: Sequence[str], *, fixed: Sequence[str], draws: int | None, seed: int,
    **replacements: Any,
) -> list[Point]:  # fmt: skip
    """Every point with its config, checked; fixed and replacements: as `load_config` takes them, for all points."""
    choices = [_parse_axis(text) for text in axes] + ([_parse_variants(variants)] if variants else [])
    _check_keys(choices, _override_keys(fixed))
    chosen = _grid_points(choices) if draws is None else _random_points(choices, draws, seed)
    return _name_points(
        choices, [(point, _load_point(file, fixed, tuple(itertools.chain(*point)), replacements)) for point in chosen]
    )


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The parts between separators (a pattern of one character) that stand in no brackets and no quotes."""
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
        raise UserError(f"{text!r} has brackets or quotes that do not match; close each one that is opened")
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
        raise UserError(f"{text!r} has an empty value; write null for none, or take the comma out")
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
        value = min(high, max(low, float(f"{value:.4g}")))  # four digits: nobody wants to type or read more
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
        raise UserError(f"--variant {twice[0]!r} is given twice; give each a name of its own")
    keys = list(dict.fromkeys(setting.partition("=")[0] for settings in options for setting in settings))
    return Axis(tuple(keys), options=tuple(options), names=tuple(names))


def _check_keys(choices: Sequence[Axis], fixed: Sequence[str]) -> None:
    """No setting is given by two, also not a section by one and a field of it by another; none is the sweep's own."""
    owners = [(key, choice) for choice in choices for key in choice.keys]
    for key, _ in owners:
        if key.split(".")[0] in SWEEP_OWNED:
            raise UserError(f"{key} cannot be varied: the sweep names its runs and their folders itself; take it out")
        if other := next((other for other in fixed if _overlap(key, other)), ""):
            raise UserError(f"{key} is varied, but --opts sets {other} for all runs; take it out of one of them")
    for (key, choice), (other, other_choice) in itertools.combinations(owners, 2):
        if choice is not other_choice and _overlap(key, other):
            raise UserError(f"{key} and {other} are varied apart; give a setting once, with all of its values")


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _override_keys(overrides: Sequence[str]) -> list[str]:
    """The keys among the items of --opts, `KEY=VALUE` or `KEY VALUE`."""
    keys, remaining = [], iter(overrides)
    for item in remaining:
        key, sign, _ = item.partition("=")
        keys.append(key)
        if not sign:
            next(remaining, None)
    return keys


def _grid_points(choices: Sequence[Axis]) -> Iterator[tuple[Settings, ...]]:
    if ranges := [choice.keys[0] for choice in choices if choice.draw]:
        raise UserError(f"{ranges[0]} is a range, which has no grid; add --random N, or list its values")
    return itertools.product(*(choice.options for choice in choices))


def _random_points(choices: Sequence[Axis], draws: int, seed: int) -> list[tuple[Settings, ...]]:
    """`draws` different points; only random(), which Python keeps the same in every version, is asked."""
    if draws < 1:
        raise UserError(f"--random {draws} is not a positive whole number; use 1 or more")
    total = math.inf if any(choice.draw for choice in choices) else math.prod(len(choice.options) for choice in choices)
    if draws > total:
        raise UserError(
            f"--random {draws} exceeds the {total} points of the grid; use at most {total}, or leave it out"
        )
    generator = random.Random(seed)
    found: dict[tuple[Settings, ...], None] = {}
    for _ in range(1000 * draws + 1000):  # a range whose values are all taken would never end
        shares = [generator.random() for _ in choices]
        found[
            tuple(
                choice.draw(share) if choice.draw else choice.options[int(share * len(choice.options))]
                for choice, share in zip(choices, shares, strict=True)
            )
        ] = None
        if len(found) == draws:
            return list(found)
    raise UserError(f"--random {draws}: only {len(found)} different points were found; use less, or wider ranges")


def _load_point(file: Path, fixed: Sequence[str], settings: Settings, replacements: dict[str, Any]) -> Config:
    try:
        return with_timm_defaults(load_config(file, [*fixed, *settings], **replacements))  # as the run records it
    except UserError as error:
        text = str(error).removeprefix("--opts: ")
        raise UserError(f"the point {' '.join(settings) or 'without settings'}: {text}") from None


def _name_points(choices: Sequence[Axis], chosen: Sequence[tuple[tuple[Settings, ...], Config]]) -> list[Point]:
    """Points under names that do not depend on the order of the command line; raises UserError for the same twice."""
    short = _short_keys([key for choice in choices if not choice.names for key in choice.keys])
    result: list[Point] = []
    seen: dict[str, str] = {}
    for options, config in chosen:
        settings = tuple(itertools.chain(*options))
        same = json.dumps(compared_settings(config), sort_keys=True)
        if same in seen:
            raise UserError(
                f"the points {seen[same]!r} and {' '.join(settings)!r} are the same run; take one of them out"
            )
        seen[same] = " ".join(settings)
        values = settings_by_key(config)
        pairs = zip(choices, options, strict=True)
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
    for name in names:  # a run folder's number is told from a name only by the sweep's care
        if (found := re.fullmatch(r"(.+)-\d+", name)) and found[1] in names:
            raise UserError(f"{name!r} would be taken for a second run of {found[1]!r}; give the variant another name")
    return result


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest end that no other one has."""
    result = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        result[key] = next(
            end for end in ends if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)
        )
    return result
