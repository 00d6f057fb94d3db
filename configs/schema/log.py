"""Settings of logs and experiment trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.section import Section, Texts


class WandbConfig(Section):
    project: str | None = Field(default=None, min_length=1)
    """Weights & Biases project; null: W&B is off, except under `wandb agent`, which names the project."""
    entity: str | None = None
    """User or team; null: the login's default."""
    group: str | None = None
    """Group of runs; null: none."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto: online with a login, else offline; a server that does not answer or refuses the key makes a run offline as
    well. The environment variable WANDB_MODE (online, offline, disabled) goes first."""
    tags: Texts = ()
    """Tags of the run."""


class LogConfig(Section):
    every_steps: int = Field(default=50, ge=1)
    """Steps between two lines of training metrics, and between two points of the trackers' curves against step."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Whether to write OUTPUT/NAME/tensorboard, for `tensorboard --logdir OUTPUT`."""
    images: bool = True
    """Whether W&B and TensorBoard, where they are on, get pictures as well: augmented samples at the start,
    predictions and a confusion matrix at the end, which take one more pass over the validation split."""
