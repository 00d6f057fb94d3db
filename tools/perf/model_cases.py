"""Load the model and training setup of a model name, config file, run folder or checkpoint, to count their costs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import load_config, parse_config
from configs.schema import Config, ModelConfig, OptimizerConfig, TrainConfig
from configs.utils.code import is_reference
from configs.utils.errors import UserError
from configs.utils.files import is_url
from models import list_models
from pipelines.open import load_dataset
from train.checkpoint import store
from train.checkpoint.code import find_code
from train.checkpoint.resume import find_checkpoints
from train.checkpoint.state import require_keys
from train.checkpoint.store import BEST, LAST, PREVIOUS

CONFIGS = Path(__file__).parents[2] / "configs"
STORED_SIZE = 32  # image size of configs without data.image_size: CIFAR-10 and the digits
CLASSES = 10
BATCH_SIZE = 128
CONFIG_SUFFIXES = (".yaml", ".yml")
AMP_NAMES = {"float32": "off", "bf16": "bf16"}


@dataclass(frozen=True)
class ModelCase:
    """A model, and the training setup for which its costs are counted."""

    label: str
    settings: ModelConfig
    image_size: int
    classes: int
    batch_size: int
    train: TrainConfig

    @property
    def model(self) -> str:
        return self.settings.name


def build_case(name: str, options: argparse.Namespace) -> ModelCase:
    """Return the model and training setup for a model name, config file, run folder or checkpoint.

    Command-line options take precedence over the config.

    Raises:
        UserError: `name` is none of these, the file or its data set is invalid, or the number of classes or the image
            size is unknown.
    """
    path = Path(name)
    if name in list_models() or name.startswith("timm/") or is_reference(name):
        label, model, train = name, ModelConfig(name=name), TrainConfig()
        size, classes, batch_size = options.size or default_size(name), CLASSES, BATCH_SIZE
    elif path.suffix in (*CONFIG_SUFFIXES, ".pt") or path.is_dir():
        config, classes, size = load_model_config(path, options)
        label, model, train = str(config.name), config.model, config.train
        batch_size = config.data.batch_size * config.data.views
    else:
        raise UserError(
            f"{name!r} is not a model, config file or run folder; use one of {', '.join(list_models())}, timm/NAME, "
            "path/to/file.py:NAME, or the path of a .yaml file or of a run"
        )
    if options.optimizer is not None:
        train = train.model_copy(update={"optimizer": OptimizerConfig(name=options.optimizer)})
    if options.precision is not None:
        train = train.model_copy(update={"amp": AMP_NAMES[options.precision]})
    return ModelCase(
        label=label,
        settings=model,
        image_size=options.size or size,
        classes=options.classes or classes,
        batch_size=options.batch_size or batch_size,
        train=train,
    )


def load_model_config(path: Path, options: argparse.Namespace) -> tuple[Config, int, int]:
    """Return the config, number of classes and image size of a config file, a run folder or a checkpoint.

    For a run folder without a checkpoint, its config.yaml is read. If the config does not set the number of classes or
    the image size, the value is taken from the data set or from the checkpoint's "dataset" entry. Command-line options
    take precedence.

    Raises:
        UserError: The file or the data set is invalid, or the number of classes or the image size is unknown.
    """
    if path.is_dir() and not any((path / name).is_file() for name in (BEST, LAST, PREVIOUS)):
        path = path / "config.yaml"
    classes_there: int = 0
    size_there: int | None = None
    if path.suffix in CONFIG_SUFFIXES:
        config = load_config(path)
        if is_url(config.data.path) or Path(config.data.path).exists():
            dataset = load_dataset(config.data.path, config.data.classes)
            classes_there, size_there = len(dataset.classes), dataset.image_shape and dataset.image_shape[0]
    else:
        path, content = store.load_newest(find_checkpoints(path))
        require_keys(content, ("config",), path)
        config = find_code(parse_config(content["config"], f"the config in {path}"), content, path)
        facts: Any = content.get("dataset") or {}
        classes_there, size_there = len(facts.get("classes", ())), facts.get("image_size")
    classes = options.classes or config.model.num_classes or classes_there
    image_size = options.size or config.data.image_size or size_there
    for what, value, option in (("number of classes", classes, "--classes"), ("image size", image_size, "--size")):
        if not value:
            raise UserError(
                f"{path} does not set the {what}, and there is no data set in {config.data.path} to read it from; give "
                f"{option}, or convert the data set first"
            )
    return config, int(classes), int(image_size or 0)


def default_size(model: str) -> int:
    """Return the smallest image size at which this project's configs train the model.

    If no config trains it, return STORED_SIZE. For a timm model, return its native size, or 224 if that is unknown.
    """
    if model.startswith("timm/"):
        import timm

        pretrained = timm.get_pretrained_cfg(model.removeprefix("timm/")) if timm.is_model(model[5:]) else None
        return int(pretrained.input_size[-1]) if pretrained else 224
    configs = [load_config(file) for file in sorted(CONFIGS.glob("*.yaml"))]
    sizes = [config.data.image_size or STORED_SIZE for config in configs if config.model.name == model]
    return min(sizes, default=STORED_SIZE)
