"""Predict a split or pictures with `tools/predict.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from configs.arguments import flag_name
from configs.utils.errors import UserError, printable
from tools.common.tables import make_folder, write_json, write_text
from tools.inference import submission
from tools.inference.ensemble import predict, top_classes
from tools.inference.image_sets import ImageSet, dataset_folder, find_picture_folder, open_images
from tools.inference.prediction_files import build_metrics, format_table, write_arrays
from train.distributed.process_group import Ranks, process_group
from train.trained_model import TrainedModel, check_same_classes, load_trained_model, note_limit

MAX_SHOWN = 5  # unreadable images, and images whose best classes are printed
MAX_SHOWN_BEST = 20  # images whose best class is printed, if there are more than MAX_SHOWN


def run(arguments: argparse.Namespace) -> None:
    """Predict with the checkpoints given by the arguments of `tools/predict.py`."""
    ranks = Ranks.alone("tools/predict.py")
    with process_group(ranks) as device:
        models = [load_trained_model(path, device, compiled=True) for path in arguments.checkpoint]
        for other in models[1:]:
            check_same_classes(models[0], other.dataset.classes, f"checkpoint {other.path}")
        pictures: list[Path] = arguments.pictures
        if arguments.split is not None:
            folder = find_picture_folder(arguments.split, dataset_folder(models[0], arguments.data_path))
            pictures = [] if folder is None else [folder]
        links = arguments.follow_links
        with (
            output_folder(arguments.out or default_folder(models[0].path, arguments.split, pictures)) as out,
            open_images(arguments.split, pictures, models, arguments.data_path, out, follow_links=links) as images,
        ):
            write_predictions(arguments, models, images, out)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Create the output folder if needed, and remove it on exit if it is new and nothing was written into it.

    Raises:
        UserError: The folder cannot be created or written to.
    """
    is_new = not path.exists()
    try:
        yield make_folder(path)
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def write_predictions(
    arguments: argparse.Namespace, models: Sequence[TrainedModel], images: ImageSet, out: Path
) -> None:
    """Predict the images, write all output files, and print the results."""
    classes = models[0].dataset.classes
    file = submission_file(arguments, images, out)
    form = None
    if file is not None:  # refuse before predicting
        form = submission.build_form(
            images,
            len(classes),
            sample=arguments.sample_submission,
            id_start=arguments.id_start,
            id_column=arguments.id_column,
            category_column=arguments.category_column,
            fill=arguments.fill,
        )
    for sample in images.unreadable[:MAX_SHOWN]:
        print(f"no prediction for row {sample.row}, {sample.name}: {sample.reason}", file=sys.stderr)
    if (hidden := len(images.unreadable) - MAX_SHOWN) > 0:
        print(f"no prediction for {hidden:,} more, all listed in {out / 'metrics.json'}", file=sys.stderr)

    logits, each, mean = predict(models, images, arguments.tta, arguments.batch_size)
    numbers, probabilities = top_classes(logits, min(arguments.top_k, len(classes)))
    write_arrays(out / "predictions.npz", images, classes, logits, numbers, probabilities)
    write_text(out / "predictions.csv", format_table(images, numbers, probabilities, classes))
    metrics = {"split": arguments.split or images.split, **build_metrics(models, images, arguments.tta, each, mean)}
    write_json(out / "metrics.json", metrics)
    if mean is not None:
        for model, result in zip(models, each, strict=True):
            print(f"{model.title}: {result.sentence(images.split)}")
            note_limit(model.config, images.split)
        if len(models) > 1:
            print(f"average of {len(models)} checkpoints: {mean.sentence(images.split)}")
    if images.files is not None:
        print_best(images, classes, numbers, probabilities)
    unreadable = f"; {len(images.unreadable):,} more cannot be read" if images.unreadable else ""
    count = f"{len(images):,} image{'s' * (len(images) != 1)}"
    print(f"{out}: predictions of {count} in predictions.npz and .csv{unreadable}")
    if form is not None and file is not None:
        print(submission.write_submission(file, form, images, numbers[:, 0], len(classes)))


def print_best(images: ImageSet, classes: Sequence[str], numbers: np.ndarray, probabilities: np.ndarray) -> None:
    """Print the best classes of each image, or only the best class of the first images if there are many.

    Args:
        images: N images.
        classes: Names of the classes.
        numbers: Class numbers int64 [N, K], from the best.
        probabilities: Their probabilities float32 [N, K].
    """
    count = numbers.shape[1] if len(images) <= MAX_SHOWN else 1
    for place in range(min(len(images), MAX_SHOWN_BEST)):
        best = zip(numbers[place, :count].tolist(), probabilities[place, :count].tolist(), strict=True)
        shown = ", ".join(f"{classes[number]} {probability:.1%}" for number, probability in best)
        print(printable(f"{images.describe(place)}: {shown}"))


def default_folder(checkpoint: Path, split: str, pictures: Sequence[Path]) -> Path:
    """Return the default output folder, which is in the folder of the checkpoint.

    Names for splits and for pictures have different prefixes, so that they never coincide.
    """
    if not pictures:
        return checkpoint.parent / f"predictions-{split}"
    return checkpoint.parent / (f"pictures-{pictures[0].resolve().name}" if len(pictures) == 1 else "pictures")


def submission_file(arguments: argparse.Namespace, images: ImageSet, out: Path) -> Path | None:
    """Return the path of the submission file and create its folder, or return None if no submission is written.

    Raises:
        UserError: Submission options are given without a submission, the folder is not writable, or the path is a
            folder or the sample submission.
    """
    if arguments.submission == "none" or (arguments.submission is None and images.split != "test"):
        options = ("sample_submission", "id_start", "id_column", "category_column", "fill")
        given = [name for name in options if getattr(arguments, name) is not None]
        if given:
            raise UserError(
                f"{flag_name(given[0])} belongs to a submission, which is written by default only for split test; give "
                "--submission FILE"
            )
        return None
    file = Path(arguments.submission) if arguments.submission else out / "submission.csv"
    make_folder(file.parent)
    sample: Path | None = arguments.sample_submission
    if file.is_dir() or (sample is not None and file.resolve() == sample.resolve()):
        what = "a folder" if file.is_dir() else "the sample submission itself"
        raise UserError(f"--submission {file} is {what}; give another file to write")
    return file
