"""What all sections of the config are made of. Knows no setting."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


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


Pair = Annotated[tuple[float, float], BeforeValidator(two_numbers)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


def ordered(pair: tuple[float, float], at_most_one: bool = False) -> tuple[float, float]:
    """The pair, if it is a range of positive numbers; else a ValueError."""
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be positive and in ascending order")
    if at_most_one and pair[1] > 1:
        raise ValueError("must not exceed 1, the whole image")
    return pair
