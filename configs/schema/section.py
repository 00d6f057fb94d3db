"""Building blocks of config sections: the base class, types of values, and iteration over settings."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from configs.utils.code import is_reference
from configs.utils.files import expand_home


class Effect(Enum):
    """What a setting affects. This decides whether a resumed run may change it, and whether runs are compared by it."""

    RESULTS = "results"  # the default, without a mark: a resumed run may not change it
    MINOR = "minor"  # the last digits of results, the step at which a run ends, or only runs in which a failure occurs
    NONE = "none"  # name, location, logging and reading: runs that differ only in such settings are the same run


T = TypeVar("T")
Resumable = Annotated[T, Effect.MINOR]  # marks a setting that a resumed run may change
Neutral = Annotated[T, Effect.NONE]  # marks a setting that a resumed run may change and that no table compares


class Section(BaseModel):
    """Base class of all sections. Sections are frozen, reject unknown keys, and check types strictly.

    Strict means that `epochs: "5"` and `epochs: true` are errors rather than 5 and 1. A float can be given as an
    integer.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def two_numbers(value: object) -> object:
    """Return a list or tuple of two numbers as a tuple. Raises ValueError for any other value."""
    pair = as_tuple(value)
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(item) in (int, float) for item in pair):
        raise ValueError("must be two numbers, such as [0.5, 1.0]")
    return pair


def as_tuple(value: object) -> object:
    """Convert a list to a tuple. Return other values unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _expand_home(value: object) -> object:
    return expand_home(value) if isinstance(value, str) else value


def _check_range(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be positive and in ascending order")
    return pair


def _check_share(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError("must not exceed 1, the whole image")
    return pair


def _expand_if_code(value: object) -> object:
    return expand_home(value) if isinstance(value, str) and is_reference(value) else value


IsPath = AfterValidator(_expand_home)  # marks a setting as a path, and expands ~
IsCode = AfterValidator(_expand_if_code)  # marks a setting that may name the user's code, see configs.utils.code
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Range = Annotated[tuple[float, float], BeforeValidator(two_numbers), AfterValidator(_check_range)]  # min, max above 0
ShareRange = Annotated[Range, AfterValidator(_check_share)]  # minimum and maximum share of an image


def is_section(field: FieldInfo) -> bool:
    """Return True if the value of a field is a nested section."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def effect(field: FieldInfo) -> Effect:
    """Return what a setting affects according to its mark."""
    return next((mark for mark in field.metadata if isinstance(mark, Effect)), Effect.RESULTS)


def section_settings(section: Any, prefix: str = "", with_items: bool = False) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) for every setting of a section class in source order. Keys start with `prefix`.

    A nested section precedes its fields. If `with_items` is True, a list of sections precedes the fields of its items,
    such as `data.stages[].epoch`.
    """
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from section_settings(field.annotation, f"{prefix}{name}.", with_items)
        elif with_items and (items := item_section(field)) is not None:
            yield from section_settings(items, f"{prefix}{name}[].")


def item_section(field: FieldInfo) -> Any:
    """Return the class of the sections in a field that is a list of sections, or None for any other field."""
    kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return kinds[0] if kinds else None
