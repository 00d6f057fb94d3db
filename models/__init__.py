"""Image classifiers, built by name with `build_model`."""

from models.alexnet import AlexNet
from models.factory import build_from_config, build_model, list_models, model_options
from models.layers import Normalize, PixelClassifier
from models.lenet import LeNet
from models.resnet import ResNet
from models.speedrun import SpeedrunNet

__all__ = [
    "AlexNet",
    "LeNet",
    "Normalize",
    "PixelClassifier",
    "ResNet",
    "SpeedrunNet",
    "build_from_config",
    "build_model",
    "list_models",
    "model_options",
]
