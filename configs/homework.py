"""Translate the keys of the homework's configs (see docs/homework.md) to settings.

This includes behavior of the homework that depends on several keys, or that has no key. `configs.load` passes the
values with their origins to `translate`, and validates the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

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
_UNSET = object()


@dataclass
class TranslatedConfig:
    """Settings translated from the homework's keys."""

    values: dict[str, Any] = field(default_factory=dict)  # by dotted key
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # homework key and its origin, by dotted key
    warnings: list[str] = field(default_factory=list)


def translate(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], with_defaults: bool, source: str
) -> TranslatedConfig:
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
    result = TranslatedConfig()
    unused = [f"{key} ({entry.origin})" for key, entry in given.items() if not KEYS[key].target]
    nulls = {key: entry._replace(value=KEYS[key].null) for key, entry in given.items() if entry.value is None}
    given = {key: entry for key, entry in {**given, **nulls}.items() if entry.value is not None and KEYS[key].target}
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
    warnings += _set_data_set(given, settings, with_defaults, result)
    defaults = []
    if with_defaults:
        implicit = _add_defaults(given, settings, result, source)
        warnings += _resolve_contradictions(given, settings, result)
        defaults = [f"{source}: {_describe_defaults(given, settings, result, implicit)}"]
    result.sources = {target: by for target, by in result.sources.items() if _lookup(settings, target) is _UNSET}
    result.warnings = [f"{source}: {'; '.join(warnings)}"] * bool(warnings) + defaults
    return result


def _convert(key: str, entry: HomeworkValue) -> Any:
    try:
        return KEYS[key].convert(entry.value)
    except ValueError as error:
        raise one_line_error(f"{entry.origin}: {key}={format_value(entry.value)} {error}") from None


def _lookup(settings: Mapping[str, Any], dotted: str, otherwise: Any = _UNSET) -> Any:
    """Return the setting with a dotted key, or `otherwise` if the setting is missing or is a section."""
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return otherwise if isinstance(value, Mapping) else value


def _set_data_set(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], with_defaults: bool, result: TranslatedConfig
) -> list[str]:
    """Set data.path from DATA_PATH, or from DATASET and IMG_SIZE, and drop a NUM_CLASSES that contradicts DATASET.

    Returns:
        Warnings for the user.

    Raises:
        UserError: DATA.DATASET is unknown and no path is given.
    """
    named = given.get("DATA.DATASET", HomeworkValue("cifar10", ""))
    dataset = named.value.lower() if isinstance(named.value, str) else format_value(named.value)
    path = given.get("DATA.DATA_PATH", HomeworkValue("", ""))
    result.values.pop("data.path", None)
    if path.value != "":
        result.values["data.path"] = path.value
        result.sources["data.path"] = ("DATA.DATA_PATH", path.origin)
    if "DATA.DATASET" not in given and not (with_defaults and path.value == ""):
        return []
    if "data.path" not in result.values and _lookup(settings, "data.path") is _UNSET:
        if dataset not in CLASSES:
            raise one_line_error(
                f"{named.origin}: DATA.DATASET={format_value(named.value)} is unknown; use {' or '.join(CLASSES)}, "
                "or give the folder of a converted data set as DATA.DATA_PATH"
            )
        size = _lookup(settings, "data.image_size", result.values.get("data.image_size"))
        suffix = "-96" if type(size) is int and size <= 96 else "-224"
        result.values["data.path"] = "data/cifar10" if dataset == "cifar10" else f"data/medium-imagenet{suffix}"
    classes = result.values.get("model.num_classes")
    if dataset not in CLASSES or type(classes) is not int or classes == CLASSES[dataset]:
        return []
    # The homework's LeNet for CIFAR-10 has 200 outputs and uses 10 of them. Here the data set decides the number.
    origin = result.sources.pop("model.num_classes")[1]
    del result.values["model.num_classes"]
    what = dataset if "DATA.DATASET" in given else f"{dataset}, the default of DATA.DATASET"
    return [f"MODEL.NUM_CLASSES={classes} ({origin}) does not fit {what}; using the data set's number of classes"]


def _add_defaults(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], result: TranslatedConfig, source: str
) -> dict[str, Any]:
    """Add homework defaults that depend on other settings, remove those that do not apply, and set the name of the run.

    Returns:
        The settings that were added, by dotted key, except for the name and output folder of the run.

    Raises:
        UserError: MODEL.NAME is missing.
    """

    def effective(target: str) -> Any:
        return _lookup(settings, target, result.values.get(target))

    values, optimizer, name = result.values, effective("train.optimizer.name"), effective("model.name")
    if name is None:
        raise one_line_error(f"{source}: MODEL.NAME (model.name) is missing; give the name of a model, such as lenet")
    for key, rule in KEYS.items():
        if rule.optimizers and key not in given and optimizer not in rule.optimizers:
            del values[rule.target]
    implicit = dict(IMPLICIT_SETTINGS)
    if "TRAIN.WEIGHT_DECAY" not in given:
        implicit["train.optimizer.weight_decay"] = WEIGHT_DECAY.get(str(optimizer), 0.0)
    if optimizer == "sgd":  # torch rejects Nesterov momentum without momentum
        implicit["train.optimizer.nesterov"] = effective("train.optimizer.momentum") != 0
    if effective("train.schedule") == "cosine":
        implicit["train.schedule_options.per_epoch"] = True
    values |= implicit
    if isinstance(name, str):
        _name_run(name.replace("/", "_"), settings, result)
    return implicit


def _resolve_contradictions(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], result: TranslatedConfig
) -> list[str]:
    """Reduce learning rates in LIMITED_BY_LR that exceed TRAIN.LR to TRAIN.LR.

    Returns:
        Warnings about reduced learning rates, and about dropout that MODEL.DROP_RATE=0 disables.
    """
    warnings = []
    name, drop_rate = (_lookup(settings, key, result.values.get(key)) for key in ("model.name", "model.drop_rate"))
    if str(name) in DROPOUT and "MODEL.DROP_RATE" in given and drop_rate == 0:
        warnings.append(
            f"MODEL.DROP_RATE=0 ({given['MODEL.DROP_RATE'].origin}) switches off the dropout of {DROPOUT[name]} in "
            f"{name}; leave out the key to keep it, like the homework"
        )
    limit = _lookup(settings, "train.lr", result.values["train.lr"])
    for key in LIMITED_BY_LR:
        target = KEYS[key].target
        value = result.values[target]
        are_numbers = type(limit) in (int, float) and type(value) in (int, float)
        if are_numbers and 0 < limit < value and _lookup(settings, target) is _UNSET:
            result.values[target] = limit
            warnings.append(f"{key}={value:g} ({result.sources[target][1]}) is cut to TRAIN.LR={limit:g}")
    return warnings


def _name_run(name: str, settings: Mapping[str, Any], result: TranslatedConfig) -> None:
    """Set name and output so that the run folder is OUTPUT/NAME, or OUTPUT if OUTPUT already ends in NAME."""
    result.values["name"] = name
    output = result.values["output"]
    if isinstance(output, str) and PurePath(output).name == name and _lookup(settings, "name") is _UNSET:
        result.values["output"] = str(PurePath(output).parent)


def _describe_defaults(
    given: Mapping[str, HomeworkValue],
    settings: Mapping[str, Any],
    result: TranslatedConfig,
    implicit: Mapping[str, Any],
) -> str:
    """Return a sentence that lists the homework's defaults in use. `implicit` is the result of `_add_defaults`."""
    keys = [
        f"{key}={rule.without or str(rule.default)}"
        for key, rule in KEYS.items()
        if key not in given
        and (rule.without or (rule.default is not None and rule.target in result.values))
        and _lookup(settings, rule.target) is _UNSET
    ]
    others = [f"{key}={format_value(value)}" for key, value in implicit.items() if _lookup(settings, key) is _UNSET]
    return (
        f"keys not given have the homework's defaults: {', '.join(keys) or 'none'}; settings without a homework key: "
        f"{', '.join(others) or 'none'}; {DIFFERENCES}"
    )
