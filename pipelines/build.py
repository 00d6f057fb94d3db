"""Puts loaders together: which order, draws, source and graph a split needs, from its section of the config."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from configs.schema import AugConfig, DataConfig, EvalConfig
from configs.stages import data_at, stage_starts
from configs.utils.errors import UserError
from pipelines import order
from pipelines.assemble import Transforms, assemble, choose_backend, placed_on_device
from pipelines.augment import mixup, policies
from pipelines.augment.sampler import AugmentationSampler
from pipelines.cpu import graph as cpu_graph
from pipelines.gpu import dali_graph as graph
from pipelines.loader import bad_samples
from pipelines.loader.epoch_order import ReadAhead
from pipelines.loader.loader import Loader
from pipelines.loader.prefetch import Plan
from pipelines.loader.sources import load_resident
from pipelines.loader.train_loader import StagedLoader
from pipelines.storage.split import Split, open_split


def build_train_loader(
    data: DataConfig,
    aug: AugConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
    accumulation_steps: int = 1,
) -> Loader | StagedLoader:
    """A loader of `data.train_split`: shuffled, augmented, in whole batches of `data.batch_size` per rank.

    device: None takes the current GPU, or the CPU where there is none. local_world_size: ranks on this machine, which
    share its cores; None: all of them. len(loader) is a multiple of accumulation_steps. With data.stages it changes its
    image and batch size from epoch to epoch.
    """
    aug = aug or AugConfig()
    mixup.check_mixing(data, aug.mix)
    skips = data.on_bad_sample == "skip"
    split = open_split(data.path, data.train_split, verify=data.verify, allow_damaged_images=skips)
    where = _device(device)
    resident = placed_on_device(data, split, where)
    pixels = lru_cache(1)(lambda: load_resident(split, where))  # shared by all stages
    programs = policies.build_programs(aug, tuple(split.dataset["mean"]))
    order_of = TrainOrder(data, split, seed)
    bad = bad_samples.for_training(split, data)

    def mix(epoch: int, step: int, samples: int, size: int) -> np.ndarray:
        return mixup.mix_table(aug.mix, seed, epoch, step, samples, size, rank=rank, world_size=world_size,
                                accumulation_steps=accumulation_steps)  # fmt: skip

    if mixup.mixing_enabled(aug.mix):
        mix(0, 0, 2, 1)  # imports now what it needs, and not within the first epoch

    def build(section: DataConfig) -> Loader:
        batch_size = section.batch_size
        steps = order.batches_per_epoch(len(split), batch_size, world_size, accumulation_steps)
        if steps == 0:
            most = len(split) // (world_size * accumulation_steps)
            raise UserError(
                f"data.batch_size={batch_size} exceeds the {most} samples per rank of split {split.name!r} "
                f"({len(split)} samples, world_size {world_size}, accumulation_steps {accumulation_steps}); "
                f"use at most {most}"
            )
        size = _image_size(section.image_size, data, split)
        _check_sizes(aug, size)

        def indices(epoch: int, step: int) -> np.ndarray:
            batch = order.train_batch(order_of(epoch), step, batch_size, rank, world_size)
            if order_of.read_ahead is not None:
                order_of.read_ahead(epoch, batch)
            return batch

        def dali_graph(stored: graph.ImageSpec, machine: graph.PipelineConfig) -> Pipeline:
            return graph.train_graph(stored, machine, aug, size, data.interpolation, data.antialias, programs)

        mean = tuple(split.dataset["mean"])
        on_cpu = cpu_graph.train_graph(split.image_shape, aug, size, data.interpolation, data.antialias, programs, mean)
        stays = split.encoding == "npy" and split.image_shape == (size, size, 3) and aug.crop != "random-resized"
        paints = programs is not None or aug.erase.probability > 0 or aug.cutout > 0
        reflects = aug.padding_mode == "reflect"
        graphs = Transforms(dali_graph, on_cpu, crops_and_flips=stays and not paints, reflects=reflects)
        way = choose_backend(resident, split, where, graphs)
        drawn = AugmentationSampler(aug, split, programs, seed, size, way.uses_dali)
        mixes = mix if mixup.mixing_enabled(aug.mix) else None
        plan = Plan(steps * batch_size, batch_size, indices, drawn, order_of, mix=mixes)
        return assemble(split, section, plan, size, where, graphs, way, pixels, local_world_size or world_size,
                        bad)  # fmt: skip

    if not data.stages:
        return build(data)
    starts = stage_starts(data)
    sections = [data_at(data, epoch) for epoch in starts]
    sizes = [(section.image_size, section.batch_size) for section in sections]  # that come again share a loader
    loaders = {size: build(section) for size, section in dict(zip(sizes, sections, strict=True)).items()}
    return StagedLoader([loaders[size] for size in sizes], starts)


class TrainOrder:
    """Called with an epoch, gives the order of all its samples, int64 [samples]; several threads may ask at once."""

    def __init__(self, data: DataConfig, split: Split, seed: int) -> None:
        windowed = data.order == "sequential-window"
        self.read_ahead = ReadAhead(split, data.window_shards, seed) if windowed else None
        self._lock = Lock()

        @lru_cache(maxsize=2)
        def order_of(epoch: int) -> np.ndarray:
            if windowed:
                return order.window_permutation(split.shard, data.window_shards, seed, epoch)
            return order.permutation(len(split), seed, epoch)

        self._order_of = order_of

    def __call__(self, epoch: int) -> np.ndarray:
        with self._lock:  # computed once
            return self._order_of(epoch)


def _check_sizes(aug: AugConfig, size: int) -> None:
    """Raise for what does not fit into images of `size` pixels."""
    if aug.crop == "pad" and aug.padding_mode == "reflect" and aug.padding >= size:
        raise UserError(
            f"aug.padding={aug.padding} is too much for padding_mode reflect on images of {size} pixels; "
            f"use at most {size - 1}"
        )
    if aug.cutout > size:
        raise UserError(f"aug.cutout={aug.cutout} exceeds images of {size} pixels; use at most {size}")


def build_eval_loader(
    data: DataConfig,
    evaluation: EvalConfig | None = None,
    *,
    split: str | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
    replaces: bool = False,
) -> Loader:
    """A loader of `split` (None: data.val_split) in stored order: this rank's contiguous piece, every sample once.

    Ranks may have different numbers of batches and the last one may be smaller; each iteration starts anew. replaces:
    data.on_bad_sample holds, which it does not where samples are counted.
    """
    evaluation = evaluation or EvalConfig()
    skips = replaces and data.on_bad_sample == "skip"
    opened = open_split(data.path, split or data.val_split, verify=data.verify, allow_damaged_images=skips)
    where = _device(device)
    size = _image_size(evaluation.image_size or data.image_size, data, opened)
    squash = evaluation.crop_mode == "squash"
    batch_size = evaluation.batch_size or data.batch_size
    start, stop = order.eval_range(len(opened), rank, world_size)

    def indices(epoch: int, step: int) -> np.ndarray:
        begin = start + step * batch_size
        return np.arange(begin, min(begin + batch_size, stop))

    def dali_graph(stored: graph.ImageSpec, machine: graph.PipelineConfig) -> Pipeline:
        return graph.eval_graph(
            stored, machine, size, evaluation.crop_fraction, data.interpolation, data.antialias, squash
        )

    plan = Plan(stop - start, batch_size, indices, repeats=True)
    on_cpu = cpu_graph.eval_graph(
        opened.image_shape, size, evaluation.crop_fraction, data.interpolation, data.antialias, squash
    )
    graphs = Transforms(dali_graph, on_cpu)
    way = choose_backend(placed_on_device(data, opened, where), opened, where, graphs)
    ranks = local_world_size or world_size
    bad = bad_samples.for_training(opened, data) if replaces else bad_samples.for_evaluation(opened, data)
    return assemble(opened, data, plan, size, where, graphs, way, lambda: load_resident(opened, where), ranks, bad)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def _image_size(wanted: int | None, data: DataConfig, split: Split) -> int:
    """The side that the config asks for, else that of the stored images."""
    if wanted is not None:
        return wanted
    shape = split.image_shape
    if shape is None or shape[0] != shape[1]:
        stored = "images of several sizes" if shape is None else f"images of {shape[0]} x {shape[1]} pixels"
        raise UserError(f"data.image_size is not set, but {data.path} stores {stored}; set it to the side to train at")
    return shape[0]
