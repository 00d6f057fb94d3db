"""Plot a config's augmented training samples below the unaugmented images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from configs.schema import Config
from configs.utils.console import counted
from pipelines import build_train_loader
from pipelines.augment.mixup import mixing_enabled
from pipelines.build import open_limited
from pipelines.interfaces import Position
from tools.common.tables import Row, make_folder, write_csv
from tools.visualize.subset import load_images
from train.distributed.process_group import Ranks, process_group
from train.engine.losses import RenderedBatch, render_batch
from train.reporting import figures, image_grids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 10  # maximum number of samples side by side


def show_samples(config: Config, ranks: Ranks, epochs: Sequence[int], count: int, out: Path | None) -> None:
    """Write samples.png and samples.csv with the first samples of `epochs[0]`, augmented as in each of `epochs`.

    With data.views > 1, the first view is shown.

    Args:
        config: Training config.
        ranks: Rank and world size of this process. The world size must be 1.
        epochs: The epochs to show, counted from 0.
        count: Maximum number of samples.
        out: Output folder, or None for OUTPUT/show/NAME.

    Raises:
        UserError: The config does not match the data set, the data set cannot be read, or a file cannot be written.
    """
    with process_group(ranks) as device:
        samples, rows = augmented_samples(config, epochs, count, device)
        original = load_images(config.data, config.eval, config.data.train_split, samples, device)
    split = open_limited(config.data, config.data.train_split)
    labels = np.full(len(samples), -1) if split.labels is None else split.labels[samples]
    names = [image_grids.class_name(label, split.classes) for label in labels.tolist()]
    folder = make_folder(out or Path(config.output) / "show" / str(config.name))
    table: list[Row] = [
        {"position": position, "sample": sample, "label": label, "class": name}
        for position, (sample, label, name) in enumerate(zip(samples.tolist(), labels.tolist(), names, strict=True))
    ]
    mixtures = []
    if mixing_enabled(config.aug.mix):
        mixtures = [image_grids.mix_captions(row, split.classes) for row in rows]
        for epoch, mixture in zip(epochs, mixtures, strict=True):
            for line, name in zip(table, mixture, strict=True):
                line[f"epoch {epoch + 1}"] = name
    shown = [original, *(row.images for row in rows)]
    largest = max(images.shape[2] for images in shown)  # sizes differ between stages and evaluation
    original, *images = (one if one.shape[2] == largest else enlarge(one, largest) for one in shown)
    figures.save(sample_figure(original, images, epochs, names, str(config.name), mixtures), folder / "samples.png")
    write_csv(folder / "samples.csv", table)
    listed = ", ".join(str(epoch + 1) for epoch in epochs)
    print(
        f"{counted(len(samples), 'sample')} of {config.data.train_split}, epoch {listed}: "
        f"{folder / 'samples.png'} and .csv"
    )


def augmented_samples(
    config: Config, epochs: Sequence[int], count: int, device: torch.device
) -> tuple[np.ndarray, list[RenderedBatch]]:
    """Return the indices of the first samples of `epochs[0]`, int64 [N], and these samples as augmented in each epoch.

    The augmented samples are on the host. Mixed samples have the partners of `epochs[0]` in all epochs, whereas in
    training the partners differ between epochs.
    """
    # Only the first view. On the host, since that avoids copying the whole split to the device.
    data = config.data.model_copy(update={"placement": "host", "views": 1})
    loader = build_train_loader(
        data, config.aug, seed=config.seed, device=device, accumulation_steps=config.train.accumulation_steps
    )
    samples = loader.at(epochs[0]).plan.indices(epochs[0], 0)[: count + count % 2]  # mixing needs whole pairs
    rows = []
    for epoch in epochs:
        # a sample's augmentation depends on (seed, epoch, sample), not on its batch
        chosen = loader.single_stage(loader.at(epoch).select(samples))
        chosen.position = Position(epoch)
        seen = [RenderedBatch(*(part.cpu() for part in render_batch(batch))) for batch in chosen]
        rows.append(RenderedBatch(*(torch.cat(parts)[:count] for parts in zip(*seen, strict=True))))
    return samples[:count], rows


def enlarge(images: Tensor, side: int) -> Tensor:
    """Return uint8 images resized to [N, 3, side, side] by repeating pixels."""
    return functional.interpolate(images, (side, side), mode="nearest-exact")


def sample_figure(
    original: Tensor,
    rows: Sequence[Tensor],
    epochs: Sequence[int],
    names: Sequence[str],
    title: str,
    mixtures: Sequence[Sequence[str]] = (),
) -> Figure:
    """Draw blocks of samples. Each block has a row of unaugmented images with their classes, then a row per epoch.

    Args:
        original: Unaugmented images, uint8 [N, 3, H, W].
        rows: Augmented images of each epoch, of the same shape.
        epochs: The epoch of each item of `rows`, counted from 0.
        names: Class name of each sample.
        title: Start of the figure's title.
        mixtures: For each epoch and sample, the classes that were mixed. Empty without mixing.
    """
    columns = min(COLUMNS, len(names))
    lines = [(image_grids.to_numpy(original), [image_grids.wrap_caption(name) for name in names])]
    for number, (images, epoch) in enumerate(zip(rows, epochs, strict=True)):
        captions = [f"epoch {epoch + 1}"] * len(names)
        if mixtures:
            mixed = [image_grids.wrap_caption(name, lines=image_grids.MIXED_LINES) for name in mixtures[number]]
            captions = [f"epoch {epoch + 1}\n{name}" for name in mixed]
        lines.append((image_grids.to_numpy(images), captions))
    blank = np.full_like(lines[0][0][0], 255)
    shown: list[np.ndarray] = []
    texts: list[str] = []
    for start in range(0, len(names), columns):
        for line, captions in lines:
            block = captions[start : start + columns]
            missing = columns - len(block)  # in the last block
            shown += [*line[start : start + columns], *[blank] * missing]
            texts += [*block, *[""] * missing]
    title += ": samples without augmentation, and as used in training"
    return figures.image_grid(np.stack(shown), texts, title=title, columns=columns)
