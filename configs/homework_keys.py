"""Map the homework's settings, which are written in capitals (`TRAIN.LR`), to ours and their defaults.

The default is what the homework's code does without the key, not what it declares: it never reads the keys of warm-up,
minimum learning rate, interpolation, RandAugment, colour jitter, dropout, scheduler and others.

Knows no file: `configs.load` hands over what a file holds. A value that needs no translation, or has none, is handed on
as it is: the check of our own setting says what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from configs.suggestions import KeyPath, allowed_keys, one_line, show

SCHEDULES = {  # by the letters of their names, without an LR at the end
    **{name: name for name in ("cosine", "linear", "constant", "step", "multistep", "exponential", "polynomial")},
    "cosineannealing": "cosine",
    "none": "constant",
    "poly": "polynomial",
    "plateau": "plateau",
    "reducelronplateau": "plateau",
    "onecycle": "one-cycle",
}


class Given(NamedTuple):
    value: Any
    origin: str  # file and line, or what else says it


@dataclass(frozen=True)
class Key:
    target: str = ""  # our setting; empty: a DALI loader has no use for it
    default: Any = None  # as the homework trains without the key; None: ours holds
    convert: Callable[[Any], Any] = lambda value: value
    null: Any = None  # what a null in the file means; None: the default
    without: str = ""  # what applies without the key, in words; empty: `default`
    optimizers: tuple[str, ...] = ()  # the default applies to these alone; empty: to all


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
    "DATA.DATA_PATH": Key("data.path"),
    "DATA.DATASET": Key("data.path", "cifar10", _lower),  # where DATA_PATH is empty
    "DATA.IMG_SIZE": Key("data.image_size", 224),
    "DATA.INTERPOLATION": Key("data.interpolation", "bilinear", _lower),
    "DATA.PIN_MEMORY": Key(),
    "DATA.NUM_WORKERS": Key(),
    "MODEL.NAME": Key("model.name"),
    "MODEL.RESUME": Key("resume", convert=_empty_is_null, without="none"),
    "MODEL.NUM_CLASSES": Key("model.num_classes", without="the data set's"),
    "MODEL.DROP_RATE": Key("model.drop_rate", without="the model's own"),
    "MODEL.LABEL_SMOOTHING": Key("train.label_smoothing"),
    "TRAIN.START_EPOCH": Key("train.first_epoch", 0),
    "TRAIN.EPOCHS": Key("train.epochs", 300),
    "TRAIN.WARMUP_EPOCHS": Key("train.warmup_epochs", 0),
    "TRAIN.LR": Key("train.lr", 5e-4),
    "TRAIN.MIN_LR": Key("train.min_lr", 0),
    "TRAIN.WARMUP_LR": Key("train.warmup_lr", 0),
    "TRAIN.ACCUMULATION_STEPS": Key("train.accumulation_steps", 1),
    "TRAIN.WEIGHT_DECAY": Key("train.optimizer.weight_decay"),
    "TRAIN.CLIP_GRAD": Key("train.clip_grad_norm", convert=_zero_is_null),
    "TRAIN.LR_SCHEDULER.NAME": Key("train.schedule", "cosine", _schedule, null="constant"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": Key("train.schedule_options.epochs"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": Key("train.schedule_options.rate"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": Key("train.schedule_options.milestones"),
    "TRAIN.OPTIMIZER.NAME": Key("train.optimizer.name", "adamw", _lower),
    "TRAIN.OPTIMIZER.EPS": Key("train.optimizer.eps", 1e-8, optimizers=("adamw", "adam")),
    "TRAIN.OPTIMIZER.BETAS": Key("train.optimizer.betas", [0.9, 0.999], optimizers=("adamw", "adam")),
    "TRAIN.OPTIMIZER.MOMENTUM": Key("train.optimizer.momentum", 0.9, optimizers=("sgd",)),
    "AUG.COLOR_JITTER": Key("aug.color_jitter", 0.4, null=0.0),
    "AUG.RAND_AUGMENT": Key("aug.auto", "none", _policy, null="none"),
    "AUG.MIXUP": Key("aug.mix.mixup"),
    "AUG.CUTMIX": Key("aug.mix.cutmix"),
    "AUG.REPROB": Key("aug.erase.probability"),
    "TEST.CROP": Key("eval.crop_mode", False, _crop_mode),
    "TEST.SEQUENTIAL": Key(),
    "TEST.SHUFFLE": Key(),
    "OUTPUT": Key("output", "output", lambda value: "output" if value == "" else value),
    "SAVE_FREQ": Key("train.save_every_epochs", 1),
    "PRINT_FREQ": Key("log.every_steps", 50),
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
