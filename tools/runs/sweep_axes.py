"""Parse the axes of a sweep from arguments of the form `KEY=VALUES` and `NAME: KEY=VALUE …`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.utils.errors import UserError

RANGE = re.compile(r"(loguniform|uniform)\((.*)\)\s*\Z")
Settings = tuple[str, ...]  # KEY=VALUE, as --opts takes them


@dataclass(frozen=True)
class Axis:
    """One dimension of a sweep: the values of a setting, or the variants."""

    keys: tuple[str, ...]
    options: tuple[Settings, ...] = ()  # the values of a key, or the variants
    draw: Callable[[float], Settings] | None = None  # for a range: maps a number in [0, 1) to a setting
    names: tuple[str, ...] = ()  # names of the variants

    def option_at(self, share: float) -> Settings:
        """Return the option at a place between 0 and 1 (exclusive)."""
        return self.draw(share) if self.draw else self.options[int(share * len(self.options))]


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split the text at separators outside brackets and quotes.

    `separator` is a regular expression that matches one character. Whitespace around the parts is removed.

    Raises:
        UserError: Brackets or quotes are unbalanced.
    """
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


def parse_axis(text: str) -> Axis:
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
        raise UserError(f"{text!r}: {kind} needs two finite numbers{above}, the smaller one first: 1e-4,1e-1")

    def draw(share: float) -> Settings:
        value = low + share * (high - low) if kind == "uniform" else low * (high / low) ** share
        value = min(high, max(low, float(f"{value:.4g}")))  # four digits are easy to read and to type
        return (f"{key}={value!r}",)

    return draw


def parse_variants(texts: Sequence[str]) -> Axis:
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
