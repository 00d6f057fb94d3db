"""From what pydantic finds wrong with settings to one sentence: where, key, value, what is allowed. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from configs.hints import KeyPath, allowed_keys, show
from configs.schema import all_fields, walk


def describe(error: ValidationError, origins: Mapping[KeyPath, str], labels: Mapping[KeyPath, str], path: str) -> str:
    """One sentence for the first error, and how many settings more are wrong.

    origins: the file and line of keys; labels: what the user calls a key, where that is another; path: of the file.
    """
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    first, key_path = problems[0], _key_path(problems[0])
    known = next((key_path[:n] for n in range(len(key_path), 0, -1) if key_path[:n] in origins), ())
    dotted = ".".join(key_path)
    if first["type"] == "extra_forbidden":
        sentence = f"{dotted}={show(first['input'])} is unknown; {allowed_keys(key_path, _keys(key_path))}"
    elif first["type"] == "missing":
        sentence = f"{dotted} is missing: {all_fields()[dotted].description}"
    else:
        value = show(first["input"])
        what = f"{labels[known]}={value} ({dotted})" if known in labels else f"{dotted}={value}"
        choices = [_requirement(problem, key_path) for problem in problems if _key_path(problem) == key_path]
        requirement = " or ".join(choices).replace(" or must be ", " or ")  # of a setting with values of several kinds
        sentence = f"{what} {requirement}"
    others = len({_key_path(problem) for problem in problems}) - 1
    more = f" (and {others} more error{'s' * (others > 1)})" if others else ""
    return f"{origins.get(known, path)}: {sentence.rstrip('.')}{more}"


def _key_path(problem: Any) -> KeyPath:
    """The setting's, without positions in a list and kinds of a union; with the key of a mapping."""
    parts = tuple(part for part in problem["loc"] if isinstance(part, str))
    setting = _setting(parts)
    if problem["type"] in ("extra_forbidden", "missing") or not setting:
        return parts
    return parts if str(all_fields()[".".join(setting)].annotation).startswith("dict") else setting


def _keys(key_path: KeyPath) -> list[str]:
    """Those that may stand in a config, and those of a list's section where the key is in one."""
    section = "".join(f"{part}." for part in key_path[:-1])
    settings = dict(walk())
    return [key for key in all_fields() if key in settings or key.startswith(section)]


def _setting(parts: KeyPath) -> KeyPath:
    """The longest beginning that is a setting."""
    return next((parts[:n] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in all_fields()), ())


def _requirement(problem: Any, key_path: KeyPath) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"must be a section; {allowed_keys((*key_path, ''), _keys((*key_path, '')))}"
    message = str(problem["msg"]).replace("Input should be", "must be").replace("String should have", "must have")
    message = message.replace("a valid tuple", "a list, such as [first, second]")
    message = message.replace("a valid dictionary", "a mapping, such as {key: value}")
    if setting := _setting(key_path):
        message += " or null" * ("None" in str(all_fields()[".".join(setting)].annotation))
    if problem["type"] == "string_type" and type(problem["input"]) in (int, float, bool):
        message += f'; quote it: "{show(problem["input"])}"'
    return message
