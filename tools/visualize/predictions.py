"""Plot a trained model's predictions: random samples, the most confident mistakes, confusions and class scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import classification_report
from torch import Tensor

from pipelines.open import load_dataset
from tools.common.tables import Row, csv_text, make_folder, markdown, write_csv, write_text
from tools.inference.ensemble import predict
from tools.inference.image_sets import dataset_folder, load_split
from tools.visualize.subset import load_images
from train.distributed.process_group import Ranks, process_group
from train.reporting import figures, image_grids
from train.trained_model import load_trained_model, note_limit

MAX_PRINTED_CLASSES = 20  # if there are more, only the best and the worst are printed
BEST_AND_WORST = 5
MAX_PRINTED_PAIRS = 10


@dataclass(frozen=True)
class Predictions:
    """Predictions for a split, and the folder to which plots and tables of them are written."""

    folder: Path
    title: str  # start of the titles of plots
    classes: tuple[str, ...]
    labels: Tensor  # int64 [N], -1 if unknown
    logits: Tensor  # float32 [N, C]

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted classes, int64 [N]."""
        return image_grids.predicted_classes(self.logits)[0]


def show_predictions(
    checkpoint: Path, ranks: Ranks, split: str | None, data_path: str | None, count: int, seed: int, out: Path | None
) -> None:
    """Plot the predictions for a split, write a CSV file for each plot, and print scores and confusions.

    If the split has no labels, only random samples are plotted.

    Args:
        checkpoint: A run folder or a checkpoint.
        ranks: Rank and world size of this process. The world size must be 1.
        split: The split to predict, or None for the run's data.val_split.
        data_path: Folder of the data set, or None for the run's data.path.
        count: Maximum number of images per plot.
        seed: Seed for the choice of random samples.
        out: Output folder, or None for show-SPLIT beside the checkpoint.

    Raises:
        UserError: The checkpoint or the split cannot be read or do not match, or a file cannot be written.
    """
    with process_group(ranks) as device:
        trained = load_trained_model(checkpoint, device)
        split = split or trained.config.data.val_split
        path = dataset_folder(trained, data_path)
        images = load_split(split, [trained], [path])
        folder = make_folder(out or trained.path.parent / f"show-{split}")
        values, evaluations, _ = predict([trained], images, None, None)
        logits = torch.from_numpy(values)
        labels = torch.full((len(images),), -1) if images.labels is None else torch.from_numpy(images.labels)
        random = np.random.default_rng(seed).permutation(len(labels))[:count]
        worst = confident_mistakes(logits, labels)[:count]
        pixels = load_images(
            trained.eval_data_config(path), trained.config.eval, split, np.concatenate([random, worst]), device
        )

    title = f"{trained.config.name}, {split}"
    shown = Predictions(folder, title, trained.dataset.classes, labels, logits)
    draw_predictions(shown, "predictions", "random samples", random, pixels[: len(random)])
    if not evaluations:
        splits = load_dataset(path).splits
        labelled = ", ".join(name for name, entry in splits.items() if entry.labelled) or "none"
        print(
            f"split {split!r} of {path} has no labels, so there are no mistakes and no scores to show; splits with "
            f"labels: {labelled}\nwrote {folder / 'predictions.png'} and .csv"
        )
        return
    draw_predictions(shown, "mistakes", "most confident mistakes", worst, pixels[len(random) :])
    (evaluation,) = evaluations
    print(f"{trained.path}: {evaluation.sentence(split)}")
    note_limit(trained.config, split)
    write_scores(shown)
    write_confusions(shown)
    print(f"\nplots and their data are in {folder}")


def confident_mistakes(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return the indices of the misclassified samples, int64 [N], in order of decreasing confidence.

    Samples without a label are ignored.
    """
    predicted, probabilities = image_grids.predicted_classes(logits)
    wrong = torch.nonzero((predicted != labels) & (labels >= 0))[:, 0]
    return wrong[probabilities[wrong].argsort(descending=True, stable=True)].numpy()


def draw_predictions(shown: Predictions, name: str, what: str, samples: np.ndarray, images: Tensor) -> None:
    """Write images with their predictions as NAME.png, and the predictions as NAME.csv.

    Args:
        shown: Predictions for the split.
        name: File name without suffix.
        what: Description of the samples, for the title.
        samples: Indices of the samples in the split, int64 [N].
        images: The images of the samples, uint8 [N, 3, H, W].
    """
    classes, logits, labels = shown.classes, shown.logits[samples], shown.labels[samples]
    picture = image_grids.prediction_grid(images, labels, logits, classes, f"{shown.title}: {what}")
    figures.save(picture, shown.folder / f"{name}.png")
    predicted, probabilities = image_grids.predicted_classes(logits)
    rows: list[Row] = [
        {
            "sample": sample,
            "true_label": label if label >= 0 else None,
            "truth": classes[label] if label >= 0 else None,
            "predicted_label": guess,
            "prediction": classes[guess],
            "probability": probability,
        }
        for sample, label, guess, probability in zip(
            samples.tolist(), labels.tolist(), predicted.tolist(), probabilities.tolist(), strict=True
        )
    ]
    write_csv(shown.folder / f"{name}.csv", rows)


def write_scores(shown: Predictions) -> None:
    """Write the scores of each class to classes.csv, plot F1 in classes.png, and print a table of the scores."""
    scores, means = class_scores(shown)
    write_csv(shown.folder / "classes.csv", scores + means)
    title = f"{shown.title}: F1 of each class"
    picture = figures.ranked_bars([row["f1"] for row in scores], shown.classes, "F1", title)
    figures.save(picture, shown.folder / "classes.png")
    if len(scores) > MAX_PRINTED_CLASSES:
        print(f"\n{BEST_AND_WORST} best and {BEST_AND_WORST} worst of {len(scores)} classes:")
        scores = sorted(scores, key=lambda row: (-row["f1"], -row["recall"]))
        scores = scores[:BEST_AND_WORST] + scores[-BEST_AND_WORST:]
    print(markdown(scores + means))


def class_scores(shown: Predictions) -> tuple[list[Row], list[Row]]:
    """Compute precision, recall, F1 and support (number of samples). Undefined scores are 0.

    Returns:
        A row per class, and two rows with means over the classes: unweighted (macro), and weighted by support.
    """
    numbers = range(len(shown.classes))
    report = classification_report(
        shown.labels.numpy(),
        shown.predicted.numpy(),
        labels=numbers,
        target_names=list(map(str, numbers)),  # names may not be unique
        zero_division=0,
        output_dict=True,
    )

    def row(key: str, label: int | None, name: str) -> Row:
        values = report[key]
        scores = {"precision": values["precision"], "recall": values["recall"], "f1": values["f1-score"]}
        return {"label": label, "class": name, **scores, "support": int(values["support"])}

    means = [row(f"{kind} avg", None, f"{kind} mean") for kind in ("macro", "weighted")]
    return [row(str(label), label, name) for label, name in enumerate(shown.classes)], means


def write_confusions(shown: Predictions) -> None:
    """Write confusion.png, confusion.csv (the matrix) and confused.csv (pairs of classes, most often confused first).

    Also print the most frequent pairs.
    """
    classes, folder = shown.classes, shown.folder
    counts = image_grids.confusion_counts(shown.labels, shown.predicted, len(classes))
    figures.save(figures.confusion_matrix(counts, classes, f"{shown.title}: confusion"), folder / "confusion.png")
    columns = [f"{label} {name}" for label, name in enumerate(classes)]  # names alone may not be unique
    lines = [[name, *row] for name, row in zip(columns, counts.tolist(), strict=True)]
    write_text(folder / "confusion.csv", csv_text([["true class", *columns], *lines]))
    pairs = confused_pairs(counts, classes)
    write_csv(folder / "confused.csv", pairs)
    if pairs:
        print(f"\nmost often confused, of {len(pairs)} pairs:")
        print(markdown(pairs[:MAX_PRINTED_PAIRS]))


def confused_pairs(counts: np.ndarray, classes: tuple[str, ...]) -> list[Row]:
    """Return a row for each pair of true class and wrongly predicted class that occurs, the most frequent first.

    `counts` is the confusion matrix, int64 [C, C], with a row per true class.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = counts.sum(axis=1)
    cells = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return [
        {
            "truth": classes[true],
            "prediction": classes[guess],
            "samples": int(wrong[true, guess]),
            "share_of_true_class": float(wrong[true, guess] / totals[true]),
        }
        for true, guess in zip(*np.unravel_index(cells, wrong.shape), strict=True)
    ]
