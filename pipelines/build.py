"""Puts loaders together: which order, draws, source and graph a split needs, from its section of the config."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from configs.errors import UserError
from configs.schema import AugConfig, DataConfig, EvalConfig
from pipelines import draws, graph, order
from pipelines.gather import DevicePixels, HostPixels, MappedFiles, Source, load_resident, resident_fits
from pipelines.loader import HANDED_OUT, IN_FLIGHT, Buffering, Loader, Plan, Work
from pipelines.read_ahead import ReadAhead
from pipelines.runner import GraphRunner, PlainRunner, Runner
from pipelines.shards import Split, load_dataset, open_split

MAX_GATHERERS = 2  # more than two threads wait for memory, not for each other
MAX_BURST = 2  # batches that pass between threads at once where they are small …
HANDOVER_BYTES = 2**23  # … up to so many bytes


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

    def schedule(epoch: int, step: int) -> Work:
        indices = order.train_batch(epoch_order(epoch), step, data.batch_size, rank, world_size)
        if read_ahead is not None:
            read_ahead(epoch, indices)
        return Work(indices, _train_draws(aug, split, indices, seed, epoch, size))

    alters = aug.crop != "none" or aug.flip > 0 or aug.cutout > 0 or graph.jitters(aug)

    def build_graph(stored: graph.Stored, machine: graph.Machine) -> Pipeline:
        return graph.train_graph(stored, machine, aug, size, data.interpolation)

    plan = Plan(steps * data.batch_size, data.batch_size, schedule, epoch_order)
    build = build_graph if alters or not _is_stored_at(split, size) else None
    return _build(split, data, plan, size, where, build, local_world_size or world_size)


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

    def schedule(epoch: int, step: int) -> Work:
        begin = start + step * batch_size
        return Work(np.arange(begin, min(begin + batch_size, stop)), {})

    def build_graph(stored: graph.Stored, machine: graph.Machine) -> Pipeline:
        return graph.eval_graph(stored, machine, size, evaluation.crop_fraction, data.interpolation)

    untouched = _is_stored_at(opened, size) and round(size / evaluation.crop_fraction) == size
    plan = Plan(stop - start, batch_size, schedule, repeats=True)
    return _build(opened, data, plan, size, where, None if untouched else build_graph, local_world_size or world_size)


def _build(
    split: Split,
    data: DataConfig,
    plan: Plan,
    size: int,
    device: torch.device,
    build_graph: Callable[[graph.Stored, graph.Machine], Pipeline] | None,
    ranks: int,
) -> Loader:
    """The loader of a plan; build_graph None: stored pixels are handed over as they are."""
    on_gpu = device.type == "cuda"
    resident = _placed_on_device(data, split, device)
    shape = split.image_shape or (0, 0, 0)
    buffering = _buffering(
        data, plan.batch_size, shape, ranks, gathers=split.encoding == "npy" and not (resident and on_gpu)
    )
    stream = torch.cuda.Stream(device) if on_gpu else None
    source: Source
    if split.encoding != "npy":
        source = MappedFiles(split)
    elif resident and on_gpu:
        with torch.cuda.stream(stream):  # whose memory no other stream is given before its last gather is over
            source = DevicePixels(load_resident(split, device), shape, plan.batch_size, buffering.slots)
    else:
        rows: np.ndarray | None
        view, rows = split.pixel_rows()
        pixels = torch.from_numpy(view)
        if resident:
            pixels, rows = load_resident(split, device), None
        handed_out = build_graph is None and not on_gpu
        source = HostPixels(pixels, rows, shape, plan.batch_size, buffering.slots, pinned=on_gpu, handed_out=handed_out)
    runner: Runner
    if build_graph is None:
        runner = PlainRunner(device, stream)
    else:
        stored = graph.Stored(split.encoding, split.image_shape, resident, tuple(load_dataset(data.path)["mean"]))
        threads = data.threads or default_threads(ranks)
        machine = graph.Machine(device.index if on_gpu else None, plan.batch_size, threads, data.hw_decoder_load)
        runner = GraphRunner(build_graph(stored, machine), device, stream)
    return Loader(
        plan,
        source,
        runner,
        buffering,
        labels=split.labels,
        image_size=size,
        device=device,
        gather_stream=stream,
    )


def _buffering(
    data: DataConfig, batch_size: int, shape: tuple[int, int, int], ranks: int, *, gathers: bool
) -> Buffering:
    """gathers: the threads copy pixels in host memory, which two do faster than one."""
    threads = min(MAX_GATHERERS, default_threads(ranks)) if gathers else 1
    batch_bytes = batch_size * int(np.prod(shape))
    burst = max(1, min(MAX_BURST, HANDOVER_BYTES // batch_bytes)) if batch_bytes else 1
    ahead = max(data.prefetch, IN_FLIGHT + HANDED_OUT)
    return Buffering((-(-ahead // threads) + 2 * burst) * threads, threads, burst)


def _train_draws(
    aug: AugConfig, split: Split, indices: np.ndarray, seed: int, epoch: int, size: int
) -> dict[str, np.ndarray]:
    """The inputs of `graph.train_graph` for these samples; pipelines.draws says what each means."""
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
            reflects = aug.padding_mode == "reflect"
            feeds |= {"shift": graph.shifts(offsets, aug.padding)} if reflects else {"offset": offsets}
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


def default_threads(ranks: int) -> int:
    """DALI CPU threads of one rank: the cores that this process may use, shared by the ranks of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _image_size(data: DataConfig, split: Split) -> int:
    if data.image_size is not None:
        return data.image_size
    shape = split.image_shape
    if shape is None or shape[0] != shape[1]:
        stored = "images of several sizes" if shape is None else f"images of {shape[0]} x {shape[1]} pixels"
        raise UserError(f"data.image_size is not set, but {data.path} stores {stored}; set it to the side to train at")
    return shape[0]


def _is_stored_at(split: Split, size: int) -> bool:
    """Whether the stored pixels are what a graph without augmentation would give."""
    return split.encoding == "npy" and split.image_shape == (size, size, 3)


def _placed_on_device(data: DataConfig, split: Split, device: torch.device) -> bool:
    if data.placement == "auto":
        return resident_fits(split, device)
    if data.placement == "device" and split.encoding != "npy":
        raise UserError(
            f"data.placement=device keeps raw pixels, but {data.path} stores {split.encoding}; "
            "use data.placement=host or convert with --encoding npy"
        )
    return data.placement == "device"
