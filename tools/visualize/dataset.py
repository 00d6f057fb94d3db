"""Plot a converted data set: the number of samples per class in each labeled split, and an image of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from configs.schema import DataConfig, EvalConfig
from configs.utils.errors import UserError
from pipelines.open import load_dataset, open_split
from pipelines.storage.split import Split
from tools.common.tables import Row, make_folder, markdown, write_csv
from tools.visualize.subset import load_images
from train.distributed.process_group import Ranks, process_group
from train.reporting import figures, image_grids

EXAMPLE_SIDE = 96  # height and width in pixels of examples, unless all stored images have the same square size


def show_dataset(path: str, ranks: Ranks, count: int, seed: int, out: Path | None) -> None:
    """Write class-counts.png and examples.png, each with a CSV file, and print a table of the splits.

    Args:
        path: Folder of the data set.
        ranks: Rank and world size of this process. The world size must be 1.
        count: Maximum number of classes in examples.png, which shows one image per class.
        seed: Seed for the choice of examples.
        out: Output folder, or None for output/show/NAME.

    Raises:
        UserError: The data set cannot be read, no split has labels, or a file cannot be written.
    """
    dataset = load_dataset(path)
    splits = {name: open_split(path, name) for name in dataset.splits}
    counts = {name: class_counts(split) for name, split in splits.items() if split.labels is not None}
    if not counts:
        raise UserError(f"no split of {path} has labels ({', '.join(splits)}); there are no classes to show")
    classes = dataset.classes
    folder = make_folder(out or Path("output") / "show" / dataset.name)
    title = f"{dataset.name}: {len(classes)} classes"
    figures.save(figures.class_counts(counts, classes, title), folder / "class-counts.png")
    rows = [
        {"label": label, "class": name, **{f"{split} samples": int(each[label]) for split, each in counts.items()}}
        for label, name in enumerate(classes)
    ]
    write_csv(folder / "class-counts.csv", rows)

    name = "train" if "train" in counts else next(iter(counts))
    samples = class_examples(splits[name], count, seed)
    shape = splits[name].image_shape
    side = shape[0] if shape is not None and shape[0] == shape[1] else EXAMPLE_SIDE
    with process_group(ranks) as device:
        images = load_images(DataConfig(path=path, image_size=side), EvalConfig(), name, samples, device)
    labels = splits[name].labels
    assert labels is not None
    grid = image_grids.sample_grid(images, torch.from_numpy(labels[samples]), classes, f"{title}, examples of {name}")
    figures.save(grid, folder / "examples.png")
    rows = [
        {"sample": sample, "label": label, "class": classes[label]}
        for sample, label in zip(samples.tolist(), labels[samples].tolist(), strict=True)
    ]
    write_csv(folder / "examples.csv", rows)
    print(f"{title}, stored as {dataset.encoding}")
    print(markdown([split_row(split, counts.get(name)) for name, split in splits.items()]))
    print(f"plots and their data are in {folder}")


def class_counts(split: Split) -> np.ndarray:
    """Return the number of samples of each class of a labeled split, int64 [C]."""
    assert split.labels is not None
    return np.bincount(split.labels, minlength=len(split.classes))


def split_row(split: Split, counts: np.ndarray | None) -> Row:
    """Return the table row of a split: number of samples, ranges of height and width in pixels, and class sizes.

    The class sizes are the minimum, median and maximum of `counts`. They are None if `counts` is None.
    """
    row: Row = {
        "split": split.name,
        "samples": len(split),
        "height": _range(split.heights),
        "width": _range(split.widths),
        "samples per class: least": None,
        "median": None,
        "most": None,
    }
    if counts is not None:
        row["samples per class: least"] = int(counts.min())
        median = float(np.median(counts))
        row["median"] = int(median) if median.is_integer() else median
        row["most"] = int(counts.max())
    return row


def class_examples(split: Split, count: int, seed: int) -> np.ndarray:
    """Return the index of a random sample of each class that has samples, in class order, int64 [N].

    If there are more than `count` such classes, `count` of them are chosen at random.
    """
    assert split.labels is not None
    generator = np.random.default_rng(seed)
    present = np.unique(split.labels)
    chosen = np.sort(generator.choice(present, min(count, len(present)), replace=False))
    return np.array([generator.choice(np.flatnonzero(split.labels == label)) for label in chosen])


def _range(sides: np.ndarray) -> str:
    low, high = int(sides.min()), int(sides.max())
    return f"{low}" if low == high else f"{low} to {high}"
