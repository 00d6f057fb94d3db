"""Logging and experiment tracking settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.section import Section, Texts


class WandbConfig(Section):
    """Weights & Biases."""

    project: str | None = Field(default=None, min_length=1)
    """Weights & Biases project; null: W&B is off, except under `wandb agent`, which sets the project."""
    entity: str | None = None
    """User or team; null: the login's default."""
    group: str | None = None
    """Group of runs; null: none."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto: online if logged in, else offline; also offline if the server does not answer or rejects the key. The
    environment variable WANDB_MODE (online, offline, disabled) takes precedence."""
    tags: Texts = ()
    """Tags of the run."""


class LogConfig(Section):
    """Console, metrics file and trackers."""

    every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between two lines of training metrics, and between two points of the trackers' step curves."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: bool = False
    """Whether to write OUTPUT/NAME/tensorboard, for `tensorboard --logdir OUTPUT`."""
    images: bool = True
    """Whether to log images to W&B and TensorBoard, if enabled: augmented samples at the start, predictions and a
    confusion matrix at the end. This adds one pass over the validation split."""
