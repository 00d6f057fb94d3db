"""Keys of the homework's configs, such as `TRAIN.LR`, with the settings that they translate to and their defaults.

A default is the value that the homework's code effectively uses. It may differ from the default that the code declares,
since the code never reads the keys for warm-up, minimum learning rate, interpolation, RandAugment, color jitter,
dropout, the scheduler and others.

Invalid values are usually passed on unchanged, and the schema rejects them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from configs.suggestions import KeyPath, format_value, one_line_error, suggest_keys

SCHEDULES = {  # keys: lowercase letters of the homework's name, without a final "lr"
    **{name: name for name in ("cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial")},
    "cosineannealing": "cosine",
    "none": "constant",
    "poly": "polynomial",
    "plateau": "plateau",
    "reducelronplateau": "plateau",
    "onecycle": "one-cycle",
}


class HomeworkValue(NamedTuple):
    """Value of a homework key and its origin."""

    value: object
    origin: str  # file and line, or --opts


@dataclass(frozen=True)
class KeyRule:
    """Translation of one homework key."""

    target: str = ""  # dotted setting; empty: the key has no effect here
    default: object = None  # the homework's value if the key is missing; None: the schema's default
    convert: Callable[[object], object] = lambda value: value
    null: object = None  # value that replaces a null in the file; None: use the default
    without: str = ""  # for messages, what applies if the key is missing; empty: `default`
    optimizers: tuple[str, ...] = ()  # optimizers to which the default applies; empty: all


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _schedule(value: object) -> object:
    """Return the name of the schedule for a scheduler name such as cosine, StepLR, ReduceLROnPlateau or one_cycle.

    Unknown names are returned unchanged.
    """
    letters = re.sub("[^a-z]", "", value.lower()).removesuffix("lr") if isinstance(value, str) else ""
    return SCHEDULES.get(letters, value)


def _zero_is_null(value: object) -> object:
    return None if type(value) in (int, float) and value == 0 else value


def _empty_is_null(value: object) -> object:
    return None if value == "" else value


def _crop_mode(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("must be true (the central square) or false (the whole image, squashed)")
    return "center" if value else "squash"


def _policy(value: object) -> object:
    return "none" if value is False or _lower(value) in ("", "none", "off") else value


KEYS = {
    "DATA.BATCH_SIZE": KeyRule("data.batch_size", 128),
    "DATA.DATA_PATH": KeyRule("data.path"),
    "DATA.DATASET": KeyRule("data.path", "cifar10", _lower),  # if DATA_PATH is empty
    "DATA.IMG_SIZE": KeyRule("data.image_size", 224),
    "DATA.INTERPOLATION": KeyRule("data.interpolation", "bilinear", _lower),
    "DATA.PIN_MEMORY": KeyRule(),
    "DATA.NUM_WORKERS": KeyRule(),
    "MODEL.NAME": KeyRule("model.name"),
    "MODEL.RESUME": KeyRule("resume", convert=_empty_is_null, without="none"),
    "MODEL.NUM_CLASSES": KeyRule("model.num_classes", without="the data set's"),
    "MODEL.DROP_RATE": KeyRule("model.drop_rate", without="the model's own"),
    "MODEL.LABEL_SMOOTHING": KeyRule("train.label_smoothing"),
    "TRAIN.START_EPOCH": KeyRule("train.first_epoch", 0),
    "TRAIN.EPOCHS": KeyRule("train.epochs", 300),
    "TRAIN.WARMUP_EPOCHS": KeyRule("train.warmup_epochs", 0),
    "TRAIN.LR": KeyRule("train.lr", 5e-4),
    "TRAIN.MIN_LR": KeyRule("train.min_lr", 0),
    "TRAIN.WARMUP_LR": KeyRule("train.warmup_lr", 0),
    "TRAIN.ACCUMULATION_STEPS": KeyRule("train.accumulation_steps", 1),
    "TRAIN.WEIGHT_DECAY": KeyRule("train.optimizer.weight_decay"),
    "TRAIN.CLIP_GRAD": KeyRule("train.clip_grad_norm", convert=_zero_is_null),
    "TRAIN.LR_SCHEDULER.NAME": KeyRule("train.schedule", "cosine", _schedule, null="constant"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": KeyRule("train.schedule_options.epochs"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": KeyRule("train.schedule_options.rate"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": KeyRule("train.schedule_options.milestones"),
    "TRAIN.OPTIMIZER.NAME": KeyRule("train.optimizer.name", "adamw", _lower),
    "TRAIN.OPTIMIZER.EPS": KeyRule("train.optimizer.eps", 1e-8, optimizers=("adamw", "adam")),
    "TRAIN.OPTIMIZER.BETAS": KeyRule("train.optimizer.betas", [0.9, 0.999], optimizers=("adamw", "adam")),
    "TRAIN.OPTIMIZER.MOMENTUM": KeyRule("train.optimizer.momentum", 0.9, optimizers=("sgd",)),
    "AUG.COLOR_JITTER": KeyRule("aug.color_jitter", 0.4, null=0.0),
    "AUG.RAND_AUGMENT": KeyRule("aug.auto", "none", _policy, null="none"),
    "AUG.MIXUP": KeyRule("aug.mix.mixup"),
    "AUG.CUTMIX": KeyRule("aug.mix.cutmix"),
    "AUG.REPROB": KeyRule("aug.erase.probability"),
    "TEST.CROP": KeyRule("eval.crop_mode", False, _crop_mode),
    "TEST.SEQUENTIAL": KeyRule(),
    "TEST.SHUFFLE": KeyRule(),
    "OUTPUT": KeyRule("output", "output", lambda value: "output" if value == "" else value),
    "SAVE_FREQ": KeyRule("train.save_every_epochs", 1),
    "PRINT_FREQ": KeyRule("log.every_steps", 50),
    "SEED": KeyRule("seed", 0),
    "EVAL_MODE": KeyRule("eval.only", False),
}
SECTIONS = list(dict.fromkeys(key.rsplit(".", n)[0] for key in KEYS for n in range(key.count("."), 0, -1)))


def flatten_keys(
    values: Mapping[str, object], origins: Mapping[KeyPath, str], path: KeyPath = ()
) -> dict[str, HomeworkValue]:
    """Return the values of nested homework keys by dotted key.

    Args:
        values: Nested values.
        origins: File and line, or --opts, of each key.
        path: Key of the section that contains `values`.

    Raises:
        UserError: A key is not one of the homework's keys, or a section is given as a single value.
    """
    found: dict[str, HomeworkValue] = {}
    for name, value in values.items():
        key_path = (*path, name)
        key, origin = ".".join(key_path), origins[key_path]
        problem = ""
        if "." not in name and key in KEYS:
            found[key] = HomeworkValue(value, origin)
        elif "." in name or key not in SECTIONS:
            problem = f"is unknown; {suggest_keys(key_path, [*SECTIONS, *KEYS])}"
        elif isinstance(value, Mapping):
            found |= flatten_keys(value, origins, key_path)
        elif value is not None:  # null is a section without keys
            problem = f"must be a section; {suggest_keys((*key_path, ''), [*SECTIONS, *KEYS])}"
        if problem:
            raise one_line_error(f"{origin}: {key}={format_value(value)} {problem}")
    return found
