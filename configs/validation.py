"""One-sentence error messages for invalid configs. They name the origin, the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from configs.schema import Config, all_settings
from configs.schema.documentation import type_name
from configs.schema.section import item_section, section_settings
from configs.suggestions import KeyPath, format_value, suggest_keys


def describe_error(
    error: ValidationError, origins: Mapping[KeyPath, str], labels: Mapping[KeyPath, str], path: str
) -> str:
    """Describe the first error in one sentence, followed by the number of other errors.

    Errors about unknown keys come before all other errors.

    Args:
        error: Error raised by pydantic.
        origins: Origin of each key, such as its file and line.
        labels: Homework keys that the user wrote, by the key of the setting that they translate to.
        path: Origin of keys that are not in `origins`.
    """
    errors = error.errors(include_url=False)
    errors.sort(key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelled key explains a missing one
    first = errors[0]
    key_path = tuple(part for part in first["loc"] if isinstance(part, str))  # without positions in a list
    field, rest = _setting(key_path)
    if field is not None and get_origin(field.annotation) in (Union, UnionType) and rest:
        key_path = key_path[: -len(rest)]  # pydantic reports one error per type of the union
        errors = errors[:1] + [problem for problem in errors if problem["loc"][: len(key_path)] != key_path]
        first = {**first, "type": "union", "msg": f"Input should be {type_name(field.annotation)}"}
    known = next((key_path[:n] for n in range(len(key_path), 0, -1) if key_path[:n] in origins), ())
    origin = origins.get(known, path)
    dotted = ".".join(key_path)
    if first["type"] == "extra_forbidden":
        sentence = f"{dotted}={format_value(first['input'])} is unknown; {_allowed(key_path)}"
    elif first["type"] == "missing":
        sentence = f"{dotted} is missing: {field.description if field else ''}"
    elif known in labels:
        sentence = f"{labels[known]}={format_value(first['input'])} ({dotted}) {_requirement(first, key_path, field)}"
    else:
        sentence = f"{dotted}={format_value(first['input'])} {_requirement(first, key_path, field)}"
    more = f" (and {len(errors) - 1} more error{'s' * (len(errors) > 2)})" if len(errors) > 1 else ""
    return f"{origin}: {sentence.rstrip('.')}{more}"


def _requirement(problem: Any, key_path: KeyPath, field: FieldInfo | None) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in ("model_type", "model_attributes_type"):
        named = isinstance(problem["input"], str) and (".".join((*key_path, "name")) in dict(all_settings()))
        advice = f"write {'.'.join(key_path)}.name={problem['input']}; " if named else ""
        return f"must be a section; {advice}{_allowed((*key_path, ''))}"
    message = str(problem["msg"]).replace("Input should be", "must be").replace("String should have", "must have")
    message = message.replace("a valid tuple", "a list, such as [first, second]").replace("dictionary", "mapping")
    message += " or null" * (field is not None and "None" in str(field.annotation))
    if problem["type"] == "string_type" and type(problem["input"]) in (int, float, bool):
        message += f'; quote it: "{format_value(problem["input"])}"'
    return message


def _setting(key_path: KeyPath) -> tuple[FieldInfo | None, KeyPath]:
    """Return the setting or section that a key belongs to, and the rest of the key.

    The rest is an unknown key in a section, a key in a mapping, or pydantic's name of a type in a union. If the key
    does not belong to a setting or section, the result is None and the whole key.
    """
    settings = {key.replace("[]", ""): field for key, field in section_settings(Config, with_items=True)}
    for end in range(len(key_path), 0, -1):
        if (name := ".".join(key_path[:end])) in settings:
            return settings[name], key_path[end:]
    return None, key_path


def _allowed(key_path: KeyPath) -> str:
    """Return suggestions for an unknown key. The key may be in a section or in a list of sections."""
    keys = [key for key, _ in all_settings()]
    field, rest = _setting(key_path)
    if field is not None and (items := item_section(field)) is not None:
        keys = [key for key, _ in section_settings(items, ".".join(key_path[: len(key_path) - len(rest)]) + ".")]
    return suggest_keys(key_path, keys)
