"""Every setting: its type, default, allowed range and documentation. Knows nothing of files, DALI or torch.

Sections `aug` and `train` stand in files of their own, `configs/schema/aug.py` and `configs/schema/train.py`.

A config is frozen, an unknown key is an error, and every field is read somewhere (a test says so). Loading is in
`configs/load.py`; `python -m configs.schema` prints all of this as a markdown table. `lr` is the peak learning rate at
the global batch: data.batch_size * world_size * train.accumulation_steps samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic.fields import FieldInfo

from configs.schema.aug import AugConfig as AugConfig
from configs.schema.aug import AutoAugmentConfig as AutoAugmentConfig
from configs.schema.aug import BlurConfig as BlurConfig
from configs.schema.aug import ColorJitterConfig as ColorJitterConfig
from configs.schema.aug import EraseConfig as EraseConfig
from configs.schema.aug import MixConfig as MixConfig
from configs.schema.section import IsPath, Section, Texts, as_tuple, section_settings
from configs.schema.section import is_section as is_section
from configs.schema.train import EmaConfig as EmaConfig
from configs.schema.train import LookaheadConfig as LookaheadConfig
from configs.schema.train import OptimizerConfig as OptimizerConfig
from configs.schema.train import ProxyConfig as ProxyConfig
from configs.schema.train import ScheduleConfig as ScheduleConfig
from configs.schema.train import TrainConfig as TrainConfig
from configs.utils.errors import printable


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


class ModelConfig(Section):
    name: str = Field(min_length=1)
    """lenet, alexnet, resnet18 … of models/, or timm/NAME for every model of timm."""
    num_classes: int | None = Field(default=None, ge=1)
    """Number of outputs; null: the data set's number of classes."""
    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability; null: the model's own."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid", "hardswish", "mish"] | None = (
        None
    )
    """Activation function, for the models of models/ and those of timm that take one; null: the model's own."""
    options: dict[str, Any] = Field(default={})
    """More arguments of the model's constructor, such as {width: 16} for a narrow resnet18 or {drop_path_rate: 0.1} for
    a model of timm."""
    pretrained: Annotated[bool | str, IsPath] = False
    """For models of timm: whether to start from its published weights, which must lie in the hub's cache on this
    machine, or the path of a file of weights (.safetensors, .pth); images are then normalised as they want them, as a
    config.json beside the file says it."""
    finetune: Annotated[str | None, IsPath] = Field(default=None, min_length=1)
    """Checkpoint of ours, or a run's folder, whose weights training starts from; a head for other classes is new."""
    freeze: Texts = ()
    """Patterns (as in a shell) of the names of parameters that are not trained, such as network.layer1.*; norms that
    are frozen whole keep their statistics."""


class EvalConfig(Section):
    only: bool = False
    """Evaluate the checkpoint to resume from and do not train, as --eval does."""
    batch_size: int | None = Field(default=None, ge=1)
    """Samples per rank and forward pass; null: data.batch_size."""
    image_size: int | None = Field(default=None, ge=1)
    """Height and width in pixels; null: data.image_size."""
    crop_mode: Literal["center", "squash"] = "center"
    """The central square of the image, or the whole of it with both sides resized to image_size (squash)."""
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side that the centre crop keeps: it is resized to round(image_size / crop_fraction)."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights count: for best.pt, for predictions and exports; auto: the moving average where there is one."""
    tta: Literal["none", "flip", "flip-translate"] = "none"
    """Test-time augmentation: logits are means over the image and its mirror image (flip), and also over both shifted
    by a pixel up-left and down-right, which weigh half in all (flip-translate)."""


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
