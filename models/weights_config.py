"""Read the config.json beside a weights file, in the format of timm's model folders and of tools/export.py.

The file is not trusted. All values that are used are validated, and other values are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.suggestions import format_value
from configs.utils.errors import UserError
from configs.utils.files import read_small_text

NAME = "config.json"


@dataclass(frozen=True)
class WeightsConfig:
    """Validated content of a config.json. Missing values are None."""

    path: Path
    mean: list[float] | None = None  # of RGB values in 0..1
    std: list[float] | None = None
    image_size: int | None = None  # image height in pixels that the weights were trained with
    num_classes: int | None = None
    classes: list[str] | None = None  # in the order of the logits; written by tools/export.py only
    arguments: dict[str, object] | None = None  # of the constructor


def read_weights_config(weights: Path) -> WeightsConfig | None:
    """Return the content of the config.json beside the file `weights`, or None if there is none.

    Raises:
        UserError: The config.json cannot be read or is invalid.
    """
    path = weights.parent / NAME
    try:
        content = json.loads(read_small_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise _broken(path, f"cannot be read as JSON ({reason})") from None
    if not isinstance(content, dict):
        raise _broken(path, "is not a mapping")
    published = content.get("pretrained_cfg", content)  # missing in older timm files
    facts = content.get("model_zhu", {})
    if not isinstance(published, dict) or not isinstance(facts, dict):
        raise _broken(path, "has a pretrained_cfg or model_zhu that is not a mapping")
    mean, std = _three_numbers(path, published, "mean"), _three_numbers(path, published, "std")
    if (mean is None) != (std is None) or min(std or [1.0]) <= 0:
        raise _broken(path, f"has mean={mean} and std={std}, which must be given together, with std above 0")
    size, classes = published.get("input_size"), facts.get("classes")
    if size is not None and not (isinstance(size, list) and len(size) == 3 and all(map(_is_count, size))):
        raise _broken(path, f"has input_size={format_value(size)}, which must be [channels, height, width]")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _broken(path, f"has classes={format_value(classes)}, which must be a list of names")
    count = content.get("num_classes", published.get("num_classes"))
    if count is not None and not _is_count(count):
        raise _broken(path, f"has num_classes={format_value(count)}, which must be a positive whole number")
    arguments = content.get("model_args")
    if arguments is not None and not isinstance(arguments, dict):
        raise _broken(path, f"has model_args={format_value(arguments)}, which must be a mapping")
    return WeightsConfig(path, mean, std, size[1] if size else None, count, classes, arguments)


def _three_numbers(path: Path, section: dict[str, Any], key: str) -> list[float] | None:
    values = section.get(key)
    if values is None:
        return None
    numbers = isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
    if not numbers or not all(abs(value) < 1e6 for value in values):
        raise _broken(path, f"has {key}={format_value(values)}, which must be three numbers, one per colour")
    return [float(value) for value in values]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _broken(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}, which describes the normalisation of images for the weights beside it, {what}; repair it, or move "
        "the weights to a folder without it"
    )
