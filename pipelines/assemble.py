"""Puts a loader's parts together: which source and which graph, on which device, with how many buffers and threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from configs.schema import DataConfig
from configs.utils.errors import UserError
from pipelines.cpu import graph as cpu_graph
from pipelines.gpu import dali_graph
from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.jpeg_sources import HostJpegs, MappedFiles
from pipelines.loader.loader import CONSUMER_HELD, IN_FLIGHT, Loader
from pipelines.loader.prefetch import BufferConfig, Plan
from pipelines.loader.runner import CopyRunner, DaliRunner, DecodeCheck, Runner
from pipelines.loader.sources import DevicePixels, HostPixels, SampleSource, SlotBuffers, resident_fits
from pipelines.storage.split import Split

MAX_COPIERS = 2  # more than two threads that only copy wait for memory, not for each other
MAX_GROUP = 8  # batches gathered at once where they are small …
GROUP_BYTES = 2**24  # … up to so many bytes


@dataclass(frozen=True)
class Transforms:
    """What is done to the samples, as DALI does it and as the CPU's own kernels do."""

    dali: Callable[[dali_graph.ImageSpec, dali_graph.PipelineConfig], Pipeline]
    cpu: cpu_graph.CpuGraph | None  # None: nothing, stored pixels stay as they are
    crops_and_flips: bool = False  # and nothing else, pixels that are stored at the size of the batch
    reflects: bool = False  # what crops show outside of the image


@dataclass(frozen=True)
class Backend:
    """How samples come to the device."""

    resident: bool  # the whole split lies in the device's memory
    uses_dali: bool  # its graph runs; else a kernel gathers and augments at once
    passes_through: bool  # stored pixels are handed over as they are


def choose_backend(resident: bool, split: Split, device: torch.device, graphs: Transforms) -> Backend:
    """The CPU's own kernels do all there; on a GPU DALI does what one copy or one launch cannot do."""
    untouched = split.encoding == "npy" and graphs.cpu is None
    alone = untouched or device.type != "cuda" or (resident and graphs.crops_and_flips)
    return Backend(resident, not alone, untouched)


def assemble(
    split: Split,
    data: DataConfig,
    plan: Plan,
    size: int,
    device: torch.device,
    graphs: Transforms,
    way: Backend,
    pixels: Callable[[], torch.Tensor],
    ranks: int,
    bad: BadSamples,
) -> Loader:
    """The loader of a plan. pixels: of a split that is resident, see `load_resident`."""
    on_gpu = device.type == "cuda"
    threads = data.threads or default_threads(ranks)
    gathered = (split.image_shape or (0, 0, 0)) if way.uses_dali or way.passes_through else (size, size, 3)
    if (way.uses_dali and split.encoding != "npy") or (way.resident and on_gpu):
        gatherers = 1  # which lists where encoded images lie, or launches
    else:
        gatherers = min(MAX_COPIERS, threads) if way.uses_dali or way.passes_through else threads
    buffering = _buffering(data, plan.batch_size * math.prod(gathered), gatherers)
    stored = dali_graph.ImageSpec(split.encoding, split.image_shape, way.resident, tuple(split.dataset["mean"]))
    machine = dali_graph.PipelineConfig(
        device.index if on_gpu else None, plan.batch_size, threads, data.hw_decoder_load
    )
    stream = torch.cuda.Stream(device) if on_gpu else None
    with torch.cuda.stream(stream):  # whose memory no other stream is given before its last gather is over
        if way.uses_dali and split.encoding != "npy":
            source: SampleSource = _mapped_files(split, stored, machine)
        else:
            slot_size = plan.batch_size * buffering.group
            source = _source(split, graphs, way, pixels, gathered, slot_size, buffering.slots, device)
    runner: Runner = CopyRunner(device, stream)
    if way.uses_dali:
        runner = DaliRunner(lambda: graphs.dali(stored, machine), device)
    return Loader(
        plan,
        source,
        runner,
        buffering,
        bad,
        labels=split.labels,
        image_size=size,
        device=device,
        gather_stream=stream,
    )


def _mapped_files(split: Split, stored: dali_graph.ImageSpec, machine: dali_graph.PipelineConfig) -> MappedFiles:
    alone = replace(machine, batch_size=1)
    return MappedFiles(split, DecodeCheck(lambda: dali_graph.decoding_graph(stored, alone)).decodes)


def _source(
    split: Split,
    graphs: Transforms,
    way: Backend,
    pixels: Callable[[], torch.Tensor],
    gathered: tuple[int, int, int],
    slot_size: int,
    count: int,
    device: torch.device,
) -> SampleSource:
    """Where pixels come from: `count` slots of `slot_size` images of the shape `gathered`."""
    on_gpu, raw, shape = device.type == "cuda", split.encoding == "npy", split.image_shape or (0, 0, 0)
    if raw and way.resident and on_gpu:
        if way.uses_dali or way.passes_through:
            return DevicePixels(pixels(), shape, slot_size, count, waits=way.uses_dali)
        from pipelines.gpu.triton_crop_flip import TritonCropFlip  # needs Triton, as the GPU builds of torch bring it

        padding_mode = "reflect" if graphs.reflects else "black"
        return TritonCropFlip(pixels(), shape, gathered[0], slot_size, count, padding_mode)
    handed_out = not way.uses_dali and not on_gpu
    slots = SlotBuffers(count, slot_size, gathered, pinned=on_gpu, handed_out=handed_out)
    done = None if way.uses_dali else graphs.cpu
    if not raw:
        return HostJpegs(split, slots, done)
    if way.resident:
        content = pixels().numpy().reshape(-1)
        return HostPixels(content, np.arange(len(split)) * math.prod(shape), shape, slots, done)
    return HostPixels(split.content, split.pixel_starts(), shape, slots, done, split.monitor)


def _buffering(data: DataConfig, batch_bytes: int, threads: int) -> BufferConfig:
    group = max(1, min(MAX_GROUP, GROUP_BYTES // max(batch_bytes, 1)))
    groups = -(-max(data.prefetch, IN_FLIGHT + CONSUMER_HELD) // group) + 1  # the consumer's, and those that are ready
    return BufferConfig((-(-groups // threads) + 2) * threads, threads, group)


def default_threads(ranks: int) -> int:
    """CPU threads of one rank: the cores that this process may use, shared by the ranks of the machine."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def placed_on_device(data: DataConfig, split: Split, device: torch.device) -> bool:
    """Whether the whole split lies in the device's memory, as data.placement says."""
    if data.placement == "auto":
        return resident_fits(split, device)
    if data.placement == "device" and split.encoding != "npy":
        raise UserError(
            f"data.placement=device keeps raw pixels, but {data.path} stores {split.encoding}; "
            "use data.placement=host or convert with --encoding npy"
        )
    return data.placement == "device"
