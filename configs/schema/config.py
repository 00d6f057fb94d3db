"""The whole config: all sections and the settings of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, field_validator
from pydantic.fields import FieldInfo

from configs.schema.aug import AugConfig
from configs.schema.data import DataConfig
from configs.schema.eval import EvalConfig
from configs.schema.log import LogConfig
from configs.schema.model import ModelConfig
from configs.schema.section import IsPath, Section, section_settings
from configs.schema.train import TrainConfig
from configs.utils.errors import printable


class Config(Section):
    data: DataConfig
    """The data set and how it is read."""
    aug: AugConfig = AugConfig()
    """Augmentation, in training only."""
    model: ModelConfig
    """What is trained."""
    train: TrainConfig = TrainConfig()
    """Optimisation, precision, checkpoints."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    log: LogConfig = LogConfig()
    """Console, metrics file, W&B, TensorBoard."""
    resume: Annotated[str | None, IsPath] = Field(default=None, min_length=1)
    """auto, a run's folder or a checkpoint to go on from, as --resume says; null: a new run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Fixes the initial weights, the order of the samples and their augmentation."""
    output: Annotated[str, IsPath] = Field(default="output", min_length=1)
    """Folder of all runs; this run writes to OUTPUT/NAME."""
    name: str | None = None
    """Name of the run, a plain file name; null: the config file's name without its ending."""

    @field_validator("name")
    @classmethod
    def _plain_file_name(cls, name: str | None) -> str | None:
        if name is not None and (name in ("", ".", "..") or set(name) & set("/\\") or printable(name) != name):
            raise ValueError("must be a plain file name without slashes and control characters")
        return name


def all_settings() -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of this file; a section is followed by its fields."""
    return section_settings(Config)
