"""Parse timm's RandAugment strings such as `rand-m9-mstd0.5-inc1`.

The parts and their defaults are those of timm's `rand_augment_transform` (timm.data.auto_augment).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

OPERATION_SETS = ("weights", "3a", "3aw")  # default: timm's fifteen operations
_NUMBER = r"\d+(?:\.\d+)?"
_PART = re.compile(rf"(?:(?P<key>mstd|mmax|inc|m|n|p)(?P<value>{_NUMBER}|inf)|t(?P<set>{'|'.join(OPERATION_SETS)}))")


@dataclass(frozen=True)
class RandAugmentSpec:
    """Parameters of timm's RandAugment. Magnitudes are on timm's scale, from 0 to 10 by default."""

    magnitude: float = 10.0
    deviation: float = 0.0  # standard deviation of the magnitude; inf: uniform from 0 to magnitude
    largest: float = 10.0  # magnitudes are clipped to this upper limit
    layers: int = 2  # operations per sample
    probability: float = 0.5  # of each operation
    increasing: bool = False  # whether every operation gets stronger as the magnitude grows
    operations: str | None = None  # one of OPERATION_SETS


def parse_rand_augment(text: str) -> RandAugmentSpec:
    """Parse a string such as rand-m9-n3-mstd0.5-inc1.

    Raises:
        ValueError: The string does not start with rand, or a part is unknown, repeated or out of range.
    """
    kind, *parts = text.split("-")
    if kind != "rand":
        raise ValueError(
            "must be none, randaugment, trivialaugment, autoaugment-imagenet, autoaugment-cifar10, autoaugment-svhn "
            "or a timm string such as rand-m9-mstd0.5-inc1"
        )
    values: dict[str, str] = {}
    for part in parts:
        match = _PART.fullmatch(part)
        key = "" if match is None else match["key"] or "t"
        if match is None or key in values:
            raise ValueError(
                f"has a part {part!r} that is {'given twice' if match else 'unknown'}; allowed are m, n, p, mstd, "
                f"mmax and inc with a number and t with one of {', '.join(OPERATION_SETS)}, such as "
                "rand-m9-n2-mstd0.5-inc1"
            )
        values[key] = match["value"] or match["set"]
    deviation = float(values.get("mstd", 0))
    layers, probability = float(values.get("n", 2)), float(values.get("p", 0.5))
    if not 1 <= layers <= 8 or layers != int(layers):
        raise ValueError(f"asks for n{values['n']} operations per sample; use a whole number from 1 to 8")
    if probability > 1:
        raise ValueError(f"has a probability p{values['p']} above 1")
    return RandAugmentSpec(
        magnitude=float(values.get("m", 10)),
        deviation=math.inf if deviation > 100 else deviation,
        largest=float(values.get("mmax", 10)),
        layers=int(layers),
        probability=probability,
        increasing=float(values.get("inc", 0)) > 0,
        operations=values.get("t"),
    )
