"""What the results of a run follow from: a run that is resumed must agree with its checkpoint in all of it.

Knows settings and what a checkpoint says of its run, and nothing of loaders and networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import parse_config
from configs.schema import Config, DataConfig, Section
from configs.stages import section_at

# Settings of training that results do not follow from, or not to the last digit, which a resumed run may change.
FREE = ("accumulation_steps", "amp", "compile", "cuda_graph", "channels_last", "save_every_steps", "save_every_epochs",
        "eval_every_epochs")  # fmt: skip
EVALUATION = ("image_size", "crop_mode", "crop_fraction", "tta")  # what eval's losses and accuracies follow from


def stream_of(config: Config, data_set: str, passes: int) -> dict[str, Any]:
    """What a checkpoint says of its run beside the config; data_set: its fingerprint.

    passes: forward passes of an optimizer update, over all ranks.
    """
    return {"data set": data_set, "global batch": config.data.batch_size * passes}


def identity(config: Config, stream: dict[str, Any]) -> dict[str, Any]:
    """Samples, augmentation, model, schedule and optimizer by names for errors; stream: of `stream_of`."""
    data, train = config.data, config.train
    passes = stream["global batch"] // data.batch_size
    return {
        "data set": stream["data set"],
        "seed": config.seed,
        "global batch": stream["global batch"],
        "data.train_split": data.train_split,
        "data.order": data.order,
        "data.window_shards": data.window_shards if data.order == "sequential-window" else None,
        "data.image_size": data.image_size,
        "data.interpolation": data.interpolation,
        "data.antialias": data.antialias,
        "data.stages (epoch, image size, global batch)": stages_of(data, passes),
        **flat_settings("aug", config.aug),
        **{
            f"model.{key}": value
            for key, value in config.model.model_dump(mode="json").items()
            if key != "num_classes"  # a check that the data set has as many
        },
        **flat_settings("train", train, without=FREE),
        **(watched(config) if train.schedule == "plateau" else {}),
    }


def stages_of(data: DataConfig, passes: int) -> list[tuple[int, int | None, int]]:
    """(first epoch, image size, global batch), which do not depend on how that batch is cut into ranks and passes."""
    sections = {stage.epoch: section_at(data, stage.epoch) for stage in data.stages}
    return [(epoch, section.image_size, section.batch_size * passes) for epoch, section in sections.items()]


def watched(config: Config) -> dict[str, Any]:
    """What the metric that schedule plateau watches follows from beside training itself."""
    if config.train.schedule_options.metric == "train_loss":
        return {}
    return {
        "train.eval_every_epochs": config.train.eval_every_epochs,
        "data.val_split": config.data.val_split,
        **{f"eval.{key}": getattr(config.eval, key) for key in EVALUATION},
    }


def flat_settings(name: str, section: Section, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The section's settings by dotted keys, those of sections inside as well, but for some."""
    flat: dict[str, Any] = {}
    for key, value in section.model_dump(mode="json").items():
        inner = getattr(section, key)
        if isinstance(inner, Section):
            flat |= flat_settings(f"{name}.{key}", inner)
        elif key not in without:
            flat[f"{name}.{key}"] = value
    return flat


def check_same_run(content: dict[str, Any], config: Config, stream: dict[str, Any], path: Path) -> None:
    """Refuse to go on with other samples or another optimizer than those the checkpoint in `path` comes from.

    Settings that the version which wrote it did not have count as what they are by default.
    """
    before = parse_config(content["config"], f"the config in {path}")
    then, now = identity(before, content["stream"]), identity(config, stream)
    changed = [
        f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"cannot resume from {path}, since settings differ ({'; '.join(changed)}); "
            f"restore them{_same_global_batch(config, then['global batch'], now['global batch'])} or start a new run "
            "without --resume"
        )


def _same_global_batch(config: Config, then: int, now: int) -> str:
    """How, with as many ranks as there are now: torchrun may start them again on fewer or more machines."""
    batch_size, accumulation = config.data.batch_size, config.train.accumulation_steps
    mended = {"data.batch_size": batch_size * then / now, "train.accumulation_steps": accumulation * then / now}
    ways = [f"{key}={int(value)}" for key, value in mended.items() if value == int(value)]
    return f", with {' or '.join(ways)} for the global batch," if then != now and ways else ""
