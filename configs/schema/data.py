"""Data set and loader settings."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from configs.schema.section import IsPath, Neutral, Resumable, Section, as_tuple

DecoderMemory = Literal[
    "preallocate_width_hint", "preallocate_height_hint", "device_memory_padding", "host_memory_padding"
]


class OnBadSample(str, Enum):
    """What to do about a sample that cannot be decoded."""

    STOP = "stop"
    SKIP = "skip"


class StageConfig(Section):
    """A range of epochs with one image size and batch size."""

    epoch: int = Field(ge=0)
    """First epoch of the stage, counted from 0; the stage lasts until the next one starts."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width of training images in pixels; null: data.image_size."""
    batch_size: int | None = Field(default=None, ge=1)
    """Training samples per rank and forward pass; null: data.batch_size."""


class DataConfig(Section):
    """The data set and how it is loaded."""

    path: Resumable[Annotated[str, IsPath]] = Field(min_length=1)
    """Folder of the converted data set (with dataset.json), such as data/cifar10, or its URL in an object store:
    s3://…, gs://… or https://…; or an HDF5 file, which is read in place."""
    classes: Resumable[Annotated[str, IsPath] | None] = None
    """For an HDF5 file, a text file with one class name per line; null: 0, 1, … up to the highest label of train. A
    converted data set contains its class names."""
    cache: Neutral[Annotated[str, IsPath] | None] = None
    """Folder in which the shards of a URL are cached, on a local disk; null: model-zhu/data in the user's cache."""
    cache_gib: Neutral[float | None] = Field(default=None, gt=0)
    """Maximum size of a data set's cached shards in GiB. A smaller cache than the data set needs the sequential-window
    order; null: no limit."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per rank and forward pass."""
    views: int = Field(default=1, ge=1)
    """Images of each training sample in a batch, each with its own draws of the augmentation, as for contrastive
    learning. A forward pass has batch_size * views images, those of a sample next to each other."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels of the model's input; null: the stored size (required if stored sizes vary)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter for resizing images, in training and evaluation."""
    antialias: bool = True
    """Whether to widen the filter by the scale factor when downscaling, like Pillow."""
    stages: Annotated[tuple[StageConfig, ...], BeforeValidator(as_tuple)] = ()
    """Progressive resizing: image and batch size by epoch, as [{epoch: 0, image_size: 160}, {epoch: 8, image_size:
    192}]. Before the first stage, data.image_size and data.batch_size apply. Evaluation uses eval.image_size."""
    placement: Resumable[Literal["auto", "host", "device"]] = "auto"
    """Where to keep the samples: in memory-mapped files on the host (host), or the whole split in the memory of the
    training device (device, for npy encoding only); auto: device if the split is small enough, otherwise host."""
    verify: Resumable[Literal["changed", "off"]] = "changed"
    """Shards to verify by sha256 at startup. changed: those that are new or have changed since their last check,
    which is recorded in the user's cache; off: none, only file sizes, for huge data sets on slow storage. An HDF5 file
    is not hashed at startup: changed warns if it is not the one that `zhu convert verify` has recorded."""
    order: Literal["random", "sequential-window"] = "random"
    """Training order in each epoch: a random permutation of all samples (random), or shards in random order with
    data.window_shards of them read at a time and their samples shuffled, for data larger than memory
    (sequential-window)."""
    window_shards: int = Field(default=8, ge=1)
    """Shards that each batch takes equal parts of, for the sequential-window order. If it is a multiple of the number
    of machines, each machine reads only its share of the shards."""
    prefetch: Neutral[int] = Field(default=3, ge=1, le=16)
    """Batches to prepare ahead of training."""
    threads: Neutral[int | None] = Field(default=None, ge=1)
    """CPU threads per rank for loading images; null: the number of cores available to this process divided by the
    number of ranks on this machine."""
    jpeg_decode: Literal["exact", "fast"] = "exact"
    """How a CPU decodes JPEGs. exact: to the pixels of DALI and Pillow. fast: with a less accurate inverse transform,
    and at 1/2, 1/4 or 1/8 of the size if the image is reduced by at least this factor anyway. A GPU ignores it."""
    hw_decoder_load: Resumable[float] = Field(default=0.65, ge=0, le=1)
    """Share of JPEGs decoded by the GPU's hardware decoder, if any; 0: none, so all GPUs use the same decoder."""
    decoder_memory: Neutral[dict[DecoderMemory, Annotated[int, Field(ge=0)]]] = Field(default={})
    """Memory that DALI's JPEG decoder allocates at the start on a GPU, by arguments of fn.decoders.image: the largest
    image expected by the hardware decoder, such as {preallocate_width_hint: 500, preallocate_height_hint: 500}, and
    bytes per thread, device_memory_padding and host_memory_padding."""
    on_bad_sample: Resumable[Annotated[OnBadSample, Field(strict=False)]] = OnBadSample.STOP
    """Action if a JPEG cannot be decoded in training: end the run (stop), or replace the sample with the next
    decodable one in stored order, in every epoch (skip). Evaluation always stops, since it counts every sample exactly
    once."""
    max_bad_samples: Resumable[int] = Field(default=16, ge=1)
    """Maximum number of samples to replace over all ranks, for on_bad_sample skip; one more ends the run."""
    train_split: str = Field(default="train", min_length=1)
    """Split to train on."""
    val_split: str = Field(default="val", min_length=1)
    """Split to evaluate on."""
    limit: int | float | None = Field(default=None, gt=0)
    """Train and evaluate on a part of both splits: a number of samples of each, or a share below 1. All classes are
    kept, in proportion to their sizes; null: all samples."""

    @field_validator("limit")
    @classmethod
    def _samples_or_share(cls, limit: int | float | None) -> int | float | None:
        if isinstance(limit, float) and limit >= 1:
            raise ValueError("must be a whole number of samples, such as 1000, or a share below 1, such as 0.1")
        return limit

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        epochs = [stage.epoch for stage in stages]
        if epochs != sorted(set(epochs)):
            raise ValueError("must be in ascending order of their epochs, each epoch once")
        return stages
