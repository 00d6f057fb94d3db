"""Document all settings as a Markdown table, printed by `python -m configs.schema`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from enum import Enum
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.schema.section import Effect, Section, effect, is_section, section_settings
from configs.utils.errors import UserError

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def markdown_table(config: type[Section], patterns: Sequence[str] = ()) -> str:
    """Return a Markdown table with one row per setting. The keys of a list of sections follow the row of the list.

    Args:
        config: Class of the config.
        patterns: Sections or patterns that select settings, see `matching_keys`. If empty, all settings are shown.

    Raises:
        UserError: A pattern matches no setting.
    """
    rows = ["| key | allowed | default | on a resume | meaning |", "|---|---|---|---|---|"]
    settings = dict(section_settings(config, with_items=True))
    chosen = {key for pattern in patterns for key in matching_keys(list(settings), pattern)} or settings.keys()
    for key, field in settings.items():
        if key not in chosen:
            continue
        meaning = " ".join((field.description or "").split())  # a line break would end the row
        on_resume = "may change" if effect(field) != Effect.RESULTS else ""
        cells = (f"`{key}`", _allowed(field), _default(field), on_resume, meaning)
        rows.append("| " + " | ".join(cell.replace("|", "or") for cell in cells) + " |")
    return "\n".join(rows)


def matching_keys(keys: Sequence[str], pattern: str) -> list[str]:
    """Return the keys that a pattern selects.

    A section or key selects itself and all that it contains. Any other pattern selects keys that contain it or, if it
    contains * or ?, keys that match it as a whole.

    Raises:
        UserError: No key is selected.
    """
    wanted = pattern.removesuffix(".").lower()
    found = [key for key in keys if f"{key.replace('[]', '')}.".startswith(f"{wanted}.")]
    if not found:
        glob = wanted if "*" in wanted or "?" in wanted else f"*{wanted}*"
        found = [key for key in keys if fnmatchcase(key, glob)]
    if not found:
        close = difflib.get_close_matches(wanted, {part for key in keys for part in (key, key.rpartition(".")[2])})
        guess = f"did you mean {' or '.join(close)}? " if close else ""
        sections = dict.fromkeys(key.split(".")[0] for key in keys if "." in key)
        raise UserError(f"no setting matches {pattern!r}; {guess}the sections are {', '.join(sections)}")
    return found


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
    if origin is Annotated:
        return type_name(parts[0])
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {type_name(parts[1])}"
    return "section" if issubclass(kind, Section) else str(kind.__name__)


def _default(field: FieldInfo) -> str:
    if is_section(field):
        return ""
    if field.is_required():
        return "required"
    return json.dumps(field.default).strip('"')
