"""Document all settings as a Markdown table, printed by `python -m configs.schema`."""

from __future__ import annotations

import json
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema.section import Effect, Section, effect, is_section, section_settings

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def markdown_table(config: type[Section]) -> str:
    """Return a Markdown table with one row per setting. The keys of a list of sections follow the row of the list."""
    rows = ["| key | allowed | default | on a resume | meaning |", "|---|---|---|---|---|"]
    for key, field in section_settings(config, with_items=True):
        meaning = " ".join((field.description or "").split())  # a line break would end the row
        on_resume = "may change" if effect(field) != Effect.RESULTS else ""
        cells = (f"`{key}`", _allowed(field), _default(field), on_resume, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "or") for cell in cells) + " |")
    return "\n".join(rows)


def _allowed(field: FieldInfo) -> str:
    bounds = []
    for limit in field.metadata:
        bounds += [f"{sign} {getattr(limit, name)}" for name, sign in SIGNS.items() if hasattr(limit, name)]
        bounds += ["not empty"] * hasattr(limit, "min_length")
    return ", ".join([type_name(field.annotation), *bounds])


def type_name(kind: Any) -> str:
    """Return the name of a type in the terms of config files, such as `int or null`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(parts)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(choice.value for choice in kind)
    if origin in (Union, UnionType):
        names = [type_name(part) for part in parts if part is not NoneType]
        return " or ".join([*names, *["null"] * (NoneType in parts)])
    if origin is tuple:
        return f"list of {type_name(parts[0])}" if parts[-1] is Ellipsis else f"[{', '.join(map(type_name, parts))}]"
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {type_name(parts[1])}"
    return "section" if issubclass(kind, Section) else str(kind.__name__)


def _default(field: FieldInfo) -> str:
    if is_section(field):
        return ""
    if field.is_required():
        return "required"
    return json.dumps(field.default).strip('"')
