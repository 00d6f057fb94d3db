"""Helpers for the arguments of command-line tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from configs.utils.errors import UserError


def flag_name(name: str) -> str:
    """Return the command-line flag of an argument, such as `--top-k` for `top_k`."""
    return f"--{name.replace('_', '-')}"


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError if any of the named integer arguments is below 1. Arguments that are None are skipped."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_name(name)}={value} is not a positive whole number; use 1 or more")


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers from `minimum` to `maximum`, without an upper bound if `maximum` is None."""
    limits = f"from {minimum} to {maximum}" if maximum is not None else f"of at least {minimum}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return number

    return parse
