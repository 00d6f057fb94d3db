"""Check that a resumed run uses the data and settings of its checkpoint, as far as they affect results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from configs.load import parse_config
from configs.schema import Config, DataConfig, Effect, TrainConfig, settings_by_key
from configs.schema.optim import BUILT_IN_OPTIMIZERS, OPTIMIZER_DEFAULTS
from configs.stages import data_at
from configs.utils.errors import UserError
from pipelines.storage.dataset import DatasetInfo, fingerprint
from train.checkpoint.state import Checkpoint, StreamInfo, require_keys

LANES, WINDOWS = "lanes of shards", "windows of shards"  # order of data.order=sequential-window, now and before


def stream_info(config: Config, dataset: DatasetInfo, passes: int) -> StreamInfo:
    """Return the "stream" entry of a checkpoint: data set, its details, global batch size, and order if not random.

    Args:
        config: Config of the run.
        dataset: Contents of dataset.json.
        passes: Number of micro-batches per optimizer step, summed over all ranks.
    """
    stream: StreamInfo = {
        "data set": fingerprint(dataset),
        "global batch": config.data.batch_size * passes,
        "data set in detail": _dataset_details(dataset),
    }
    if config.data.order == "sequential-window":
        stream["order"] = LANES
    return stream


def _dataset_details(dataset: DatasetInfo) -> dict[str, object]:
    """Return the data set properties that error messages use to explain why two fingerprints differ."""
    details: dict[str, object] = {
        "name": dataset.name,
        "encoding": dataset.encoding,
        "image_shape": dataset.image_shape and list(dataset.image_shape),
        "number of classes": len(dataset.classes),
        "classes by name": _digest(dataset.classes),
    }
    for name, split in dataset.splits.items():
        details |= {
            f"samples of split {name}": split.samples,
            f"shards of split {name}": len(split.shards),
            f"shard list of split {name}": _digest([vars(shard) for shard in split.shards]),
        }
    return details


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def run_fingerprint(config: Config, stream: StreamInfo) -> dict[str, object]:
    """Return what a resumed run may not change, keyed by its name in error messages.

    These are the data set, the global batch sizes, and the settings that affect results according to the schema.
    `stream` is the "stream" entry of a checkpoint.
    """
    data, train = config.data, config.train
    settings = settings_by_key(config, (Effect.RESULTS,))
    for key in ("data.batch_size", "train.accumulation_steps", "data.stages"):
        del settings[key]  # compared as global batch sizes, which other ranks and batch sizes can have too
    passes = stream["global batch"] // data.batch_size
    settings["data.stages (epoch, image size, global batch)"] = stage_sizes(data, passes)
    if data.order == "sequential-window":
        settings["data.order=sequential-window"] = stream.get("order", WINDOWS)
    else:
        del settings["data.window_shards"]
    if train.ema.decay is None or config.eval.weights == "ema":  # without an average, eval.weights has no effect
        settings["eval.weights"] = "auto"
    if train.schedule == "plateau" and train.schedule_options.metric != "train_loss":
        settings["train.eval_every_epochs"] = train.eval_every_epochs
    return {"data set": stream["data set"], "global batch": stream["global batch"], **settings}


def stage_sizes(data: DataConfig, passes: int) -> list[tuple[int, int | None, int]]:
    """Return (first epoch, image size, global batch size) of each stage in data.stages.

    `passes` is as in `stream_info`.
    """
    stages = [(stage.epoch, data_at(data, stage.epoch)) for stage in data.stages]
    return [(epoch, section.image_size, section.batch_size * passes) for epoch, section in stages]


def check_same_run(
    checkpoint: Checkpoint, config: Config, stream: StreamInfo, path: Path, *, extend: bool = False
) -> Config:
    """Check that a resumed run has the data and settings of its checkpoint, as far as they affect results.

    Settings missing from an older checkpoint are assumed to have their default values.

    Args:
        checkpoint: Contents of the checkpoint, from `store.load`.
        config: Config of the resumed run.
        stream: The "stream" entry of the resumed run, from `stream_info`.
        path: Path of the checkpoint, for error messages.
        extend: Whether the resumed run may have more epochs.

    Returns:
        The config of the checkpoint.

    Raises:
        UserError: An entry of the checkpoint is missing or invalid, or the data or settings differ. The message lists
            the differences, and says how to restore the global batch size if a single setting can restore it.
    """
    require_keys(checkpoint, ("config", "stream", "position", "progress"), path)
    has_accuracy = isinstance(checkpoint["progress"].get("best_top1"), int | float)
    old_stream = checkpoint["stream"]
    if not has_accuracy or not _is_valid_stream(old_stream):
        raise UserError(
            f"checkpoint {path} has no record of the data of its run, unlike those of train/ddp.py; give another one"
        )
    before = parse_config(checkpoint["config"], f"the config in {path}")
    then, now = run_fingerprint(before, old_stream), run_fingerprint(config, stream)
    then |= _used_by_timm(checkpoint, then, now)
    if then["data set"] != now["data set"]:
        then |= _detailed_dataset(old_stream, stream)
        now |= _detailed_dataset(stream, old_stream)
    is_longer = config.train.epochs > before.train.epochs
    if is_longer and extend:
        then |= {key: now[key] for key in _extended_settings(before.train)}
    changed = [
        f"{key}: {_format(then.get(key))} then, {_format(now.get(key))} now"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    if changed:
        advice = _global_batch_advice(config, old_stream["global batch"], stream["global batch"])
        longer = f"; add --extend to train up to {config.train.epochs} epochs" if is_longer and not extend else ""
        raise UserError(
            f"cannot resume from {path}, since settings differ ({'; '.join(changed)}); "
            f"restore them{advice} or start a new run without --resume{longer}"
        )
    return before


def _extended_settings(before: TrainConfig) -> list[str]:
    """Return the settings that --extend may change. A warm-up that was cut to the length of the run is one of them."""
    return ["train.epochs", *["train.warmup_epochs"] * (before.warmup_epochs == before.epochs)]


def _used_by_timm(checkpoint: Checkpoint, then: dict[str, object], now: dict[str, object]) -> dict[str, object]:
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


def _format(value: object) -> str:
    """Return a value as one line of JSON, for error messages."""
    return json.dumps(value, ensure_ascii=False)


def _is_valid_stream(stream: StreamInfo) -> bool:
    """Return True if the "stream" entry is valid. The details are optional, since early versions did not write them."""
    batch, details = stream.get("global batch"), stream.get("data set in detail", {})
    return isinstance(stream.get("data set"), str) and type(batch) is int and batch > 0 and isinstance(details, dict)


def _detailed_dataset(stream: StreamInfo, other: StreamInfo) -> dict[str, object]:
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
