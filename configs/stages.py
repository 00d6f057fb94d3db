"""What data.stages mean: where stages begin, and the settings of an epoch. Knows no loader."""

from __future__ import annotations

from configs.schema import Config, DataConfig


def stage_starts(data: DataConfig) -> list[int]:
    """The first epoch of each stretch of epochs with sizes of its own, ascending from 0."""
    return sorted({0, *(stage.epoch for stage in data.stages)})


def data_at(data: DataConfig, epoch: int) -> DataConfig:
    """The data section of this epoch: with its image and batch size, and without stages."""
    stage = max((stage for stage in data.stages if stage.epoch <= epoch), key=lambda stage: stage.epoch, default=None)
    sizes = {} if stage is None else {"image_size": stage.image_size, "batch_size": stage.batch_size}
    return data.model_copy(update={**{key: size for key, size in sizes.items() if size is not None}, "stages": ()})


def config_at(config: Config, epoch: int) -> Config:
    """The config as it is in this epoch, for what looks at training and does not train to the end."""
    return config.model_copy(update={"data": data_at(config.data, epoch)})
