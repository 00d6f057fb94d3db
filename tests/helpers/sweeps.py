"""Points of a sweep over the digits config."""

from __future__ import annotations

from typing import Any

from helpers.training import DIGITS
from tools.runs.sweep_points import Point, build_points


def points_of(*axes: str, variants: tuple[str, ...] = (), **changes: Any) -> list[Point]:
    """Return the points of these axes and variants; `changes` are arguments of `build_points`."""
    return build_points(DIGITS, axes, variants, **{"fixed": (), "draws": None, "seed": 0, **changes})
