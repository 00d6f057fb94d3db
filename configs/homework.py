"""Translate the keys of the homework's configs (see docs/homework.md) to settings.

This includes behavior of the homework that depends on several keys, or that has no key. `configs.load` passes the
values with their origins to `translate`, and validates the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TypeGuard

from configs.homework_keys import KEYS, HomeworkValue
from configs.suggestions import format_value, one_line_error

CLASSES = {"cifar10": 10, "medium_imagenet": 200}  # values of DATA.DATASET
# Behavior of the homework that has no key; for example, its optimizers decay every parameter.
IMPLICIT_SETTINGS = {
    "aug.crop": "squash",
    "aug.flip": 0.5,
    "eval.crop_fraction": 1.0,
    "train.amp": "off",
    "train.optimizer.decay_biases": True,
}
WEIGHT_DECAY = {"adamw": 0.01}  # torch's defaults, which the homework does not change; 0 for all other optimizers
DROPOUT = {"alexnet": 0.5}  # kept by the homework, since it does not read MODEL.DROP_RATE
# Keys that must not exceed TRAIN.LR. The homework does not check this, so its configs may break the rule.
LIMITED_BY_LR = ("TRAIN.MIN_LR", "TRAIN.WARMUP_LR")
DIFFERENCES = (
    "unlike in the homework, the last partial batch of an epoch is dropped, and pixels are normalised by the mean and "
    "standard deviation of the data set itself"
)


@dataclass
class Translation:
    """Translation of the homework's keys to settings."""

    given: Mapping[str, HomeworkValue]  # by homework key; without nulls and without keys that have no effect
    direct: Mapping[str, object]  # settings that the config contains directly, by dotted key; these take precedence
    values: dict[str, object] = field(default_factory=dict)  # translated settings by dotted key
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # homework key and its origin, by dotted key
    warnings: list[str] = field(default_factory=list)

    def setting(self, key: str) -> object:
        """Return the value of a setting, or None if it is not given."""
        return self.direct.get(key, self.values.get(key))


def translate(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, object], with_defaults: bool, source: str
) -> Translation:
    """Translate values of homework keys to settings.

    Args:
        given: Values by homework key.
        settings: Nested settings that the config contains directly. They take precedence over the translation.
        with_defaults: Whether missing keys get the homework's defaults instead of the schema's.
        source: Name of the config, for messages.

    Raises:
        UserError: A value cannot be converted, DATA.DATASET is unknown and no path is given, or MODEL.NAME is missing
            and `with_defaults` is set.
    """
    unused = [f"{key} ({entry.origin})" for key, entry in given.items() if not KEYS[key].target]
    nulls = {key: entry._replace(value=KEYS[key].null) for key, entry in given.items() if entry.value is None}
    given = {key: entry for key, entry in {**given, **nulls}.items() if entry.value is not None and KEYS[key].target}
    result = Translation(given, _flat(settings))
    for key, rule in KEYS.items():
        if key in given:
            result.values[rule.target] = _convert(key, given[key])
            result.sources[rule.target] = (key, given[key].origin)
        elif with_defaults and rule.default is not None:
            result.values[rule.target] = rule.convert(rule.default)
    warnings = []
    if unused:
        warnings.append(
            f"{', '.join(unused)}: without effect, since the loader's own threads prepare the batches (see "
            "data.threads and data.prefetch) and evaluation keeps the stored order"
        )
    warnings += _set_data_set(result, with_defaults)
    if with_defaults:
        implicit = _add_defaults(result, source)
        warnings += _resolve_contradictions(result)
    if warnings:
        result.warnings.append(f"{source}: {'; '.join(warnings)}")
    if with_defaults:
        result.warnings.append(f"{source}: {_describe_defaults(result, implicit)}")
    result.sources = {key: by for key, by in result.sources.items() if key not in result.direct}
    return result


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted key, without sections."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _convert(key: str, entry: HomeworkValue) -> object:
    try:
        return KEYS[key].convert(entry.value)
    except ValueError as error:
        raise one_line_error(f"{entry.origin}: {key}={format_value(entry.value)} {error}") from None


def _set_data_set(result: Translation, with_defaults: bool) -> list[str]:
    """Set data.path from DATA_PATH, or from DATASET and IMG_SIZE, and drop a NUM_CLASSES that contradicts DATASET.

    Returns:
        Warnings for the user.

    Raises:
        UserError: DATA.DATASET is unknown and no path is given.
    """
    values = result.values
    named = result.given.get("DATA.DATASET", HomeworkValue("cifar10", ""))
    dataset = named.value.lower() if isinstance(named.value, str) else format_value(named.value)
    path = result.given.get("DATA.DATA_PATH", HomeworkValue("", ""))
    uses_dataset = "DATA.DATASET" in result.given or (with_defaults and path.value == "")
    values.pop("data.path", None)
    if path.value != "":
        values["data.path"] = path.value
        result.sources["data.path"] = ("DATA.DATA_PATH", path.origin)
    elif uses_dataset and "data.path" not in result.direct:
        if dataset not in CLASSES:
            raise one_line_error(
                f"{named.origin}: DATA.DATASET={format_value(named.value)} is unknown; use {' or '.join(CLASSES)}, "
                "or give the folder of a converted data set as DATA.DATA_PATH"
            )
        size = result.setting("data.image_size")
        suffix = "-96" if type(size) is int and size <= 96 else "-224"
        values["data.path"] = "data/cifar10" if dataset == "cifar10" else f"data/medium-imagenet{suffix}"
    classes = values.get("model.num_classes")
    if not uses_dataset or dataset not in CLASSES or type(classes) is not int or classes == CLASSES[dataset]:
        return []
    # The homework's LeNet for CIFAR-10 has 200 outputs and uses 10 of them. Here the data set decides the number.
    del values["model.num_classes"]
    origin = result.sources.pop("model.num_classes")[1]
    what = dataset if "DATA.DATASET" in result.given else f"{dataset}, the default of DATA.DATASET"
    return [f"MODEL.NUM_CLASSES={classes} ({origin}) does not fit {what}; using the data set's number of classes"]


def _add_defaults(result: Translation, source: str) -> dict[str, object]:
    """Add homework defaults that depend on other settings, remove those that do not apply, and set the name of the run.

    Returns:
        The settings that were added, by dotted key, except for the name and output folder of the run.

    Raises:
        UserError: MODEL.NAME is missing.
    """
    values, name = result.values, result.setting("model.name")
    optimizer = str(result.setting("train.optimizer.name"))
    if name is None:
        raise one_line_error(f"{source}: MODEL.NAME (model.name) is missing; give the name of a model, such as lenet")
    for key, rule in KEYS.items():
        if rule.optimizers and key not in result.given and optimizer not in rule.optimizers:
            del values[rule.target]
    implicit: dict[str, object] = dict(IMPLICIT_SETTINGS)
    if "TRAIN.WEIGHT_DECAY" not in result.given:
        implicit["train.optimizer.weight_decay"] = WEIGHT_DECAY.get(optimizer, 0.0)
    if optimizer == "sgd":  # torch rejects Nesterov momentum without momentum
        implicit["train.optimizer.nesterov"] = result.setting("train.optimizer.momentum") != 0
    if result.setting("train.schedule") == "cosine":
        implicit["train.schedule_options.per_epoch"] = True
    values |= implicit
    if isinstance(name, str):
        values["name"] = name.replace("/", "_")
        output = values["output"]
        # the run folder is OUTPUT/NAME, or OUTPUT if that already ends in NAME
        if isinstance(output, str) and PurePath(output).name == values["name"] and "name" not in result.direct:
            values["output"] = str(PurePath(output).parent)
    return implicit


def _resolve_contradictions(result: Translation) -> list[str]:
    """Reduce learning rates in LIMITED_BY_LR that exceed TRAIN.LR to TRAIN.LR.

    Returns:
        Warnings about reduced learning rates, and about dropout that MODEL.DROP_RATE=0 disables.
    """
    warnings = []
    name, drop_rate = str(result.setting("model.name")), result.given.get("MODEL.DROP_RATE")
    if name in DROPOUT and drop_rate is not None and result.setting("model.drop_rate") == 0:
        warnings.append(
            f"MODEL.DROP_RATE=0 ({drop_rate.origin}) switches off the dropout of {DROPOUT[name]} in {name}; "
            "leave out the key to keep it, like the homework"
        )
    limit = result.setting("train.lr")
    for key in LIMITED_BY_LR:
        target = KEYS[key].target
        value = result.values[target]
        if _is_number(limit) and _is_number(value) and 0 < limit < value and target not in result.direct:
            result.values[target] = limit
            warnings.append(f"{key}={value:g} ({result.sources[target][1]}) is cut to TRAIN.LR={limit:g}")
    return warnings


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def _describe_defaults(result: Translation, implicit: Mapping[str, object]) -> str:
    """Return a sentence that lists the homework's defaults in use. `implicit` is the result of `_add_defaults`."""
    keys = [
        f"{key}={rule.without or str(rule.default)}"
        for key, rule in KEYS.items()
        if key not in result.given
        and (rule.without or (rule.default is not None and rule.target in result.values))
        and rule.target not in result.direct
    ]
    others = [f"{key}={format_value(value)}" for key, value in implicit.items() if key not in result.direct]
    return (
        f"keys not given have the homework's defaults: {', '.join(keys) or 'none'}; settings without a homework key: "
        f"{', '.join(others) or 'none'}; {DIFFERENCES}"
    )
