"""Puts loaders together: which order, draws, source and graph a split needs, from its section of the config."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from configs.errors import UserError
from configs.schema import AugConfig, DataConfig, EvalConfig
from pipelines import cpu_graph, draws, graph, mixing, order
from pipelines.assemble import Graphs, assemble, choose_way
from pipelines.background import Plan
from pipelines.loader import Loader
from pipelines.read_ahead import ReadAhead
from pipelines.shards import Split, open_split


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
) -> Loader:
    """A loader of `data.train_split`: shuffled, augmented, in whole batches of `data.batch_size` per rank.

    device: None takes the current GPU, or the CPU where there is none. local_world_size: ranks on this machine, which
    share its cores; None: all of them. len(loader) is a multiple of accumulation_steps.
    """
    aug = aug or AugConfig()
    mixing.check_mixing(data, aug.mix)
    split = open_split(data.path, data.train_split)
    where = _device(device)
    size = _image_size(data, split)
    steps = order.steps_per_epoch(len(split), data.batch_size, world_size, accumulation_steps)
    if steps == 0:
        most = len(split) // (world_size * accumulation_steps)
        raise UserError(
            f"data.batch_size={data.batch_size} exceeds the {most} samples per rank of split {split.name!r} "
            f"({len(split)} samples, world_size {world_size}, accumulation_steps {accumulation_steps}); "
            f"use at most {most}"
        )

    if aug.crop == "pad" and aug.padding_mode == "reflect" and aug.padding >= size:
        raise UserError(
            f"aug.padding={aug.padding} is too much for padding_mode reflect on images of {size} pixels; "
            f"use at most {size - 1}"
        )
    if aug.cutout > size:
        raise UserError(f"aug.cutout={aug.cutout} exceeds images of {size} pixels; use at most {size}")

    lock = Lock()
    windowed = data.order == "sequential-window"
    read_ahead = ReadAhead(split, data.window_shards, seed) if windowed else None

    @lru_cache(maxsize=2)
    def order_of(epoch: int) -> np.ndarray:
        if windowed:
            return order.window_permutation(split.shard, data.window_shards, seed, epoch)
        return order.permutation(len(split), seed, epoch)

    def epoch_order(epoch: int) -> np.ndarray:
        with lock:  # asked for by several threads at once, computed once
            return order_of(epoch)

    def indices(epoch: int, step: int) -> np.ndarray:
        batch = order.train_batch(epoch_order(epoch), step, data.batch_size, rank, world_size)
        if read_ahead is not None:
            read_ahead(epoch, batch)
        return batch

    def dali_graph(stored: graph.Stored, machine: graph.Machine) -> Pipeline:
        return graph.train_graph(stored, machine, aug, size, data.interpolation)

    on_cpu = cpu_graph.train_graph(split.image_shape, aug, size, data.interpolation)
    stays = split.encoding == "npy" and split.image_shape == (size, size, 3) and aug.crop != "random-resized"
    needs_dali = graph.jitters(aug) or aug.cutout > 0
    reflects = aug.padding_mode == "reflect"
    graphs = Graphs(dali_graph, on_cpu, needs_dali, crops_and_flips=stays and not needs_dali, reflects=reflects)
    way = choose_way(data, split, where, graphs)

    def drawn(epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        return _train_draws(aug, split, samples, seed, epoch, size, way.by_dali)

    def mix(epoch: int, step: int, samples: int, size: int) -> np.ndarray:
        return mixing.mix_table(aug.mix, seed, epoch, step, samples, size, rank=rank, world_size=world_size,
                                accumulation_steps=accumulation_steps)  # fmt: skip

    plan = Plan(steps * data.batch_size, data.batch_size, indices, drawn, epoch_order)
    if mixing.is_on(aug.mix):
        mix(0, 0, 2, size)  # imports now what it needs, and not within the first epoch
        plan = replace(plan, mix=mix)
    return assemble(split, data, plan, size, where, graphs, way, local_world_size or world_size)


def build_eval_loader(
    data: DataConfig,
    evaluation: EvalConfig | None = None,
    *,
    split: str | None = None,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
) -> Loader:
    """A loader of `split` (None: data.val_split) in stored order: this rank's contiguous piece, every sample once.

    Ranks may have different numbers of batches and the last one may be smaller; each iteration starts anew.
    """
    evaluation = evaluation or EvalConfig()
    opened = open_split(data.path, split or data.val_split)
    where = _device(device)
    size = _image_size(data, opened)
    batch_size = evaluation.batch_size or data.batch_size
    start, stop = order.eval_range(len(opened), rank, world_size)

    def indices(epoch: int, step: int) -> np.ndarray:
        begin = start + step * batch_size
        return np.arange(begin, min(begin + batch_size, stop))

    def dali_graph(stored: graph.Stored, machine: graph.Machine) -> Pipeline:
        return graph.eval_graph(stored, machine, size, evaluation.crop_fraction, data.interpolation)

    plan = Plan(stop - start, batch_size, indices, repeats=True)
    on_cpu = cpu_graph.eval_graph(opened.image_shape, size, evaluation.crop_fraction, data.interpolation)
    graphs = Graphs(dali_graph, on_cpu)
    way = choose_way(data, opened, where, graphs)
    return assemble(opened, data, plan, size, where, graphs, way, local_world_size or world_size)


def _train_draws(
    aug: AugConfig, split: Split, indices: np.ndarray, seed: int, epoch: int, size: int, by_dali: bool
) -> dict[str, np.ndarray]:
    """The inputs of the graph for these samples; pipelines.draws says what each means."""
    feeds: dict[str, np.ndarray] = {}
    draw_flips = draws.alternating_flips if aug.flip_mode == "alternating" else draws.flips
    flips = draw_flips(indices, seed, epoch, aug.flip) if aug.flip > 0 else None
    if aug.crop == "random-resized":
        heights, widths = split.heights[indices], split.widths[indices]
        boxes = draws.random_resized_crops(indices, seed, epoch, heights, widths, aug.scale, aug.ratio)
        start, end = boxes[:, :2].astype(np.float32), (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
        if flips is not None:
            mirrored = flips == 1
            start[mirrored, 1], end[mirrored, 1] = end[mirrored, 1], start[mirrored, 1]
        feeds |= {"crop_start": start, "crop_end": end}
    else:
        if aug.crop == "pad":
            offsets = draws.pad_crop_offsets(indices, seed, epoch, aug.padding)
            shifts = by_dali and aug.padding_mode == "reflect"
            feeds |= {"shift": graph.shifts(offsets, aug.padding)} if shifts else {"offset": offsets}
        if flips is not None:
            feeds["flip"] = flips
    if graph.jitters(aug):
        jitter = aug.color_jitter
        factors = draws.jitter_factors(
            indices, seed, epoch, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        feeds |= {name: np.ascontiguousarray(factors[:, i]) for i, name in enumerate(graph.JITTERS)}
    if aug.cutout > 0:
        feeds["cutout"] = draws.cutout_corners(indices, seed, epoch, size, aug.cutout).astype(np.float32)
    return feeds


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return where


def _image_size(data: DataConfig, split: Split) -> int:
    if data.image_size is not None:
        return data.image_size
    shape = split.image_shape
    if shape is None or shape[0] != shape[1]:
        stored = "images of several sizes" if shape is None else f"images of {shape[0]} x {shape[1]} pixels"
        raise UserError(f"data.image_size is not set, but {data.path} stores {stored}; set it to the side to train at")
    return shape[0]
