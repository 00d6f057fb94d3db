"""Settings for the model and its initial weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from configs.schema.section import IsCode, IsPath, Resumable, Section, Texts


class ModelConfig(Section):
    """The model and its initial weights."""

    name: Annotated[str, IsCode] = Field(min_length=1)
    """Built-in model (lenet, alexnet, resnet18, …), timm/NAME for any model of timm, or path/to/file.py:NAME or
    package.module:NAME for your own class or function, which is called with num_classes and model.options."""
    num_classes: Resumable[int | None] = Field(default=None, ge=1)
    """Number of outputs; null: the data set's number of classes."""
    drop_rate: float | None = Field(default=None, ge=0, lt=1)
    """Dropout probability; null: the model's default."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid", "hardswish", "mish"] | None = (
        None
    )
    """Activation function, for built-in models and timm models that accept one; null: the model's default."""
    options: dict[str, Any] = Field(default={})
    """Further arguments of the model's constructor, such as {width: 16} for a narrow resnet18 or {drop_path_rate: 0.1}
    for a timm model. The built-in resnets have stem: homework (3x3 with stride 1, the default), half (3x3 with stride
    2) or imagenet (7x7 with stride 2 and max pooling), which need 1, 1/4 and 1/16 of the arithmetic."""
    pretrained: Annotated[bool | str, IsPath] = False
    """Whether to start from timm's published weights, which must be in the hub's cache on this machine; or the path of
    a weights file (.safetensors, .pth). Images are then normalized with the mean and std from a config.json beside the
    file, or from timm for a timm model, or otherwise from the data set."""
    pretrained_partial: bool = False
    """Whether to load only the tensors of model.pretrained that fit by name and shape. The others are initialized
    randomly, and the log lists them; false: tensors outside of the head that do not fit are an error."""
    finetune: Annotated[str | None, IsPath] = Field(default=None, min_length=1)
    """Checkpoint of this project, or a run's folder, to take initial weights from; the head is not loaded if the
    classes differ."""
    freeze: Texts = ()
    """Shell patterns for the names of parameters to freeze, such as network.layer1.*; batch norm layers whose
    parameters are all frozen use their running statistics and do not update them."""
