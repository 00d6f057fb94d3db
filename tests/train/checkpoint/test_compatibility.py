"""Data and settings that a resumed run must share with its checkpoint."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic.fields import FieldInfo

from configs.load import load_config, to_yaml
from configs.schema import Config, Effect, all_settings, effect, is_section, settings_by_key
from configs.utils.errors import UserError
from helpers.training import DIGITS
from pipelines.storage.dataset import DatasetInfo, fingerprint, parse_dataset
from train.checkpoint.compatibility import StreamInfo, check_same_run, stream_info
from train.optim.factory import with_timm_defaults

PATH = Path("last.pt")
STAGES = "data.stages=[{{epoch: 1, batch_size: {}}}, {{epoch: 2, image_size: 24}}]"
PLATEAU = ("train.schedule=plateau",)
# Settings that enable all others which have no effect by themselves.
ENABLING = ("data.order=sequential-window", "train.ema.decay=0.9", "train.loss=bce")
# Values for settings that `other_value` cannot derive from the type.
OTHER_VALUES: dict[str, object] = {
    "aug.auto.policy": "randaugment",
    "aug.custom": "own.py:augment",
    "data.cache": "/cache",
    "data.classes": "classes.txt",
    "data.stages": [{"epoch": 3, "image_size": 40}],
    "eval.weights": "raw",
    "train.keep_checkpoints": "every:2",
    "train.loss": "own.py:loss",
    "train.optimizer.name": "adam",
    "train.schedule_options.milestones": [3.0],
}
SETTINGS = [pytest.param(key, field, id=key) for key, field in all_settings() if not is_section(field)]


def config_of(*options: str) -> Config:
    return load_config(DIGITS, options)


def data_set_of(shards: int = 1, samples: int = 40, name: str = "digits", label: str = "ten") -> DatasetInfo:
    """Return a data set whose train split has `shards` shards."""
    files = [
        {"file": f"{number}.tar", "samples": samples // shards, "bytes": 9, "sha256": label} for number in range(shards)
    ]
    index = {"file": "train.index.npz", "bytes": 9, "sha256": label}
    split = {"samples": samples, "labelled": True, "source_rows": samples, "quarantined": [], "index": index}
    content = {"name": name, "classes": [label], "encoding": "npy", "image_shape": [8, 8, 3]}
    stats = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return parse_dataset({**content, **stats, "splits": {"train": {**split, "shards": files}}})


def checkpoint_of(config: Config, stream: StreamInfo) -> dict[str, Any]:
    """Return the entries about the run."""
    position = {"epoch": 1, "step": 0}
    return {"config": to_yaml(config), "stream": stream, "position": position, "progress": {"best_top1": 0.5}}


def check(then: Config, now: Config, text: str | None = None, passes: tuple[int, int] = (1, 1)) -> None:
    """Resume with `now` from a checkpoint of `then`, whose config is `text` if given."""
    data_set = data_set_of()
    content = checkpoint_of(then, stream_info(then, data_set, passes[0])) | ({"config": text} if text else {})
    check_same_run(content, now, stream_info(now, data_set, passes[1]), PATH)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["seed=7"], "seed: 0 then, 7 now"),
        (["data.batch_size=16"], "global batch: 64 then, 16 now"),
        (["data.interpolation=bicubic"], 'data.interpolation: "bilinear" then, "bicubic" now'),
        (["data.stages=[{epoch: 3, image_size: 40}]"], "global batch): [] then, [[3, 40, 64]] now"),
        (["aug.erase.probability=0.5"], "aug.erase.probability: 0.0 then, 0.5 now"),
        (["aug.auto=randaugment"], 'aug.auto.policy: "none" then, "randaugment" now'),
        (["model.activation=relu"], 'model.activation: null then, "relu" now'),
        (["train.schedule_options.rate=0.2"], "train.schedule_options.rate: 0.1 then, 0.2 now"),
        (["train.ema.decay=0.9"], "train.ema.decay: null then, 0.9 now"),
        (["train.clip_grad_value=1"], "train.clip_grad_value: null then, 1.0 now"),
        (["train.lr_batch_size=64"], "train.lr_batch_size: null then, 64 now"),
        (["train.loss=bce"], 'train.loss: "cross-entropy" then, "bce" now'),
        (["data.val_split=train"], 'data.val_split: "val" then, "train" now'),
        (["eval.crop_fraction=0.6"], "eval.crop_fraction: 1.0 then, 0.6 now"),
        (["train.optimizer.layer_decay=0.7"], "train.optimizer.layer_decay: null then, 0.7 now"),
    ],
)
def test_changed_setting_is_refused_with_both_values(options: list[str], difference: str) -> None:
    with pytest.raises(UserError, match=re.escape(difference)) as error:
        check(config_of(), config_of(*options))
    assert str(error.value).count(" then, ") == 1
    assert str(error.value).startswith("cannot resume from last.pt, since settings differ (")


@pytest.mark.parametrize(
    ("now", "differences"),
    [
        (
            data_set_of(shards=4),
            ["data set: shards of split train: 1 then, 4 now", "data set: shard list of split train: "],
        ),
        (data_set_of(samples=20), ["data set: samples of split train: 40 then, 20 now", "data set: shard list of "]),
        (data_set_of(label="other"), ["data set: classes by name: ", "data set: shard list of split train: "]),
        (data_set_of(name="mnist", shards=2), ['data set: name: "digits" then, "mnist" now', "data set: shards of "]),
    ],
)
def test_changed_data_set_is_refused_with_its_differences(now: DatasetInfo, differences: list[str]) -> None:
    config, then = config_of(), data_set_of()
    content = checkpoint_of(config, stream_info(config, then, 1))
    with pytest.raises(UserError, match=r"since settings differ \(data set: ") as error:
        check_same_run(content, config, stream_info(config, now, 1), PATH)
    for difference in differences:
        assert difference in str(error.value)
    assert fingerprint(then) not in str(error.value)


def test_renamed_data_set_is_accepted() -> None:
    config = config_of()
    content = checkpoint_of(config, stream_info(config, data_set_of(), 1))
    check_same_run(content, config, stream_info(config, data_set_of(name="copy"), 1), PATH)


def test_old_checkpoint_is_compared_by_fingerprint_only() -> None:
    config = config_of()
    stream = {"data set": fingerprint(data_set_of()), "global batch": 64}
    content = checkpoint_of(config, stream)
    check_same_run(content, config, stream_info(config, data_set_of(), 1), PATH)
    other = data_set_of(shards=2)
    with pytest.raises(
        UserError, match=f'\\(data set: "{fingerprint(data_set_of())}" then, "{fingerprint(other)}" now'
    ):
        check_same_run(content, config, stream_info(config, other, 1), PATH)


def test_windows_of_older_versions_are_refused() -> None:
    config = config_of("data.order=sequential-window")
    stream = stream_info(config, data_set_of(), 1)
    check_same_run(checkpoint_of(config, stream), config, stream, PATH)
    older = {key: value for key, value in stream.items() if key != "order"}
    with pytest.raises(UserError, match='sequential-window: "windows of shards" then, "lanes of shards" now'):
        check_same_run(checkpoint_of(config, older), config, stream, PATH)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["config", "stream", "position", "progress"])
def test_checkpoint_without_run_entries_is_refused(part: str) -> None:
    config = config_of()
    stream = stream_info(config, data_set_of(), 1)
    content = checkpoint_of(config, stream)
    del content[part]
    with pytest.raises(UserError, match=f"last.pt has no {part}, unlike those of"):
        check_same_run(content, config, stream, PATH)


@pytest.mark.parametrize(
    "crafted",
    [
        {"stream": {}},
        {"stream": {"data set": 3, "global batch": 64}},
        {"progress": {}},
        {"stream": {"data set": "a", "global batch": 0}},
        {"stream": {"data set": "a", "global batch": "64"}},
        {"stream": {"data set": "a", "global batch": 64, "data set in detail": []}},
        {"progress": {"best_top1": "high"}},
        {"config": "train: 3"},
        {"config": "[" * 999},
    ],
)
def test_invalid_stream_entry_is_one_user_error(crafted: dict[str, Any]) -> None:
    config = config_of()
    stream = stream_info(config, data_set_of(), 1)
    with pytest.raises(UserError, match=r"last\.pt") as error:
        check_same_run(checkpoint_of(config, stream) | crafted, config, stream, PATH)
    assert len(str(error.value).splitlines()) == 1


def other_value(field: FieldInfo, value: object) -> object:
    """Return a valid value of a setting that differs from `value`, its JSON value."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(choice.value for choice in kind if choice.value != value)
    if value is None:
        return {int: 1, float: 0.5, bool: True, str: "other"}[kind]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 1e-6
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, list):
        return [number / 2 for number in value] or ["other"]
    name = get_args(kind)[0]
    return {get_args(name)[0] if get_origin(name) is Literal else "other": 1}


@pytest.mark.parametrize(("key", "field"), SETTINGS)
def test_resume_refuses_a_changed_setting_unless_the_schema_allows_it(key: str, field: FieldInfo) -> None:
    then = config_of(*ENABLING)
    value = OTHER_VALUES.get(key) or other_value(field, settings_by_key(then)[key])
    now = config_of(*ENABLING, f"{key}={json.dumps(value)}")
    assert differences(then, now) == [key]
    accumulation = then.train.accumulation_steps, now.train.accumulation_steps
    if effect(field) != Effect.RESULTS:
        check(then, now, passes=accumulation)
        return
    in_global_batch = key in ("data.batch_size", "train.accumulation_steps")
    with pytest.raises(UserError, match=f"[(]{'global batch' if in_global_batch else key}[: ].* then, .* now"):
        check(then, now, passes=accumulation)


def differences(then: Config, now: Config) -> list[str]:
    values = settings_by_key(then)
    return [key for key, value in settings_by_key(now).items() if value != values[key]]


def test_neutral_settings_may_change() -> None:
    faster = [
        "train.amp=off",
        "train.compile=off",
        "train.save_every_steps=3",
        "train.eval_every_epochs=2",
        "data.prefetch=1",
        "data.on_bad_sample=skip",
        "data.max_bad_samples=9",
    ]
    check(config_of(), config_of(*faster))
    with pytest.raises(UserError, match=r"train\.eval_every_epochs: 1 then, 2 now\)"):
        check(config_of(*PLATEAU), config_of(*PLATEAU, *faster))
    by_train_loss = (*PLATEAU, "train.schedule_options.metric=train_loss")
    check(config_of(*by_train_loss), config_of(*by_train_loss, *faster))


def test_counted_weights_must_stay_the_same() -> None:
    check(config_of(), config_of("eval.weights=raw"))
    average = ("train.ema.decay=0.9",)
    check(config_of(*average), config_of(*average, "eval.weights=ema"))
    with pytest.raises(UserError, match=r'eval\.weights: "auto" then, "raw" now'):
        check(config_of(*average), config_of(*average, "eval.weights=raw"))


@pytest.mark.parametrize(("batch", "passes"), [(32, 2), (16, 4)])
def test_global_batch_may_be_split_differently_in_all_stages(batch: int, passes: int) -> None:
    then = config_of("data.batch_size=64", STAGES.format(32))
    cut = config_of(f"data.batch_size={batch}", STAGES.format(batch // 2))
    check(then, cut, passes=(1, passes))
    with pytest.raises(UserError, match=r"\[\[1, null, 32\], \[2, 24, 64\]\] then, \[\[1, null, 16\], \[2, 24, 64\]\]"):
        check(then, config_of("data.batch_size=64", STAGES.format(16)))


def test_settings_missing_in_old_versions_count_as_defaults() -> None:
    def without(values: dict[str, Any], *keys: str) -> str:
        for key in keys:
            section, name = values, key
            while "." in name:
                first, name = name.split(".", 1)
                section = section[first]
            del section[name]
        return str(yaml.safe_dump(values))

    config = config_of()
    newer = ("data.stages", "aug.mix", "aug.color_jitter.probability", "model.freeze", "train.ema", "eval.weights")
    text = without(config.model_dump(mode="json"), *newer)
    check(config, config, text)
    with pytest.raises(UserError, match=r"\(train\.ema\.decay: null then, 0\.5 now\)"):
        check(config, config_of("train.ema.decay=0.5"), text)


def test_old_checkpoint_with_wrong_timm_defaults_still_resumes() -> None:
    """The old version recorded its own defaults, but the optimizer ran with those of timm."""
    lion = "train.optimizer.name=lion"
    old = config_of(
        lion, "train.optimizer.betas=[0.9, 0.999]", "train.optimizer.eps=1e-8", "train.optimizer.nesterov=true"
    )
    content = checkpoint_of(old, stream_info(old, data_set_of(), 1))
    content["optimizer"] = {"param_groups": [{"betas": (0.9, 0.99), "lr": 1e-3}], "state": {}}
    for now in (config_of(lion), old):
        check_same_run(content, with_timm_defaults(now), content["stream"], PATH)
    for betas in ("[0.9, 0.98]", "[0.8, 0.99]"):
        with pytest.raises(
            UserError, match=r"\(train\.optimizer\.betas: \[0\.9, 0\.99\] then, \[0\.[89], 0\.9[89]\] now"
        ):
            check_same_run(content, config_of(lion, f"train.optimizer.betas={betas}"), content["stream"], PATH)


def test_changed_setting_of_timm_optimizer_is_refused() -> None:
    then, now = (
        with_timm_defaults(config_of("train.optimizer.name=lamb", *more)) for more in ([], ["train.optimizer.eps=1e-8"])
    )
    with pytest.raises(UserError, match=r"\(train\.optimizer\.eps: 1e-06 then, 1e-08 now\)"):
        check(then, now)
