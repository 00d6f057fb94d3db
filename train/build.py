"""The parts of a run: its config, data set and ranks, the loaders, and the training state.

All commands that run a model use this module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from configs.schema import Config, ModelConfig
from configs.utils.errors import UserError
from models import build_from_config
from models.cpu.compilation import Compilation, choose_compilation, training_images
from models.pretrained import build_pretrained
from pipelines import build_eval_loader, build_train_loader
from pipelines.augment.mixup import check_mixing, mixing_enabled
from pipelines.build import open_limited
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from pipelines.open import load_dataset
from pipelines.storage.dataset import DatasetInfo, ModelDataset
from train.checkpoint.finetune import load_finetune, without_pretrained
from train.distributed.collectives import count_machines
from train.distributed.process_group import Ranks, get_world_size
from train.engine.execution import build_plan
from train.engine.hard_samples import build_proxy, check_proxy
from train.engine.losses import with_class_weights
from train.engine.state import TrainState, build_state
from train.optim.averaging import build_ema, build_lookahead
from train.optim.factory import build_optimizer, with_timm_defaults
from train.optim.freeze import freeze
from train.optim.schedule import scale_learning_rates
from train.reporting.run_info import global_batch


@dataclass(frozen=True)
class Job:
    """A config, its data set, and where it runs. Builds the loaders and the training state.

    The methods that build loaders or a state need a process group. All ranks must call them.
    """

    config: Config
    dataset: DatasetInfo
    ranks: Ranks
    device: torch.device  # the CPU until `on`

    @classmethod
    def load(cls, config: Config, ranks: Ranks, *, trains: bool = True) -> Job:
        """Load dataset.json, and check everything that can be refused without a GPU and before files are written.

        Null settings of a timm optimizer are replaced with timm's defaults, so that a saved config contains them.

        Args:
            config: Config of the run.
            ranks: Rank of this process and number of processes.
            trains: Whether the model will be trained. Otherwise, only the settings of data and model are checked.

        Raises:
            UserError: The data set cannot be loaded or does not match the config, the optimizer is unknown or rejects a
                setting, the number of class weights is wrong, or settings of train.proxy or aug.mix are incompatible
                with others.
        """
        dataset = load_dataset(config.data.path, config.data.classes)
        check_classes(config, dataset)
        if trains:
            config = with_timm_defaults(config)
            check_class_weights(config, dataset)
            check_proxy(config.train, ranks.world_size, mixing_enabled(config.aug.mix))
            check_mixing(config.data, config.aug.mix)
        return cls(config, dataset, ranks, torch.device("cpu"))

    def on(self, device: torch.device) -> Job:
        """Return the job with the device of this rank, from `process_group`."""
        return replace(self, device=device)

    @property
    def passes(self) -> int:
        """Number of micro-batches per optimizer step, summed over all ranks."""
        return self.ranks.world_size * self.config.train.accumulation_steps

    def train_loader(self) -> TrainLoader:
        """Build the loader of data.train_split, see `pipelines.build_train_loader`.

        With data.views > 1, a step trains on each view as an image of its own, with the label of its sample.
        """
        config, ranks = self.config, self.ranks
        return build_train_loader(
            config.data,
            config.aug,
            seed=config.seed,
            device=self.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            machines=count_machines(ranks),
            accumulation_steps=config.train.accumulation_steps,
            epochs=config.train.epochs,
            flat_views=True,
        )

    def val_loader(self) -> EvalLoader:
        """Build the loader of data.val_split, see `pipelines.build_eval_loader`."""
        config, ranks = self.config, self.ranks
        return build_eval_loader(
            config.data,
            config.eval,
            device=self.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
        )

    def compilation(self, before: bool | None) -> Compilation | None:
        """Decide whether to compile the training step, or return None if the config or the device decides.

        `before` is whether the run to resume compiled its step on a CPU, or None for a new run.
        """
        config = self.config
        if self.device.type != "cpu" or config.train.compile != "auto":
            return None
        images = training_images(config, self.dataset.splits[config.data.train_split].samples)
        return choose_compilation(config, images, self.ranks.world_size, before)

    def build_state(
        self, image_size: int, *, pretrained: bool = True, trains: bool = True, compiles_on_cpu: bool = False
    ) -> TrainState:
        """Build the training state, see `build_all`.

        Args:
            image_size: Height and width of the images in pixels.
            pretrained: Whether to load the weights of model.pretrained and model.finetune. Pass False if a checkpoint
                will be loaded into the state.
            trains: Whether backward passes will be run.
            compiles_on_cpu: Whether train.compile=auto compiles the training step on a CPU.
        """
        config = self.config if pretrained else without_pretrained(self.config)
        return build_all(config, self.dataset, image_size, self.device, trains=trains, compiles_on_cpu=compiles_on_cpu)


def build_all(
    config: Config,
    dataset: ModelDataset,
    image_size: int,
    device: torch.device,
    *,
    trains: bool = True,
    compiles_on_cpu: bool = False,
) -> TrainState:
    """Build the training state: the model, its optimizer, and, if enabled, the moving average, Lookahead and proxy.

    The model has model.num_classes outputs or, if this setting is null, as many as the data set has classes. The
    learning rates are scaled to the global batch size. For evaluation only, pass `inference_config(config)` and
    trains=False. All ranks must call this function.

    Args:
        config: Config of the run. `config.seed` seeds the random initial weights.
        dataset: Class names, mean and std of the data set.
        image_size: Height and width of the images in pixels.
        device: Device of the model.
        trains: Whether backward passes will be run.
        compiles_on_cpu: Whether train.compile=auto compiles the training step on a CPU.

    Raises:
        UserError: The model or an optimizer cannot be built with these settings, weights cannot be loaded, model.freeze
            is invalid, or train.cuda_graph is "on" but CUDA graphs cannot be used.
    """

    def build_small(name: str) -> nn.Module:
        model = ModelConfig(name=name, num_classes=config.model.num_classes)
        return build_network(config.model_copy(update={"model": model}), dataset, image_size, device)[0]

    def labels() -> np.ndarray:
        stored = open_limited(config.data, config.data.train_split, config.data.on_bad_sample).labels
        return np.empty(0, np.int64) if stored is None else stored

    train = with_class_weights(config.train, labels, len(dataset.classes))
    train = scale_learning_rates(train, global_batch(config, get_world_size()))
    mixes = mixing_enabled(config.aug.mix)
    plan = build_plan(train, device, mixes=mixes, trains=trains, compiles_on_cpu=compiles_on_cpu)
    torch.manual_seed(config.seed)
    network, notes = build_network(config, dataset, image_size, device)
    state = build_state(network, build_optimizer(network, train.optimizer, train.lr), train, plan)
    state.is_fresh_init = config.model.pretrained is False and config.model.finetune is None
    state.lookahead = build_lookahead(network, train.lookahead)
    state.ema = build_ema(network, train.ema)
    state.proxy = build_proxy(train, plan, build_small)
    state.notes = (*notes, *dict.fromkeys(note for part in state.parts() for note in part.notes))
    return state


def build_network(
    config: Config, dataset: ModelDataset, image_size: int, device: torch.device
) -> tuple[nn.Module, list[str]]:
    """Build the network of a config on its device, with the weights and frozen layers that `config.model` selects.

    Returns:
        The network in its final memory format, and messages for the log.
    """
    model, notes = config.model, []
    classes = model.num_classes or len(dataset.classes)
    if model.pretrained is False:
        network: nn.Module = build_from_config(
            model, classes, image_size=image_size, mean=dataset.mean, std=dataset.std
        )
    else:
        network, note = build_pretrained(
            model, classes, image_size=image_size, mean=dataset.mean, std=dataset.std, classes=dataset.classes
        )
        notes.append(note)
    network = to_device(network, device, config.train.channels_last)
    if model.finetune is not None:
        notes.append(load_finetune(network, model.finetune, dataset.classes, model))
    if model.freeze:
        notes.append(freeze(network, model.freeze))
    return network, notes


def check_classes(config: Config, dataset: DatasetInfo) -> None:
    """Check model.num_classes and the configured splits against the data set.

    Raises:
        UserError: model.num_classes differs from the number of classes, or a configured split does not exist or has no
            labels.
    """
    classes = len(dataset.classes)
    wanted = config.model.num_classes
    if wanted is not None and wanted != classes:
        raise UserError(
            f"model.num_classes={wanted}, but the data set in {config.data.path} has {classes} classes; "
            f"set it to {classes} or leave it out"
        )
    for split in (config.data.train_split, config.data.val_split):
        entry = dataset.splits.get(split)
        if entry is None or not entry.labelled:
            labelled = [name for name, other in dataset.splits.items() if other.labelled]
            missing = "does not exist" if entry is None else "has no labels"
            raise UserError(f"split {split!r} of {config.data.path} {missing}; splits with labels: {labelled}")


def check_class_weights(config: Config, dataset: DatasetInfo) -> None:
    """Raise UserError if the length of the list train.class_weights is not the number of classes."""
    weights, classes = config.train.class_weights, len(dataset.classes)
    if isinstance(weights, tuple) and len(weights) != classes:
        raise UserError(
            f"train.class_weights has {len(weights)} weights, but the data set in {config.data.path} has {classes} "
            "classes; give one weight per class, in the order of dataset.json, or use balanced"
        )


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if channels_last else network
