"""The homework's settings, which stand in capitals (`TRAIN.LR`): what each of them means here, and its default there.

Knows no file and no YAML: `configs.load` hands over keys with their values and origins, and checks what comes back. A
value that needs no translation, or has none, is handed on as it is: the check of our own setting says what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from configs.hints import KeyPath, allowed_keys, one_line, show

CLASSES = {"cifar10": 10, "medium_imagenet": 200}  # of the data sets that DATA.DATASET names
# What the homework does and has no key for.
FIXED = {"aug.crop": "none", "aug.flip": 0.5, "eval.crop_fraction": 1.0, "train.optimizer.nesterov": False}
ADAMW_WEIGHT_DECAY = 0.01  # torch's own default, which the homework leaves as it is; 0 for all other optimizers
# Settings that may not exceed another one. The homework reads none of them: its defaults contradict many a file.
LIMITS = {"train.warmup_epochs": "train.epochs", "train.min_lr": "train.lr", "train.warmup_lr": "train.lr"}
SCHEDULES = {  # by the letters of their names, without an LR at the end
    **{name: name for name in ("cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial")},
    "cosineannealing": "cosine",
    "none": "constant",
    "poly": "polynomial",
    "plateau": "plateau",
    "reducelronplateau": "plateau",
    "onecycle": "one-cycle",
}
UNSET = object()


class Given(NamedTuple):
    value: Any
    origin: str  # file and line, or what else says it


@dataclass(frozen=True)
class Key:
    target: str = ""  # our setting; empty: a DALI loader has no use for it
    default: Any = None  # the homework's; None: ours holds
    convert: Callable[[Any], Any] = lambda value: value
    null: Any = None  # what a null in the file means; None: the default


@dataclass
class Translation:
    values: dict[str, Any] = field(default_factory=dict)  # by our dotted keys
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)  # for each: the homework's key, and its origin
    notes: list[str] = field(default_factory=list)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _schedule(value: Any) -> Any:
    """cosine, CosineAnnealingLR, StepLR, ReduceLROnPlateau, one_cycle …"""
    letters = re.sub("[^a-z]", "", value.lower()).removesuffix("lr") if isinstance(value, str) else ""
    return SCHEDULES.get(letters, value)


def _zero_is_null(value: Any) -> Any:
    return None if type(value) in (int, float) and value == 0 else value


def _empty_is_null(value: Any) -> Any:
    return None if value == "" else value


def _crop_mode(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true (the central square) or false (the whole image, squashed)")
    return "center" if value else "squash"


def _policy(value: Any) -> Any:
    return "none" if value is False or _lower(value) in ("", "none", "off") else value


KEYS = {
    "DATA.BATCH_SIZE": Key("data.batch_size", 128),
    "DATA.DATA_PATH": Key("data.path", ""),
    "DATA.DATASET": Key("data.path", "cifar10", _lower),  # where DATA_PATH is empty
    "DATA.IMG_SIZE": Key("data.image_size", 224),
    "DATA.INTERPOLATION": Key("data.interpolation", "bicubic", _lower),
    "DATA.PIN_MEMORY": Key(),
    "DATA.NUM_WORKERS": Key(),
    "MODEL.NAME": Key("model.name"),
    "MODEL.RESUME": Key("resume", "", _empty_is_null),
    "MODEL.NUM_CLASSES": Key("model.num_classes"),  # 1000 there, which no data set of the homework has
    # AlexNet's dropout of 0.5 is part of its definition there, and the declared default of 0 does not take it away.
    "MODEL.DROP_RATE": Key("model.drop_rate", 0, _zero_is_null),
    "MODEL.LABEL_SMOOTHING": Key("train.label_smoothing", 0.0),
    "TRAIN.START_EPOCH": Key("train.first_epoch", 0),
    "TRAIN.EPOCHS": Key("train.epochs", 300),
    "TRAIN.WARMUP_EPOCHS": Key("train.warmup_epochs", 20),
    "TRAIN.LR": Key("train.lr", 5e-4),
    "TRAIN.MIN_LR": Key("train.min_lr", 5e-4),
    "TRAIN.WARMUP_LR": Key("train.warmup_lr", 5e-4),
    "TRAIN.ACCUMULATION_STEPS": Key("train.accumulation_steps", 1),
    "TRAIN.WEIGHT_DECAY": Key("train.optimizer.weight_decay"),
    "TRAIN.CLIP_GRAD": Key("train.clip_grad_norm", 0.0, _zero_is_null),
    "TRAIN.LR_SCHEDULER.NAME": Key("train.schedule", "cosine", _schedule),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key("train.schedule_options.epochs"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key("train.schedule_options.rate"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": Key("train.schedule_options.milestones"),
    "TRAIN.OPTIMIZER.NAME": Key("train.optimizer.name", "adamw", _lower),
    "TRAIN.OPTIMIZER.EPS": Key("train.optimizer.eps", 1e-8),
    "TRAIN.OPTIMIZER.BETAS": Key("train.optimizer.betas", [0.9, 0.999]),
    "TRAIN.OPTIMIZER.MOMENTUM": Key("train.optimizer.momentum", 0.9),
    "AUG.COLOR_JITTER": Key("aug.color_jitter", 0.4, null=0.0),
    "AUG.RAND_AUGMENT": Key("aug.auto", "rand-m9-mstd0.5-inc1", _policy, null="none"),
    "AUG.MIXUP": Key("aug.mix.mixup", 0.0),
    "AUG.CUTMIX": Key("aug.mix.cutmix", 0.0),
    "AUG.REPROB": Key("aug.erase.probability", 0.0),
    "TEST.CROP": Key("eval.crop_mode", True, _crop_mode),
    "TEST.SEQUENTIAL": Key(),
    "TEST.SHUFFLE": Key(),
    "OUTPUT": Key("output", "output", lambda value: "output" if value == "" else value),
    "SAVE_FREQ": Key("train.save_every_epochs", 1),
    "PRINT_FREQ": Key("log.every_steps", 10),
    "SEED": Key("seed", 0),
    "EVAL_MODE": Key("eval.only", False),
}
SECTIONS = list(dict.fromkeys(key.rsplit(".", n)[0] for key in KEYS for n in range(key.count("."), 0, -1)))


def collect(values: Mapping[str, Any], origins: Mapping[KeyPath, str], path: KeyPath = ()) -> dict[str, Given]:
    """The keys in `values`, dotted; raises `UserError` for one that the homework does not have."""
    found: dict[str, Given] = {}
    for name, value in values.items():
        key_path = (*path, name)
        key, origin = ".".join(key_path), origins[key_path]
        if "." not in name and key in KEYS:
            found[key] = Given(value, origin)
        elif "." in name or key not in SECTIONS:
            raise one_line(f"{origin}: {key}={show(value)} is unknown; {allowed_keys(key_path, [*SECTIONS, *KEYS])}")
        elif isinstance(value, Mapping):
            found |= collect(value, origins, key_path)
        elif value is not None:  # a section without keys
            allowed = allowed_keys((*key_path, ""), [*SECTIONS, *KEYS])
            raise one_line(f"{origin}: {key}={show(value)} must be a section; {allowed}")
    return found


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

    def effective(target: str) -> Any:
        return _find(ours, target, result.values.get(target))

    problems = []
    if unused:
        problems.append(f"{', '.join(unused)}: without effect, since DALI's own threads prepare the batches (see "
                        "data.threads and data.prefetch) and evaluation keeps the stored order")  # fmt: skip
    problems += _settle_data_set(given, ours, with_defaults, result)
    if with_defaults:
        optimizer = effective("train.optimizer.name")
        result.values.setdefault("train.optimizer.weight_decay", ADAMW_WEIGHT_DECAY if optimizer == "adamw" else 0.0)
        if effective("train.schedule") == "one-cycle" and "TRAIN.WARMUP_EPOCHS" not in given:
            result.values["train.warmup_epochs"] = 0  # it rises by itself
        name = effective("model.name")
        if name is None:
            raise one_line(f"{source}: MODEL.NAME (model.name) is missing; give the name of a model, such as lenet")
        if isinstance(name, str):
            result.values["name"] = name.replace("/", "_")  # the run lies in OUTPUT/NAME
        problems += _cut_defaults(given, ours, result)
    result.sources = {target: by for target, by in result.sources.items() if _find(ours, target) is UNSET}
    result.notes = [f"{source}: {'; '.join(problems)}"] if problems else []
    return result


def _converted(key: str, entry: Given) -> Any:
    try:
        return KEYS[key].convert(entry.value)
    except ValueError as error:
        raise one_line(f"{entry.origin}: {key}={show(entry.value)} {error}") from None


def _find(ours: Mapping[str, Any], dotted: str, otherwise: Any = UNSET) -> Any:
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
    is_asked = with_defaults and path.value == "" and _find(ours, "data.path") is UNSET
    if "DATA.DATASET" not in given and not is_asked:
        return []
    if "data.path" not in result.values and _find(ours, "data.path") is UNSET:
        if dataset not in CLASSES:
            raise one_line(f"{named.origin}: DATA.DATASET={show(named.value)} is unknown; use {' or '.join(CLASSES)}, or give "
                           "the folder of a converted data set as DATA.DATA_PATH")  # fmt: skip
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


def _cut_defaults(given: Mapping[str, Given], ours: Mapping[str, Any], result: Translation) -> list[str]:
    """Lower what only the homework's defaults say to what the file says in LIMITS."""
    words = []
    for key, rule in KEYS.items():
        if rule.target not in LIMITS or key in given or _find(ours, rule.target) is not UNSET:
            continue
        limit = _find(ours, LIMITS[rule.target], result.values[LIMITS[rule.target]])
        value = result.values[rule.target]
        if type(limit) in (int, float) and 0 < limit < value:
            result.values[rule.target] = limit
            words.append(f"{key} is not given, and its default {value} is cut to {LIMITS[rule.target]}={limit}")
    return words
