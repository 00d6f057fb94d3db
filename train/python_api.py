"""Train from Python, e.g. in a notebook, and look at runs: `from train import Run, fit`."""

from __future__ import annotations

import gc
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from configs.utils.warnings import warn
from pipelines.convert.source import Options, Source
from pipelines.convert.writer import convert_source
from pipelines.python_source import PythonImages
from train.build import Job
from train.checkpoint.resume import read_config
from train.checkpoint.store import BEST
from train.distributed.process_group import Ranks, process_group
from train.reporting import figures
from train.reporting.metrics_file import MetricsLine, counted_average, read_metrics
from train.run import train
from train.trained_model import TrainedModel, load_trained_model, picture_encoding, predicted_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = "images"  # name of the split that images from Python are converted to
Picture = str | Path | Image | np.ndarray | Tensor


def fit(
    config: str | Path | Config,
    *overrides: str | Mapping[str, object],
    resume: str | Path | None = None,
    extend: bool = False,
    **settings: object,
) -> Run:
    """Train a config in this process, as `zhu train` does, and return the run.

    Training is on the first visible GPU, or on the CPU. Afterwards, torch's number of threads, random generators,
    float32 precision and cuDNN settings are as before. In the main thread, signals end the run with a checkpoint as in
    `zhu train`, and then have their usual effect: an interrupted kernel raises KeyboardInterrupt, and
    `resume="auto"` continues the run.

    Args:
        config: YAML file, or a config.
        overrides: Settings as KEY=VALUE, e.g. "train.epochs=3", or as mappings, e.g. {"train.epochs": 3}.
        resume: "auto" for the latest run of this name, a run folder or a checkpoint; None for a new run.
        extend: Whether more train.epochs than the resumed run was started with are allowed.
        settings: Settings by name, e.g. output="runs", or by dotted key, e.g. **{"train.epochs": 3}.

    Raises:
        UserError: A setting is invalid, the data cannot be read, training diverged, or this process is one of several
            ranks or already trains a run.
        KeyboardInterrupt: The run was interrupted.
    """
    start_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    warn.cache_clear()  # each run gives its warnings
    texts, settings = _split_overrides(overrides, settings)
    nulls = [f"{key}=null" for key, value in settings.items() if value is None]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    loaded = load_config(config, [*texts, *nulls], **settings)
    if loaded.eval.only:
        raise UserError("eval.only=true evaluates a checkpoint, but fit trains; set eval.only=false or use zhu train")
    resume = loaded.resume if resume is None else str(resume)
    job = Job.load(loaded, Ranks.alone("fit()"))
    with _process_group("fit()") as device:
        ended = train(job.on(device), resume, extend=extend, start_s=start_s)
    gc.collect()  # frees the memory of the run, which is in reference cycles
    if ended.exit_code:
        signal.raise_signal(ended.exit_code - 128)  # for the handler that was replaced during training
    return Run(ended.folder)


class Run:
    """A run folder, finished or not. Files are read at each access.

    Args:
        folder: OUTPUT/NAME.

    Attributes:
        folder: The run folder.
        config: Config of the run.

    Raises:
        UserError: The folder does not contain a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def metrics(self) -> list[MetricsLine]:
        """The lines of metrics.jsonl, one dict per epoch. `epoch` counts from 0. `pandas.DataFrame` accepts them."""
        return read_metrics(self.folder)

    @property
    def best(self) -> Best | None:
        """The best evaluation by eval.best_by, whose weights are in best.pt, or None if there is none."""
        options, path = self.config.eval, self.folder / BEST
        found = [Best.of(line, options.weights, path) for line in self.metrics]
        results = [(value, best) for best in found if (value := getattr(best, options.best_by)) is not None]
        sign = -1 if options.best_by == "loss" else 1
        return max(results, key=lambda result: sign * result[0], default=(None, None))[1]

    def plot(self) -> Figure:
        """Plot the loss and the accuracy over epochs, as in curves.png. Raises UserError if no epoch has ended."""
        metrics = self.metrics
        if not metrics:
            raise UserError(
                f"{self.folder} has no epoch to plot: its metrics.jsonl is empty or missing; train it first"
            )
        return figures.curves(metrics, self.folder.name, self.config.train.loss)

    def predict(self, images: Picture | Sequence[Picture]) -> Predictions:
        """Predict images with best.pt or, if it does not exist, with the latest checkpoint.

        Images are prepared like the data set of the run, and evaluated like its validation split. The checkpoint is
        loaded at each call, so pass many images at once.

        Args:
            images: Image, or sequence of images. An image is a PIL image, a NumPy array uint8 [H, W], [H, W, 1] or
                [H, W, 3], a torch tensor uint8 [H, W], [1, H, W] or [3, H, W], or the path of an image file. Other
                arrays and tensors are batches, such as [N, H, W] and [N, H, W, 3].

        Raises:
            UserError: An image cannot be read, there is no intact checkpoint, or the logits are not finite.
        """
        with _process_group("predict()") as device, tempfile.TemporaryDirectory(prefix="zhu-") as temporary:
            model, folder = load_trained_model(self.folder, device), Path(temporary) / IMAGES
            _convert(_as_list(images), model, folder)
            logits = torch.cat(
                [batch.float().cpu() for batch, _ in predicted_batches(model, folder, IMAGES, None, None)]
            )
        if not logits.isfinite().all():
            raise UserError(f"{model.path} gives logits that are not finite: its weights have diverged; train again")
        return Predictions(model.dataset.classes, logits.softmax(1).numpy())


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run, of the weights that eval.weights selects."""

    epoch: int  # epochs trained; the first is 1
    top1: float | None  # accuracies are shares, from 0 to 1
    top5: float | None
    loss: float | None  # None if it was not finite
    checkpoint: Path

    @classmethod
    def of(cls, line: MetricsLine, weights: str, checkpoint: Path) -> Best:
        """Return the evaluation in a line of metrics.jsonl. `weights` is the value of eval.weights."""
        average = counted_average(line, weights)
        results = {name: line.get(f"{average}val_{name}") for name in ("top1", "top5", "loss")}
        return cls(line.epoch + 1, **results, checkpoint=checkpoint)


@dataclass(frozen=True)
class Predictions:
    """Predictions of N images with C classes."""

    classes: tuple[str, ...]
    probabilities: np.ndarray  # float32 [N, C]

    @property
    def names(self) -> list[str]:
        """The name of the most probable class of each image."""
        return [self.classes[number] for number in self.probabilities.argmax(1)]


def _split_overrides(
    overrides: Sequence[str | Mapping[str, object]], settings: Mapping[str, object]
) -> tuple[list[str], dict[str, object]]:
    """Return the overrides of `fit` that are texts, and all settings by name, where `settings` override mappings.

    Raises:
        UserError: An override is neither, or a setting is a class or a function.
    """
    texts: list[str] = []
    merged: dict[str, object] = {}
    for override in overrides:
        if isinstance(override, Mapping):
            merged.update(override)
        elif isinstance(override, str):
            texts.append(override)
        else:
            raise UserError(f'override {override!r:.60} must be KEY=VALUE or a mapping, such as {{"train.epochs": 3}}')
    merged.update(settings)
    for key, value in merged.items():
        for part in value.values() if isinstance(value, Mapping) else [value]:
            if callable(part):
                name = getattr(part, "__name__", "NAME")
                raise UserError(
                    f"{key} contains {name}, a {type(part).__name__}, but settings are texts and numbers; write it to "
                    f"a file, e.g. with %%writefile own.py, and give own.py:{name}"
                )
    return texts, merged


def _as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    """Return the images of `Run.predict` as a list. Raises UserError if there are none, or for a folder."""
    if isinstance(images, str | Path):
        if Path(images).is_dir():
            files = f"sorted(Path({str(images)!r}).rglob('*.jpg'))"
            raise UserError(f"{images} is a folder; give its image files, e.g. {files}, or use zhu predict {images}")
        return [images]
    if isinstance(images, Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        channels = images.shape[-1 if isinstance(images, np.ndarray) else 0] if images.ndim == 3 else 0
        if images.ndim < 3 or channels in (1, 3):
            return [images]
    if not len(images):
        raise UserError("there are no images to predict; pass at least one")
    return list(images)


def _convert(images: list[Picture], model: TrainedModel, folder: Path) -> None:
    """Convert images into `folder` like the data set of the model. Raises UserError if one of them is invalid."""
    source = Source("pictures", IMAGES, model.dataset.classes, fingerprint="", splits={IMAGES: PythonImages(images)})
    dataset = convert_source(source, folder, Options(picture_encoding(model)), workers=1, name=IMAGES)
    for sample in dataset.splits[IMAGES].quarantined:
        raise UserError(f"{sample.name} cannot be read ({sample.reason}); leave it out")


@contextmanager
def _process_group(tool: str) -> Iterator[torch.device]:
    """Initialize a process group of this process only, and restore torch's process-wide settings on exit.

    Raises:
        UserError: This process is one of several ranks, or already has a process group.
    """
    ranks, threads = Ranks.alone(tool), torch.get_num_threads()
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.callback(torch.set_float32_matmul_precision, precision)
        stack.callback(setattr, torch.backends.cudnn, "benchmark", benchmark)
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # torch adds the rank to tracebacks
        if torch.cuda.is_available():
            stack.enter_context(torch.cuda.device(0))  # restores the current device
            stack.enter_context(torch.random.fork_rng([0]))
        else:
            stack.enter_context(torch.random.fork_rng([]))
        yield stack.enter_context(process_group(ranks))
