"""Resolve the image size and batch size of an epoch with progressive resizing (data.stages)."""

from __future__ import annotations

from configs.schema import Config, DataConfig


def stage_starts(data: DataConfig) -> list[int]:
    """Return the first epoch of each stage in ascending order. Epoch 0 is always included."""
    return sorted({0, *(stage.epoch for stage in data.stages)})


def data_at(data: DataConfig, epoch: int) -> DataConfig:
    """Return `data` with the image size and batch size of this epoch, and without stages."""
    stage = max((stage for stage in data.stages if stage.epoch <= epoch), key=lambda stage: stage.epoch, default=None)
    sizes = {} if stage is None else {"image_size": stage.image_size, "batch_size": stage.batch_size}
    return data.model_copy(update={**{key: size for key, size in sizes.items() if size is not None}, "stages": ()})


def config_at(config: Config, epoch: int) -> Config:
    """Return the config with the image size and batch size of this epoch, for tools that run only part of training."""
    return config.model_copy(update={"data": data_at(config.data, epoch)})
