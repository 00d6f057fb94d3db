"""From the homework's settings to ours: what its keys mean together, and what the homework does and has no key for.

Knows no file and no YAML: `configs.load` hands over keys with their values and origins, and checks what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.hints import one_line, show
from configs.homework_keys import KEYS, Given

CLASSES = {"cifar10": 10, "medium_imagenet": 200}  # of the data sets that DATA.DATASET names
# What the homework does and has no key for.
FIXED = {"aug.crop": "none", "aug.flip": 0.5, "eval.crop_fraction": 1.0, "train.optimizer.nesterov": False}
ADAMW_WEIGHT_DECAY = 0.01  # torch's own default, which the homework leaves as it is; 0 for all other optimizers
# Settings that may not exceed another one. The homework reads none of them: its defaults contradict many a file.
LIMITS = {"TRAIN.WARMUP_EPOCHS": "TRAIN.EPOCHS", "TRAIN.MIN_LR": "TRAIN.LR", "TRAIN.WARMUP_LR": "TRAIN.LR"}
_UNSET = object()


@dataclass
class Translation:
    values: dict[str, Any] = field(default_factory=dict)  # by our dotted keys
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # for each: the homework's key, and its origin
    notes: list[str] = field(default_factory=list)


def translate(given: Mapping[str, Given], ours: Mapping[str, Any], with_defaults: bool, source: str) -> Translation:
    """What the given keys mean here.

    Args:
        ours: our own settings, nested; they win over the translation, which must fit them.
        with_defaults: whether the homework's defaults hold for what is not given, instead of ours.
        source: of the settings as a whole, for messages.

    Raises:
        UserError: DATA.DATASET or MODEL.NAME leaves open what is meant.
    """
    result = Translation({**FIXED} if with_defaults else {})
    unused = [f"{key} ({entry.origin})" for key, entry in given.items() if not KEYS[key].target]
    nulls = {key: entry._replace(value=KEYS[key].null) for key, entry in given.items() if entry.value is None}
    given = {key: entry for key, entry in {**given, **nulls}.items() if entry.value is not None and KEYS[key].target}
    for key, rule in KEYS.items():
        if key in given:
            result.values[rule.target] = _converted(key, given[key])
            result.sources[rule.target] = (key, given[key].origin)
        elif with_defaults and rule.default is not None:
            result.values[rule.target] = rule.convert(rule.default)
    words = []
    if unused:
        words.append(f"{', '.join(unused)}: without effect, since the loader's own threads prepare the batches (see "
                     "data.threads and data.prefetch) and evaluation keeps the stored order")  # fmt: skip
    words += _settle_data_set(given, ours, with_defaults, result)
    if with_defaults:
        words += _settle_defaults(given, ours, result, source)
    result.sources = {target: by for target, by in result.sources.items() if _find(ours, target) is _UNSET}
    result.notes = [f"{source}: {'; '.join(words)}"] if words else []
    return result


def _converted(key: str, entry: Given) -> Any:
    try:
        return KEYS[key].convert(entry.value)
    except ValueError as error:
        raise one_line(f"{entry.origin}: {key}={show(entry.value)} {error}") from None


def _find(ours: Mapping[str, Any], dotted: str, otherwise: Any = _UNSET) -> Any:
    """Our own setting, or else `otherwise`; also where it is a section that is laid over one value."""
    value: Any = ours
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return otherwise if isinstance(value, Mapping) else value


def _settle_data_set(
    given: Mapping[str, Given], ours: Mapping[str, Any], with_defaults: bool, result: Translation
) -> list[str]:
    """Set data.path and model.num_classes, in which DATASET, DATA_PATH, IMG_SIZE and NUM_CLASSES work together."""
    named = given.get("DATA.DATASET", Given("cifar10", ""))
    dataset = named.value.lower() if isinstance(named.value, str) else show(named.value)
    path = given.get("DATA.DATA_PATH", Given("", ""))
    result.values.pop("data.path", None)
    if path.value != "":
        result.values["data.path"] = path.value
        result.sources["data.path"] = ("DATA.DATA_PATH", path.origin)
    is_asked = with_defaults and path.value == "" and _find(ours, "data.path") is _UNSET
    if "DATA.DATASET" not in given and not is_asked:
        return []
    if "data.path" not in result.values and _find(ours, "data.path") is _UNSET:
        if dataset not in CLASSES:
            raise one_line(
                f"{named.origin}: DATA.DATASET={show(named.value)} is unknown; use {' or '.join(CLASSES)}, "
                "or give the folder of a converted data set as DATA.DATA_PATH"
            )
        size = _find(ours, "data.image_size", result.values.get("data.image_size"))
        suffix = "-96" if type(size) is int and size <= 96 else "-224"
        result.values["data.path"] = "data/cifar10" if dataset == "cifar10" else f"data/medium-imagenet{suffix}"
    classes = result.values.get("model.num_classes")
    if dataset not in CLASSES or type(classes) is not int or classes == CLASSES[dataset]:
        return []
    # The homework's LeNet for CIFAR-10 has 200 outputs, of which labels name 10. Here the data set says how many.
    origin = result.sources.pop("model.num_classes")[1]
    del result.values["model.num_classes"]
    return [f"MODEL.NUM_CLASSES={classes} ({origin}) does not fit {dataset}: the model gets as many as the data set"]


def _settle_defaults(
    given: Mapping[str, Given], ours: Mapping[str, Any], result: Translation, source: str
) -> list[str]:
    """Add the defaults that follow from other settings."""

    def effective(target: str) -> Any:
        return _find(ours, target, result.values.get(target))

    weight_decay = ADAMW_WEIGHT_DECAY if effective("train.optimizer.name") == "adamw" else 0.0
    result.values.setdefault("train.optimizer.weight_decay", weight_decay)
    if effective("train.schedule") == "one-cycle" and "TRAIN.WARMUP_EPOCHS" not in given:
        result.values["train.warmup_epochs"] = 0  # it rises by itself
    name = effective("model.name")
    if name is None:
        raise one_line(f"{source}: MODEL.NAME (model.name) is missing; give the name of a model, such as lenet")
    if isinstance(name, str):
        result.values["name"] = name.replace("/", "_")  # the run lies in OUTPUT/NAME
    return _cut_defaults(given, ours, result)


def _cut_defaults(given: Mapping[str, Given], ours: Mapping[str, Any], result: Translation) -> list[str]:
    """Lower what only the homework's defaults say to what the file says in LIMITS."""
    words = []
    for key, limiting in LIMITS.items():
        target, limit_target = KEYS[key].target, KEYS[limiting].target
        if key in given or _find(ours, target) is not _UNSET:
            continue
        limit, value = _find(ours, limit_target, result.values[limit_target]), result.values[target]
        if type(limit) in (int, float) and 0 < limit < value:
            result.values[target] = limit
            words.append(f"{key} is not given, and its default {value} is cut to {limiting}={limit}")
    return words
