"""The whole config: all sections and the settings of the run itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import reduce
from operator import getitem
from typing import Annotated

from pydantic import Field, field_validator
from pydantic.fields import FieldInfo

from configs.schema.aug import AugConfig
from configs.schema.data import DataConfig
from configs.schema.eval import EvalConfig
from configs.schema.log import LogConfig
from configs.schema.model import ModelConfig
from configs.schema.section import Effect, IsPath, Neutral, Section, effect, is_section, section_settings
from configs.schema.train import TrainConfig
from configs.utils.errors import printable


class Config(Section):
    """All settings of a run."""

    data: DataConfig
    """The data set and how it is loaded."""
    aug: AugConfig = AugConfig()
    """Augmentation, in training only."""
    model: ModelConfig
    """The model and its initial weights."""
    train: TrainConfig = TrainConfig()
    """Optimization, precision, checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    log: LogConfig = LogConfig()
    """Console, metrics file, W&B, TensorBoard."""
    resume: Neutral[Annotated[str | None, IsPath]] = Field(default=None, min_length=1)
    """auto, a run's folder, or a checkpoint to resume from; same as --resume; null: start a new run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of samples and their augmentation."""
    output: Neutral[Annotated[str, IsPath]] = Field(default="output", min_length=1)
    """Folder of all runs; this run writes to OUTPUT/NAME."""
    name: Neutral[str | None] = None
    """Name of the run, a plain file name; null: the config file's name without its suffix."""

    @field_validator("name")
    @classmethod
    def _plain_file_name(cls, name: str | None) -> str | None:
        if name is not None and (name in ("", ".", "..") or set(name) & set("/\\") or printable(name) != name):
            raise ValueError("must be a plain file name without slashes and control characters")
        return name


def all_settings() -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) for every setting in source order. A section precedes its fields."""
    return section_settings(Config)


def settings_by_key(config: Config, effects: Collection[Effect] = tuple(Effect)) -> dict[str, object]:
    """Return the JSON values of the settings that have one of these effects, by dotted key in source order.

    Sections are not included, only the settings in them. A list of sections is one setting.
    """
    values = config.model_dump(mode="json")
    return {
        key: reduce(getitem, key.split("."), values)
        for key, field in all_settings()
        if not is_section(field) and effect(field) in effects
    }
