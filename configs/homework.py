"""From the homework's settings to ours: what its keys mean together, and what the homework does and has no key for.

Knows no file and no YAML: `configs.load` hands over keys with their values and origins, and checks what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from configs.homework_keys import KEYS, HomeworkValue
from configs.suggestions import format_value, one_line_error

CLASSES = {"cifar10": 10, "medium_imagenet": 200}  # of the data sets that DATA.DATASET names
# What the homework's code does without a key for it. Torch's optimizers decay every parameter.
IMPLICIT_SETTINGS = {
    "aug.crop": "squash",
    "aug.flip": 0.5,
    "eval.crop_fraction": 1.0,
    "train.amp": "off",
    "train.optimizer.decay_biases": True,
}
WEIGHT_DECAY = {"adamw": 0.01}  # torch's own default, which the homework leaves as it is; 0 for all other optimizers
DROPOUT = {"alexnet": 0.5}  # which the homework keeps, since it does not read MODEL.DROP_RATE
# Keys that must not exceed TRAIN.LR. The homework never validates these, so its files may exceed it.
LIMITED_BY_LR = ("TRAIN.MIN_LR", "TRAIN.WARMUP_LR")
DIFFERENCES = (
    "unlike there, the last partial batch of an epoch is left out, and pixels are normalised by the mean and "
    "standard deviation of the data set itself"
)
_UNSET = object()


@dataclass
class TranslatedConfig:
    values: dict[str, Any] = field(default_factory=dict)  # by our dotted keys
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # for each: the homework's key, and its origin
    warnings: list[str] = field(default_factory=list)


def translate(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], with_defaults: bool, source: str
) -> TranslatedConfig:
    """Translate the given keys into settings of ours.

    Args:
        ours: our own settings, nested; they win over the translation, which must fit them.
        with_defaults: whether what is not given is as the homework trains, instead of our default.
        source: of the settings as a whole, for messages.

    Raises:
        UserError: DATA.DATASET or MODEL.NAME leaves open what is meant.
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
    words = []
    if unused:
        words.append(f"{', '.join(unused)}: without effect, since the loader's own threads prepare the batches (see "
                     "data.threads and data.prefetch) and evaluation keeps the stored order")  # fmt: skip
    words += _set_data_set(given, settings, with_defaults, result)
    taken = []
    if with_defaults:
        fixed = _add_defaults(given, settings, result, source)
        words += _resolve_contradictions(given, settings, result)
        taken = [f"{source}: {_describe_defaults(given, settings, result, fixed)}"]
    result.sources = {target: by for target, by in result.sources.items() if _lookup(settings, target) is _UNSET}
    result.warnings = [f"{source}: {'; '.join(words)}"] * bool(words) + taken
    return result


def _convert(key: str, entry: HomeworkValue) -> Any:
    try:
        return KEYS[key].convert(entry.value)
    except ValueError as error:
        raise one_line_error(f"{entry.origin}: {key}={format_value(entry.value)} {error}") from None


def _lookup(settings: Mapping[str, Any], dotted: str, otherwise: Any = _UNSET) -> Any:
    """Our own setting, or else `otherwise`; also where it is a section that is laid over one value."""
    value: Any = settings
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return otherwise
        value = value[part]
    return otherwise if isinstance(value, Mapping) else value


def _set_data_set(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], with_defaults: bool, result: TranslatedConfig
) -> list[str]:
    """Set data.path and model.num_classes, in which DATASET, DATA_PATH, IMG_SIZE and NUM_CLASSES work together."""
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
    # The homework's LeNet for CIFAR-10 has 200 outputs, of which labels name 10. Here the data set says how many.
    origin = result.sources.pop("model.num_classes")[1]
    del result.values["model.num_classes"]
    what = dataset if "DATA.DATASET" in given else f"{dataset}, which DATA.DATASET is where it is left out"
    return [f"MODEL.NUM_CLASSES={classes} ({origin}) does not fit {what}: the model gets as many as the data set"]


def _add_defaults(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], result: TranslatedConfig, source: str
) -> dict[str, Any]:
    """Add what follows from other settings. Return those settings of ours that have no key there."""

    def effective(target: str) -> Any:
        return _lookup(settings, target, result.values.get(target))

    values, optimizer, name = result.values, effective("train.optimizer.name"), effective("model.name")
    if name is None:
        raise one_line_error(f"{source}: MODEL.NAME (model.name) is missing; give the name of a model, such as lenet")
    for key, rule in KEYS.items():
        if rule.optimizers and key not in given and optimizer not in rule.optimizers:
            del values[rule.target]
    fixed = dict(IMPLICIT_SETTINGS)
    if "TRAIN.WEIGHT_DECAY" not in given:
        fixed["train.optimizer.weight_decay"] = WEIGHT_DECAY.get(str(optimizer), 0.0)
    if optimizer == "sgd":  # torch refuses Nesterov's method without momentum
        fixed["train.optimizer.nesterov"] = effective("train.optimizer.momentum") != 0
    if effective("train.schedule") == "cosine":
        fixed["train.schedule_options.per_epoch"] = True
    values |= fixed
    if isinstance(name, str):
        _name_run(name.replace("/", "_"), settings, result)
    return fixed


def _resolve_contradictions(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], result: TranslatedConfig
) -> list[str]:
    """Lower the learning rates of LIMITED to TRAIN.LR. Return notes on them, and on a dropout that is switched off."""
    words = []
    name, drop_rate = (_lookup(settings, key, result.values.get(key)) for key in ("model.name", "model.drop_rate"))
    if str(name) in DROPOUT and "MODEL.DROP_RATE" in given and drop_rate == 0:
        words.append(f"MODEL.DROP_RATE=0 ({given['MODEL.DROP_RATE'].origin}) switches off the dropout of "
                     f"{DROPOUT[name]} in {name}; leave the key out to keep it, as the homework does")  # fmt: skip
    limit = _lookup(settings, "train.lr", result.values["train.lr"])
    for key in LIMITED_BY_LR:
        target = KEYS[key].target
        value = result.values[target]
        are_numbers = type(limit) in (int, float) and type(value) in (int, float)
        if are_numbers and 0 < limit < value and _lookup(settings, target) is _UNSET:
            result.values[target] = limit
            words.append(f"{key}={value:g} ({result.sources[target][1]}) is cut to TRAIN.LR={limit:g}")
    return words


def _name_run(name: str, settings: Mapping[str, Any], result: TranslatedConfig) -> None:
    """Put the run into OUTPUT/NAME, or into OUTPUT where that ends in NAME already."""
    result.values["name"] = name
    output = result.values["output"]
    if isinstance(output, str) and PurePath(output).name == name and _lookup(settings, "name") is _UNSET:
        result.values["output"] = str(PurePath(output).parent)


def _describe_defaults(
    given: Mapping[str, HomeworkValue], settings: Mapping[str, Any], result: TranslatedConfig, fixed: Mapping[str, Any]
) -> str:
    """Return in words what nothing says and what was taken; fixed: settings of ours that have no key."""
    keys = [
        f"{key}={rule.without or str(rule.default)}"
        for key, rule in KEYS.items()
        if key not in given
        and (rule.without or (rule.default is not None and rule.target in result.values))
        and _lookup(settings, rule.target) is _UNSET
    ]
    others = [f"{key}={format_value(value)}" for key, value in fixed.items() if _lookup(settings, key) is _UNSET]
    return (f"not given, so taken as the homework trains: {', '.join(keys) or 'no key'}; without a key there: "
            f"{', '.join(others) or 'nothing'}; {DIFFERENCES}")  # fmt: skip
