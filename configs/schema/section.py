"""What all sections of the config are made of. Knows no setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from configs.utils.files import expand_home


class Section(BaseModel):
    """Strict: `epochs: "5"` and `epochs: true` are errors instead of 5 and 1; an integer is accepted for a float."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def two_numbers(value: Any) -> Any:
    numbers = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
    if not numbers or len(value) != 2:
        raise ValueError("must be two numbers, such as [0.5, 1.0]")
    return tuple(value)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _in_home(value: Any) -> Any:
    return expand_home(value) if isinstance(value, str) else value


IsPath = AfterValidator(_in_home)  # marks a setting that is a path
Pair = Annotated[tuple[float, float], BeforeValidator(two_numbers)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


def check_range(pair: tuple[float, float], at_most_one: bool = False) -> tuple[float, float]:
    """The pair, if it is a range of positive numbers; else a ValueError."""
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be positive and in ascending order")
    if at_most_one and pair[1] > 1:
        raise ValueError("must not exceed 1, the whole image")
    return pair


def is_section(field: FieldInfo) -> bool:
    """Whether the field is a section with fields of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def section_settings(section: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the source; a section is followed by its fields."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from section_settings(field.annotation, f"{prefix}{name}.")


def item_section(field: FieldInfo) -> Any:
    """The kind of section that the field is a list of; None for all other fields."""
    kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return kinds[0] if kinds else None
