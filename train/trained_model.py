"""Load trained models from checkpoints. The data set that a model was trained on is not needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor

from configs.load import parse_config
from configs.schema import Config, DataConfig
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines import build_eval_loader
from pipelines.convert.source import Encoding
from pipelines.storage.dataset import ModelDataset, is_hdf5
from train.build import build_all
from train.checkpoint import store
from train.checkpoint.code import find_code
from train.checkpoint.finetune import inference_config, without_pretrained
from train.checkpoint.restore import restore_weights
from train.checkpoint.resume import find_checkpoints
from train.checkpoint.state import require_keys
from train.engine.evaluate import check_full_coverage, predictions
from train.engine.state import TrainState


@dataclass(frozen=True)
class TrainingData(ModelDataset):
    """The data set that a model was trained on: the "dataset" entry of a checkpoint."""

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    image_size: PositiveInt  # height and width in pixels, as in training
    conversion: Encoding | None = None  # of the stored images, or None if it was not recorded
    image_shape: tuple[int, int, int] | None = None  # of the stored images, or None if it varies or is unknown


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, ready for evaluation. `state.network` takes uint8 images."""

    path: Path  # the checkpoint
    is_ema: bool  # the weights are the run's moving average
    config: Config
    dataset: TrainingData
    state: TrainState
    epochs: int  # completed epochs

    @property
    def title(self) -> str:
        """The path of the checkpoint, marked if the weights are the run's moving average."""
        return f"{self.path} (moving average)" if self.is_ema else str(self.path)

    def eval_data_config(self, folder: str | Path) -> DataConfig:
        """Return the run's data settings for whole splits of `folder`, at the image size of training."""
        changes = {"path": str(folder), "image_size": self.dataset.image_size, "limit": None}
        if not is_hdf5(Path(folder)):  # shards, which have their own class names
            changes["classes"] = None
        return self.config.data.model_copy(update=changes)


def load_trained_model(path: Path, device: torch.device, *, compiled: bool = False) -> TrainedModel:
    """Load a model for evaluation, with the weights that eval.weights in its config selects.

    Requires an initialized process group.

    Args:
        path: A run folder or a checkpoint. In a run folder, best.pt is preferred.
        device: Device to load the model to.
        compiled: Whether to compile the model as the run would on this machine, so that its logits are bitwise equal to
            those of the run's evaluations.

    Raises:
        UserError: There is no intact checkpoint, the checkpoint was written by another program or by an older version
            that did not record the classes, or its contents are invalid.
    """
    path, content = store.load_newest(find_checkpoints(path))
    if content.get("dataset") is None:
        raise UserError(
            f"checkpoint {path} does not name its classes (it was written by an older version); train it again"
        )
    require_keys(content, ("model", "config", "position"), path)
    require_keys(content["dataset"], ("name", "classes", "mean", "std", "image_size"), path)
    try:
        dataset = TypeAdapter(TrainingData).validate_python(content["dataset"])
    except ValidationError as error:
        name, entries = str(error.errors()[0]["loc"][0]), dict(content["dataset"])
        raise UserError(
            f"checkpoint {path} cannot be read (its dataset's {name!r} is {entries[name]!r:.60}); use another one"
        ) from None
    config = parse_config(content["config"], f"the config in {path}")
    train = config.train.model_copy(update={"cuda_graph": "off", **({} if compiled else {"compile": "off"})})
    config = without_pretrained(config.model_copy(update={"train": train}))
    found = find_code(inference_config(config), content, path)
    state = build_all(found, dataset, dataset.image_size, device, trains=False)
    is_average = restore_weights(state, content, path, config.eval.weights)
    state.network.eval()
    return TrainedModel(path, is_average, config, dataset, state, content["position"]["epoch"])


def note_limit(config: Config, split: str) -> None:
    """Warn if the run with this config evaluated only a part of the split, whereas the whole split is evaluated now."""
    if config.data.limit is not None and split == config.data.val_split:
        warn(f"the run measured a part of {split} (data.limit={config.data.limit}); this is the result of all of it")


def check_same_classes(trained: TrainedModel, classes: tuple[str, ...], what: str) -> None:
    """Raise UserError unless the model was trained on `classes` in the same order.

    `what` is the name of the data set or checkpoint with these classes, for the message.
    """
    ours = trained.dataset.classes
    if ours == classes:
        return
    different = next((number for number, pair in enumerate(zip(ours, classes, strict=False)) if pair[0] != pair[1]), -1)
    where = "the others agree"
    if different >= 0:
        where = f"number {different} is {ours[different]!r} and {classes[different]!r}"
    raise UserError(
        f"{trained.path} and {what} differ in their classes ({len(ours)} and {len(classes)} of them; {where}); use a "
        "checkpoint that was trained on these classes"
    )


def picture_encoding(model: TrainedModel) -> Encoding:
    """Return the encoding in which to store pictures for a model.

    This is the encoding of the model's data set, or JPEG if that was not recorded. A data set of raw pixels that were
    not resized has a single image size. If this size is square, pictures are resized to it. Otherwise, they are stored
    as JPEG.
    """
    encoding = model.dataset.conversion or Encoding("jpeg")
    if encoding.name == "jpeg" or encoding.size is not None:
        return encoding
    assert model.dataset.image_shape is not None  # npy images have one shape
    height, width, _ = model.dataset.image_shape
    return replace(encoding, size=height) if height == width else Encoding("jpeg", orientation=encoding.orientation)


def predicted_batches(
    model: TrainedModel, folder: str | Path, split: str, tta: str | None, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits and labels of each batch of a split, computed as in evaluation.

    Raises:
        UserError: The data set cannot be read, or one of its files has changed.
        RuntimeError: Some samples were missed or counted twice. Raised after the last batch.
    """
    settings = model.config.eval.model_copy(update={"batch_size": batch_size or model.config.eval.batch_size})
    loader = build_eval_loader(model.eval_data_config(folder), settings, split=split, device=model.state.device)
    yield from predictions(model.state, loader, tta or model.config.eval.tta)
    check_full_coverage(loader)
