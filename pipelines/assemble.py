"""Choose the backend, source, runner, buffers and threads of a loader, and assemble the loader."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from configs.schema import DataConfig, PaddingMode
from configs.utils.errors import UserError
from pipelines.cpu.graph import CpuGraph
from pipelines.gpu import dali_graph
from pipelines.gpu.dali_graph import ImageSpec, PipelineConfig
from pipelines.gpu.dali_runner import DaliRunner, DecodeCheck
from pipelines.interfaces import Runner, SampleSource
from pipelines.loader.bad_samples import BadSamples
from pipelines.loader.batches import BatchPlan
from pipelines.loader.buffers import SlotBuffers, resident_fits
from pipelines.loader.jpeg_sources import HostJpegs, MappedFiles
from pipelines.loader.loader import CONSUMER_HELD, IN_FLIGHT, Loader
from pipelines.loader.prefetch import BufferConfig
from pipelines.loader.runner import CopyRunner
from pipelines.loader.sources import DevicePixels, HostPixels
from pipelines.storage.split import Split

MAX_COPY_THREADS = 2  # copying is bound by memory bandwidth beyond this
MAX_GROUP = 8  # maximum number of batches that are gathered together
GROUP_BYTES = 2**24  # maximum size of a group of several batches


@dataclass(frozen=True)
class Transforms:
    """Two implementations of the same transforms: one for DALI and one for the CPU kernels."""

    dali: Callable[[ImageSpec, PipelineConfig], Any]  # builds the DALI pipeline
    cpu: CpuGraph | None  # None if stored pixels need no transforms
    crops_and_flips: bool = False  # whether images are stored at the batch's size and only cropped and flipped
    padding_mode: PaddingMode = PaddingMode.CONSTANT


@dataclass(frozen=True)
class Backend:
    """How samples are transformed and how they reach the device."""

    resident: bool  # whether the whole split is in the device's memory
    uses_dali: bool  # whether a DALI graph applies the transforms; otherwise the sample source does
    passes_through: bool  # whether stored pixels need no transforms


@dataclass(frozen=True)
class LoaderSpec:
    """Data, image size and device of a loader."""

    split: Split
    data: DataConfig
    image_size: int  # height and width of the batch's images, pixels
    device: torch.device
    ranks: int  # ranks on this machine; they share its cores


def choose_backend(resident: bool, split: Split, device: torch.device, transforms: Transforms) -> Backend:
    """Choose the CPU kernels on a CPU. On a GPU, choose DALI unless a single copy or kernel launch suffices."""
    passes_through = split.encoding == "npy" and transforms.cpu is None
    without_dali = passes_through or device.type != "cuda" or (resident and transforms.crops_and_flips)
    return Backend(resident, not without_dali, passes_through)


def assemble(
    spec: LoaderSpec,
    plan: BatchPlan,
    transforms: Transforms,
    backend: Backend,
    pixels: Callable[[], torch.Tensor],
    bad: BadSamples,
) -> Loader:
    """Assemble a loader from a batch plan, transforms and a backend.

    Args:
        spec: Data, image size and device.
        plan: Batches of an epoch.
        transforms: Transforms applied to each sample.
        backend: Result of `choose_backend`.
        pixels: Function that returns the pixels of a resident split; see `load_resident`.
        bad: Bad samples found so far, and the limit on their number.

    Raises:
        UserError: A file changed while a resident split was loaded.
    """
    split, data, device, size = spec.split, spec.data, spec.device, spec.image_size
    on_gpu = device.type == "cuda"
    threads = data.threads or default_threads(spec.ranks)
    gathers_stored = backend.uses_dali or backend.passes_through
    gathered_shape = (split.image_shape or (0, 0, 0)) if gathers_stored else (size, size, 3)
    if (backend.uses_dali and split.encoding != "npy") or (backend.resident and on_gpu):
        gather_threads = 1  # the thread only lists encoded files or launches kernels
    else:
        gather_threads = min(MAX_COPY_THREADS, threads) if gathers_stored else threads
    buffers = _buffer_config(data, plan.batch_size * math.prod(gathered_shape), gather_threads)
    images = ImageSpec(split.encoding, split.image_shape, backend.resident, split.dataset.mean)
    pipeline = PipelineConfig(device.index if on_gpu else None, plan.batch_size, threads, data.hw_decoder_load)
    stream = torch.cuda.Stream(device) if on_gpu else None
    # The allocator reuses the source's memory only after this stream has finished using the memory.
    with torch.cuda.stream(stream):
        if backend.uses_dali and split.encoding != "npy":
            source: SampleSource = _mapped_files(split, images, pipeline)
        else:
            slot_size = plan.batch_size * buffers.group
            source = _pixel_source(spec, transforms, backend, pixels, gathered_shape, slot_size, buffers.slots)
    runner: Runner = CopyRunner(device, stream)
    if backend.uses_dali:
        runner = DaliRunner(lambda: transforms.dali(images, pipeline), device)
    return Loader(
        plan,
        source,
        runner,
        buffers,
        bad,
        labels=split.labels,
        image_size=size,
        device=device,
        gather_stream=stream,
    )


def _mapped_files(split: Split, images: ImageSpec, pipeline: PipelineConfig) -> MappedFiles:
    single = replace(pipeline, batch_size=1)
    return MappedFiles(split, DecodeCheck(lambda: dali_graph.decoding_graph(images, single)).decodes)


def _pixel_source(
    spec: LoaderSpec,
    transforms: Transforms,
    backend: Backend,
    pixels: Callable[[], torch.Tensor],
    shape: tuple[int, int, int],
    slot_size: int,
    slots: int,
) -> SampleSource:
    """Return a source of pixels, or of JPEG files that are decoded on the CPU.

    Args:
        spec, transforms, backend, pixels: See `assemble`.
        shape: Height, width and channels of an image in a slot.
        slot_size: Number of images per slot.
        slots: Number of slots.
    """
    split, device = spec.split, spec.device
    on_gpu, raw, stored_shape = device.type == "cuda", split.encoding == "npy", split.image_shape or (0, 0, 0)
    if raw and backend.resident and on_gpu:
        if backend.uses_dali or backend.passes_through:
            return DevicePixels(pixels(), stored_shape, slot_size, slots, waits=backend.uses_dali)
        from pipelines.gpu.triton_crop_flip import TritonCropFlip  # Triton comes with GPU builds of torch only

        return TritonCropFlip(pixels(), stored_shape, spec.image_size, slot_size, slots, transforms.padding_mode)
    handed_out = not backend.uses_dali and not on_gpu
    buffers = SlotBuffers(slots, slot_size, shape, pinned=on_gpu, handed_out=handed_out)
    graph = None if backend.uses_dali else transforms.cpu
    if not raw:
        return HostJpegs(split, buffers, graph)
    if backend.resident:
        content = pixels().numpy().reshape(-1)
        return HostPixels(content, np.arange(len(split)) * math.prod(stored_shape), stored_shape, buffers, graph)
    return HostPixels(split.content, split.pixel_starts(), stored_shape, buffers, graph, split.monitor)


def _buffer_config(data: DataConfig, batch_bytes: int, threads: int) -> BufferConfig:
    group = max(1, min(MAX_GROUP, GROUP_BYTES // max(batch_bytes, 1)))
    groups = -(-max(data.prefetch, IN_FLIGHT + CONSUMER_HELD) // group) + 1  # plus one for the consumer
    return BufferConfig((-(-groups // threads) + 2) * threads, threads, group)


def default_threads(ranks: int) -> int:
    """Return the number of CPU threads per rank when `ranks` ranks share the cores available to this process."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def placed_on_device(data: DataConfig, split: Split, device: torch.device) -> bool:
    """Return True if data.placement puts the whole split in device memory.

    data.placement=auto depends on the size of the split; see `resident_fits`.

    Raises:
        UserError: data.placement=device, but the split stores encoded images.
    """
    if data.placement == "auto":
        return resident_fits(split, device)
    if data.placement == "device" and split.encoding != "npy":
        raise UserError(
            f"data.placement=device keeps raw pixels, but {data.path} stores {split.encoding}; "
            "use data.placement=host or convert with --encoding npy"
        )
    return data.placement == "device"
