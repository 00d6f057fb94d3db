"""RandAugment as timm writes it, `rand-m9-mstd0.5-inc1`: the string's parts and their rules. Knows no images.

Source: timm's `rand_augment_transform` (timm.data.auto_augment), whose sections, defaults and limits these are.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

OPERATION_SETS = ("weights", "3a", "3aw")  # of operations; without one, timm's fifteen
_NUMBER = r"\d+(?:\.\d+)?"
_SECTION = re.compile(rf"(?:(?P<key>mstd|mmax|inc|m|n|p)(?P<value>{_NUMBER}|inf)|t(?P<set>{'|'.join(OPERATION_SETS)}))")


@dataclass(frozen=True)
class RandAugmentSpec:
    """Magnitudes lie on a scale from 0 to 10, or to `largest`."""

    magnitude: float = 10.0
    deviation: float = 0.0  # of the normal distribution about magnitude; inf: uniform from 0 to magnitude
    largest: float = 10.0  # magnitudes are cut off there
    layers: int = 2  # operations per sample
    probability: float = 0.5  # of each of them
    increasing: bool = False  # operations grow stronger with the magnitude, all of them
    operations: str | None = None  # one of SETS


def parse_rand_augment(text: str) -> RandAugmentSpec:
    """The parts of a string such as rand-m9-n3-mstd0.5-inc1; raises ValueError for one that timm would not take."""
    kind, *sections = text.split("-")
    if kind != "rand":
        raise ValueError(
            "must be none, randaugment, trivialaugment, autoaugment-imagenet, autoaugment-cifar10, autoaugment-svhn "
            "or a string of timm's such as rand-m9-mstd0.5-inc1"
        )
    values: dict[str, str] = {}
    for section in sections:
        match = _SECTION.fullmatch(section)
        key = "" if match is None else match["key"] or "t"
        if match is None or key in values:
            raise ValueError(
                f"has a part {section!r} that is {'given twice' if match else 'unknown'}; allowed are m, n, p, mstd, "
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
