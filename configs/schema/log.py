"""Logging and experiment tracking settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.section import Neutral, Section, Texts


class WandbConfig(Section):
    """Weights & Biases."""

    project: Neutral[str | None] = Field(default=None, min_length=1)
    """Weights & Biases project; null: W&B is off, except under `wandb agent`, which sets the project."""
    entity: Neutral[str | None] = None
    """User or team; null: the login's default."""
    group: Neutral[str | None] = None
    """Group of runs; null: none."""
    mode: Neutral[Literal["auto", "online", "offline"]] = "auto"
    """auto: online if logged in, else offline; also offline if the server does not answer or rejects the key. The
    environment variable WANDB_MODE (online, offline, disabled) takes precedence."""
    tags: Neutral[Texts] = ()
    """Tags of the run."""


class LogConfig(Section):
    """Console, metrics file and trackers."""

    every_steps: Neutral[int] = Field(default=50, ge=1)
    """Optimizer steps between two lines of training metrics, and between two points of the trackers' step curves."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: Neutral[bool] = False
    """Whether to write OUTPUT/NAME/tensorboard, for `tensorboard --logdir OUTPUT`."""
    images: Neutral[bool] = True
    """Whether to log images to W&B and TensorBoard, if enabled: augmented samples at the start, predictions and a
    confusion matrix at the end. This adds one pass over the validation split."""
