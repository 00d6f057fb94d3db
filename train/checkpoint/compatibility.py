"""Check that a resumed run uses the data and settings of its checkpoint, as far as they affect results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from configs.load import parse_config
from configs.schema import Config, DataConfig, Section
from configs.schema.optim import BUILT_IN_OPTIMIZERS, OPTIMIZER_DEFAULTS
from configs.stages import data_at
from configs.utils.errors import UserError
from pipelines.storage.dataset import fingerprint
from train.checkpoint.state import require_keys

# Settings in config section `train` that a resumed run can change. They affect at most the last digits of results, or
# only runs in which a failure occurs.
CHANGEABLE_SETTINGS = (
    "accumulation_steps",
    "amp",
    "compile",
    "cuda_graph",
    "channels_last",
    "save_every_steps",
    "save_every_epochs",
    "eval_every_epochs",
    "on_nonfinite",
)
EVALUATION_SETTINGS = ("image_size", "crop_mode", "crop_fraction", "tta")  # best.pt depends on them


def stream_info(config: Config, dataset: dict[str, Any], passes: int) -> dict[str, Any]:
    """Return the "stream" entry of a checkpoint: global batch size, data set fingerprint and data set details.

    Args:
        config: Config of the run.
        dataset: Contents of dataset.json.
        passes: Number of micro-batches per optimizer step, summed over all ranks.
    """
    return {
        "data set": fingerprint(dataset),
        "global batch": config.data.batch_size * passes,
        "data set in detail": _dataset_details(dataset),
    }


def _dataset_details(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return the data set properties that error messages use to explain why two fingerprints differ."""
    details: dict[str, Any] = {key: dataset[key] for key in ("name", "encoding", "image_shape")}
    details |= {"number of classes": len(dataset["classes"]), "classes by name": _digest(dataset["classes"])}
    for name, split in dataset["splits"].items():
        details |= {
            f"samples of split {name}": split["samples"],
            f"shards of split {name}": len(split["shards"]),
            f"shard list of split {name}": _digest(split["shards"]),
        }
    return details


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def run_fingerprint(config: Config, stream: dict[str, Any]) -> dict[str, Any]:
    """Return the data set fingerprint and all settings that affect results, keyed by their names in error messages.

    The settings cover samples, augmentation, model, schedule, optimizer and evaluation. `stream` is the "stream" entry
    of a checkpoint.
    """
    data, train = config.data, config.train
    passes = stream["global batch"] // data.batch_size
    has_average = train.ema.decay is not None  # without an average, eval.weights has no effect
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
        "data.stages (epoch, image size, global batch)": stage_sizes(data, passes),
        **flatten_settings("aug", config.aug),
        **{
            f"model.{key}": value
            for key, value in config.model.model_dump(mode="json").items()
            if key != "num_classes"  # only checked against the data set
        },
        **flatten_settings("train", train, without=CHANGEABLE_SETTINGS),
        "data.val_split": data.val_split,
        **{f"eval.{key}": getattr(config.eval, key) for key in EVALUATION_SETTINGS},
        "eval.weights": "raw" if has_average and config.eval.weights == "raw" else "auto",
        **(plateau_settings(config) if train.schedule == "plateau" else {}),
    }


def stage_sizes(data: DataConfig, passes: int) -> list[tuple[int, int | None, int]]:
    """Return (first epoch, image size, global batch size) of each stage in data.stages.

    `passes` is as in `stream_info`.
    """
    sections = {stage.epoch: data_at(data, stage.epoch) for stage in data.stages}
    return [(epoch, section.image_size, section.batch_size * passes) for epoch, section in sections.items()]


def plateau_settings(config: Config) -> dict[str, Any]:
    """Return the settings that affect results only with the plateau schedule.

    The result contains train.eval_every_epochs if the schedule monitors a validation metric, and is empty if it
    monitors train_loss.
    """
    if config.train.schedule_options.metric == "train_loss":
        return {}
    return {"train.eval_every_epochs": config.train.eval_every_epochs}


def flatten_settings(name: str, section: Section, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a section and its nested sections, keyed by dotted name.

    `without` lists settings to leave out. It does not apply to nested sections.
    """
    flat: dict[str, Any] = {}
    for key, value in section.model_dump(mode="json").items():
        inner = getattr(section, key)
        if isinstance(inner, Section):
            flat |= flatten_settings(f"{name}.{key}", inner)
        elif key not in without:
            flat[f"{name}.{key}"] = value
    return flat


def check_same_run(checkpoint: dict[str, Any], config: Config, stream: dict[str, Any], path: Path) -> None:
    """Check that a resumed run has the data and settings of its checkpoint, as far as they affect results.

    Settings missing from an older checkpoint are assumed to have their default values.

    Args:
        checkpoint: Contents of the checkpoint, from `store.load`.
        config: Config of the resumed run.
        stream: The "stream" entry of the resumed run, from `stream_info`.
        path: Path of the checkpoint, for error messages.

    Raises:
        UserError: An entry of the checkpoint is missing or invalid, or the data or settings differ. The message lists
            the differences, and says how to restore the global batch size if a single setting can restore it.
    """
    require_keys(checkpoint, ("config", "stream", "position", "progress"), path)
    has_accuracy = isinstance(checkpoint["progress"].get("best_top1"), int | float)
    if not has_accuracy or not _is_valid_stream(checkpoint["stream"]):
        raise UserError(
            f"checkpoint {path} has no record of the data of its run, unlike those of train/ddp.py; give another one"
        )
    before = parse_config(checkpoint["config"], f"the config in {path}")
    then, now = run_fingerprint(before, checkpoint["stream"]), run_fingerprint(config, stream)
    then |= _used_by_timm(checkpoint, then, now)
    if then["data set"] != now["data set"]:
        then |= _detailed_dataset(checkpoint["stream"], stream)
        now |= _detailed_dataset(stream, checkpoint["stream"])
    changed = [
        f"{key}: {_format(then.get(key))} then, {_format(now.get(key))} now"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"cannot resume from {path}, since settings differ ({'; '.join(changed)}); "
            f"restore them{_global_batch_advice(config, then['global batch'], now['global batch'])} or start a new run "
            "without --resume"
        )


def _used_by_timm(checkpoint: dict[str, Any], then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a timm optimizer actually used, for the settings that differ between two fingerprints.

    Older versions recorded their own defaults in the config, but ran timm optimizers with timm's defaults. The result
    is empty if the checkpoint's optimizer is not from timm.

    Args:
        checkpoint: Contents of the checkpoint. Values missing from its optimizer state are taken from `now`.
        then: Result of `run_fingerprint` for the checkpoint.
        now: Result of `run_fingerprint` for the current run.
    """
    try:
        group = checkpoint["optimizer"]["param_groups"][0]
    except (KeyError, IndexError, TypeError):  # reported when the checkpoint is loaded
        return {}
    if not isinstance(group, dict) or then["train.optimizer.name"] in BUILT_IN_OPTIMIZERS:
        return {}
    keys = {f"train.optimizer.{key}": key for key in OPTIMIZER_DEFAULTS}
    different = {key: name for key, name in keys.items() if then[key] != now[key]}
    used = {key: group.get(name, now[key]) for key, name in different.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in used.items()}


def _format(value: Any) -> str:
    """Return a value as one line of JSON, for error messages."""
    return json.dumps(value, ensure_ascii=False)


def _is_valid_stream(stream: dict[str, Any]) -> bool:
    """Return True if the "stream" entry is valid. The details are optional, since early versions did not write them."""
    batch, details = stream.get("global batch"), stream.get("data set in detail", {})
    return isinstance(stream.get("data set"), str) and type(batch) is int and batch > 0 and isinstance(details, dict)


def _detailed_dataset(stream: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the data set details of `stream`, to replace the fingerprint in an error message.

    The result is empty if `stream` or `other` has no details, or if their details are equal.
    """
    details, others = stream.get("data set in detail", {}), other.get("data set in detail", {})
    if not details or not others or details == others:
        return {}
    return {"data set": None, **{f"data set: {key}": value for key, value in details.items()}}


def _global_batch_advice(config: Config, then: int, now: int) -> str:
    """Return advice, for an error message, on how to restore the global batch size with the current number of ranks.

    The number of ranks can change, since torchrun can restart on fewer or more machines. The advice is empty if the
    global batch size is unchanged, or if no single setting restores it.

    Args:
        config: Config of the current run.
        then: Global batch size of the checkpoint.
        now: Global batch size of the current run.
    """
    batch_size, accumulation = config.data.batch_size, config.train.accumulation_steps
    exact = {"data.batch_size": batch_size * then / now, "train.accumulation_steps": accumulation * then / now}
    advice = [f"{key}={int(value)}" for key, value in exact.items() if value == int(value)]
    return f", with {' or '.join(advice)} for the global batch," if then != now and advice else ""
