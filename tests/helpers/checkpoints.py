"""Checkpoints of a LeNet after one training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.training import lenet, make_state, random_batch
from train.engine.state import TrainState
from train.engine.step import train_step

STATE = {"position": {"epoch": 2, "step": 5}, "progress": {"best_top1": 0.5}, "stream": {"seed": 0}, "config": "a: 1\n"}


def stepped_training(**settings: Any) -> TrainState:
    training = make_state(lenet(), **settings)
    train_step(training, random_batch(8))
    return training


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
