"""Build the training state described by a config. All commands that run a model use this module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from configs.schema import Config, ModelConfig
from configs.utils.errors import UserError
from models import build_from_config
from models.pretrained import build_pretrained
from pipelines.augment.mixup import mixing_enabled
from train.checkpoint.finetune import load_finetune
from train.distributed.process_group import get_world_size
from train.engine.hard_samples import build_proxy
from train.engine.state import TrainState, build_state
from train.optim.averaging import build_ema, build_lookahead
from train.optim.factory import build_optimizer
from train.optim.freeze import freeze
from train.optim.schedule import scale_learning_rates
from train.reporting.run_info import global_batch


def build_all(
    config: Config,
    dataset: dict[str, Any],
    classes: int,
    image_size: int,
    device: torch.device,
    *,
    trains: bool = True,
) -> TrainState:
    """Build the training state: the model, its optimizer, and, if enabled, the moving average, Lookahead and proxy.

    The learning rates are scaled to the global batch size. To load a checkpoint into the result, pass
    `without_pretrained(config)`. For evaluation only, pass `inference_config(config)` and trains=False. All ranks must
    call this function.

    Args:
        config: Config of the run. `config.seed` seeds the random initial weights.
        dataset: Contents of dataset.json.
        classes: Number of outputs of the model.
        image_size: Height and width of the images in pixels.
        device: Device of the model.
        trains: Whether backward passes will be run.

    Raises:
        UserError: The model or an optimizer cannot be built with these settings, weights cannot be loaded, model.freeze
            is invalid, or train.cuda_graph is "on" but CUDA graphs cannot be used.
    """
    train = scale_learning_rates(config.train, global_batch(config, get_world_size()))
    model, notes = config.model, []
    shape: dict[str, Any] = {"image_size": image_size, "mean": dataset["mean"], "std": dataset["std"]}

    def on_device(network: nn.Module) -> nn.Module:
        return to_device(network, device, train.channels_last)

    torch.manual_seed(config.seed)
    if model.pretrained is False:
        network = on_device(build_from_config(model, classes, **shape))
    else:
        pretrained, note = build_pretrained(model, classes, **shape, classes=dataset["classes"])
        network, notes = on_device(pretrained), [note]
    if model.finetune is not None:
        notes.append(load_finetune(network, model.finetune, dataset["classes"], model))
    if model.freeze:
        notes.append(freeze(network, model.freeze))
    optimizer = build_optimizer(network, train.optimizer, train.lr)
    state = build_state(network, optimizer, train, device, mixes=mixing_enabled(config.aug.mix), trains=trains)
    state.is_fresh_init = model.pretrained is False and model.finetune is None
    state.lookahead = build_lookahead(network, train.lookahead)
    state.ema = build_ema(network, train.ema)
    state.proxy = build_proxy(
        train, lambda name: on_device(build_from_config(ModelConfig(name=name), classes, **shape)), device
    )
    parts = state.parts()
    state.notes = (*notes, *dict.fromkeys(note for part in parts for note in part.notes))
    return state


def check_classes(config: Config, dataset: dict[str, Any]) -> int:
    """Check model.num_classes and the configured splits against the data set, and return its number of classes.

    Raises:
        UserError: model.num_classes differs from the number of classes, or a configured split does not exist or has no
            labels.
    """
    classes = len(dataset["classes"])
    wanted = config.model.num_classes
    if wanted is not None and wanted != classes:
        raise UserError(
            f"model.num_classes={wanted}, but the data set in {config.data.path} has {classes} classes; "
            f"set it to {classes} or leave it out"
        )
    for split in (config.data.train_split, config.data.val_split):
        entry = dataset["splits"].get(split)
        if entry is None or not entry["labelled"]:
            labelled = [name for name, other in dataset["splits"].items() if other["labelled"]]
            missing = "does not exist" if entry is None else "has no labels"
            raise UserError(f"split {split!r} of {config.data.path} {missing}; splits with labels: {labelled}")
    return classes


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if channels_last else network
