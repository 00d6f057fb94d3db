"""Owns the one check of an image's height and width, which every built-in model makes when built and in forward."""

from __future__ import annotations

from configs.utils.errors import UserError


def check_image_size(model: str, height: int, width: int, smallest: int, largest: int | None = None) -> None:
    """Raise a `UserError` that names the smallest size (pixels) unless both sides lie in smallest..largest.

    Compares Python ints (or torch's symbolic ones) only: no kernel, no synchronisation and no graph break.
    """
    if height >= smallest and width >= smallest and (largest is None or (height <= largest and width <= largest)):
        return
    allowed = f"at least {smallest}" if largest is None else f"from {smallest} to {largest}"
    raise UserError(
        f"image_size {height}x{width} (height x width) is not one that {model} takes: the smallest is {smallest}, so "
        f"make both sides {allowed} or choose another model"
    )
