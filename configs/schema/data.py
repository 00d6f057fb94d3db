"""Settings of the data set and of loading it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from configs.schema.section import IsPath, Section, as_tuple


class StageConfig(Section):
    """A stretch of epochs with an image size and a batch size of its own."""

    epoch: int = Field(ge=0)
    """First epoch of the stage, counted from 0; it lasts until the next stage begins."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels in training; null: data.image_size."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass in training; null: data.batch_size."""


class DataConfig(Section):
    path: Annotated[str, IsPath] = Field(min_length=1)
    """Folder of the converted data set, the one that holds dataset.json, such as data/cifar10."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per rank and forward pass."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels that the model sees; null: the stored size (if it varies, a number is needed)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, in training and evaluation."""
    antialias: bool = True
    """Whether the filter widens with the scale where an image is reduced, as Pillow's does."""
    stages: Annotated[tuple[StageConfig, ...], BeforeValidator(as_tuple)] = ()
    """Progressive resizing: image and batch size by epoch: [{epoch: 0, image_size: 160}, {epoch: 8, image_size: 192}];
    before the first stage, and where there is none, image_size and batch_size hold. Evaluation: eval.image_size."""
    placement: Literal["auto", "host", "device"] = "auto"
    """Where the samples live: mapped files on the host, or whole in GPU memory; auto: by size and free memory."""
    verify: Literal["changed", "off"] = "changed"
    """Which shards are read whole at the start and compared with their sha256: those that were changed since that was
    last done, as a record in the user's cache says; off: none, only sizes, for huge data sets on slow storage."""
    order: Literal["random", "sequential-window"] = "random"
    """Training order: a global permutation per epoch, or shards in random order, shuffled within a window."""
    window_shards: int = Field(default=8, ge=1)
    """Shards per shuffle window of order sequential-window."""
    prefetch: int = Field(default=3, ge=1, le=16)
    """Batches prepared ahead of training."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per rank for images; null: the cores of this process divided by the ranks on this machine."""
    hw_decoder_load: float = Field(default=0.65, ge=0, le=1)
    """Share of JPEGs decoded by the GPU's hardware decoder; 0: the same decoder on every GPU."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What a JPEG that cannot be decoded does in training: it ends the run, or the next sample in stored order takes
    its place in every epoch (skip). An evaluation always ends, since it counts every sample exactly once."""
    max_bad_samples: int = Field(default=16, ge=1)
    """Most samples that on_bad_sample skip replaces; one more ends the run."""
    train_split: str = Field(default="train", min_length=1)
    """Split to train on."""
    val_split: str = Field(default="val", min_length=1)
    """Split to evaluate on."""

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        epochs = [stage.epoch for stage in stages]
        if epochs != sorted(set(epochs)):
            raise ValueError("must be in order of their epochs, each epoch once")
        return stages
