"""Build the loader of a training or evaluation split from config sections."""

from __future__ import annotations

import numpy as np
import torch

from configs.schema import AugConfig, DataConfig, EvalConfig, OnBadSample, PaddingMode
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from pipelines import order
from pipelines.assemble import choose_backend, default_threads, load_placed
from pipelines.augment import mixup, policies
from pipelines.augment.sampler import AugmentationSampler
from pipelines.custom_augmentation import build_custom
from pipelines.loader import bad_samples
from pipelines.loader.backend import LoaderSpec
from pipelines.loader.batches import EvalBatches, TrainBatches
from pipelines.loader.epoch_order import TrainOrder
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.stage import Stage
from pipelines.loader.train_loader import TrainLoader
from pipelines.open import open_split
from pipelines.rng import view_seed
from pipelines.storage.split import Split


def build_train_loader(
    data: DataConfig,
    aug: AugConfig | None = None,
    *,
    seed: int = 0,
    draw_seed: int | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
    machines: int = 1,
    accumulation_steps: int = 1,
    epochs: int | None = None,
    flat_views: bool = False,
) -> TrainLoader:
    """Build a loader of shuffled, augmented batches of `data.train_split`.

    Every batch has `data.batch_size` samples per rank. The samples of an incomplete last optimizer step are dropped.

    With `data.views` > 1, images are uint8 [B, views, 3, H, W]. View v has the images of a loader with `data.views` 1,
    the same seed, and `draw_seed=view_seed(draw_seed, v)`.

    Args:
        data: Config section `data`. If data.stages is set, image size and batch size depend on the epoch.
        aug: Config section `aug`, or None for the defaults.
        seed: Seed of the sample order and of the augmentation.
        draw_seed: Seed of the augmentation. If None, `seed`.
        device: Device of the batches. If None, use the current GPU, or the CPU if there is no GPU.
        rank, world_size: Rank of this process, and number of training processes.
        local_world_size: Number of ranks on this machine, which share its CPU cores. If None, use `world_size`.
        machines: Number of machines, with equally many consecutive ranks. With data.order=sequential-window, each reads
            its own shards if the number divides data.window_shards.
        accumulation_steps: Batches per optimizer step. len(loader) is a multiple of this number.
        epochs: Number of epochs of the run. The loader gathers the first batches of an epoch at the end of the epoch
            before it, but none after the last epoch. If None, the last epoch is not known.
        flat_views: Whether images are [B * views, 3, H, W] with `data.views` > 1, and labels [B * views].

    Raises:
        UserError: The split cannot be opened or changes while it is loaded, a setting is incompatible with the split or
            with another setting, or aug.custom names code that cannot be imported.
    """
    aug = aug or AugConfig()
    mixup.check_mixing(data, aug.mix)
    split = open_limited(data, data.train_split, data.on_bad_sample)
    device = _device(device)
    starts = stage_starts(data)
    sections = [data_at(data, epoch) for epoch in starts]
    sizes = [(_image_size(section.image_size, data, split), section.batch_size) for section in sections]
    steps = [_steps(split, batch_size, world_size, accumulation_steps) for _, batch_size in sizes]
    for size, _ in sizes:
        _check_sizes(aug, size)
    if mixup.mixing_enabled(aug.mix):
        mixup.mix_table(aug.mix, seed, 0, 0, 2, 1)  # import SciPy now instead of during the first epoch

    threads = data.threads or default_threads(local_world_size or world_size)
    pixels = load_placed(data, split, device)  # shared by all stages
    mean, std = split.dataset.mean, split.dataset.std
    seeds = [view_seed(seed if draw_seed is None else draw_seed, view) for view in range(data.views)]
    programs = policies.build_programs(aug, mean)
    epoch_order = TrainOrder(data, split, seed)
    bad = bad_samples.for_training(split, data)
    stages: dict[tuple[int, int], Stage] = {}  # equal sizes share a stage
    for (size, batch_size), count in dict(zip(sizes, steps, strict=True)).items():
        fields = size, split.heights, split.widths, mean, std
        samplers = [AugmentationSampler(aug, programs, one, *fields) for one in seeds]
        plan = TrainBatches(epoch_order, batch_size, count, rank, world_size, accumulation_steps, samplers, machines)
        views = len(seeds), flat_views
        spec = LoaderSpec(split, data, batch_size, size, device, threads, pixels, aug, programs, *views)
        stages[size, batch_size] = Stage(plan, choose_backend(spec), bad)
    augment = build_custom(aug.custom, seeds, rank, device)
    return TrainLoader([stages[key] for key in sizes], starts, augment, epochs)


def build_eval_loader(
    data: DataConfig,
    evaluation: EvalConfig | None = None,
    *,
    split: str | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
    replace_bad_samples: bool = False,
) -> EvalLoader:
    """Build the loader of an evaluation split. Together, the loaders of all ranks yield every sample once.

    Each rank reads a contiguous range of samples in stored order. Ranks may have different numbers of batches, and the
    last batch of a rank may be smaller. Each iteration starts at the first sample of the range.

    Args:
        data: Config section `data`.
        evaluation: Config section `eval`, or None for the defaults.
        split: Name of the split, or None for data.val_split.
        device: Device of the batches. If None, use the current GPU, or the CPU if there is no GPU.
        rank, world_size: Rank of this process, and number of evaluating processes.
        local_world_size: Number of ranks on this machine, which share its CPU cores. If None, use `world_size`.
        replace_bad_samples: Whether data.on_bad_sample=skip replaces bad samples. Must be False for an evaluation,
            since every sample must count exactly once.

    Raises:
        UserError: The split cannot be opened or changes while it is loaded, or a setting is incompatible with it.
    """
    evaluation = evaluation or EvalConfig()
    on_bad_sample = data.on_bad_sample if replace_bad_samples else OnBadSample.STOP
    opened = open_limited(data, split or data.val_split, on_bad_sample)
    device = _device(device)
    size = _image_size(evaluation.image_size or data.image_size, data, opened)
    batch_size = evaluation.batch_size or data.batch_size
    threads = data.threads or default_threads(local_world_size or world_size)
    spec = LoaderSpec(opened, data, batch_size, size, device, threads, load_placed(data, opened, device), evaluation)
    plan = EvalBatches(*order.eval_range(len(opened), rank, world_size), batch_size)
    bad = bad_samples.for_training(opened, data) if replace_bad_samples else bad_samples.for_evaluation(opened, data)
    return EvalLoader(Stage(plan, choose_backend(spec), bad))


def open_limited(data: DataConfig, name: str, on_bad_sample: OnBadSample = OnBadSample.STOP) -> Split:
    """Open a split and reduce it to the samples that data.limit selects, the same on every rank.

    Args:
        data: Config section `data`.
        name: Name of the split.
        on_bad_sample: See `open_split`.

    Raises:
        UserError: See `open_split`.
    """
    split = open_split(
        data.path,
        name,
        verify=data.verify,
        on_bad_sample=on_bad_sample,
        classes=data.classes,
        cache=data.cache,
        cache_gib=data.cache_gib,
    )
    if data.limit is None:
        return split
    samples = len(split)
    count = data.limit if isinstance(data.limit, int) else max(1, round(data.limit * samples))
    if count >= samples:
        return split
    labels = np.zeros(samples, np.int64) if split.labels is None else split.labels
    return split.subset(order.stratified_subset(labels, count))


def _steps(split: Split, batch_size: int, world_size: int, accumulation_steps: int) -> int:
    """Return the number of training batches per rank and epoch.

    Raises:
        UserError: The split has too few samples for one optimizer step.
    """
    steps = order.batches_per_epoch(len(split), batch_size, world_size, accumulation_steps)
    if steps == 0:
        most = len(split) // (world_size * accumulation_steps)
        raise UserError(
            f"data.batch_size={batch_size} exceeds the {most} samples per rank of split {split.name!r} "
            f"({len(split)} samples, world_size {world_size}, accumulation_steps {accumulation_steps}); "
            f"use {f'at most {most}' if most else 'fewer ranks or micro-steps, or more samples'}"
        )
    return steps


def _check_sizes(aug: AugConfig, size: int) -> None:
    """Raise UserError if aug.cutout, or aug.padding with aug.padding_mode=reflect, is too large for the image size."""
    if aug.crop == "pad" and aug.padding_mode == PaddingMode.REFLECT and aug.padding >= size:
        raise UserError(
            f"aug.padding={aug.padding} is too large for aug.padding_mode=reflect on images of {size} pixels; "
            f"use at most {size - 1}"
        )
    if aug.cutout > size:
        raise UserError(f"aug.cutout={aug.cutout} exceeds images of {size} pixels; use at most {size}")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _image_size(wanted: int | None, data: DataConfig, split: Split) -> int:
    """Return the image size (height and width) in pixels: `wanted` if given, otherwise that of the stored images.

    Raises:
        UserError: `wanted` is None, and the stored images are not square or differ in size.
    """
    if wanted is not None:
        return wanted
    shape = split.image_shape
    if shape is None or shape[0] != shape[1]:
        stored = "images of several sizes" if shape is None else f"images of {shape[0]} x {shape[1]} pixels"
        raise UserError(f"data.image_size is not set, but {data.path} stores {stored}; set it to the side to train at")
    return shape[0]
