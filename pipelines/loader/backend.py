"""Backends turn stored samples into batches. This module defines their interface and the backend for a CPU."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import AugConfig, DataConfig, EvalConfig, OnBadSample
from pipelines.augment.ops import Programs
from pipelines.cpu import graph
from pipelines.cpu.graph import CpuGraph
from pipelines.interfaces import Draws, Runner, RunnerResult, SampleSource, StoredImages, no_wait
from pipelines.loader.buffers import LentBuffers, SlotBuffers
from pipelines.loader.jpeg_sources import HostJpegs
from pipelines.loader.sources import HostPixels, ReadPixels
from pipelines.storage.split import Split

MAX_COPY_THREADS = 2  # copying is bound by memory bandwidth beyond this


@dataclass(frozen=True)
class LoaderSpec:
    """What a backend needs to know: the samples, their transforms and the batches of one image and batch size."""

    split: Split
    data: DataConfig
    batch_size: int
    image_size: int  # height and width of the batch's images, pixels
    device: torch.device
    threads: int  # CPU threads of this rank
    pixels: torch.Tensor | None  # the whole split in the device's memory, uint8 [samples, H * W * 3], or None
    transforms: AugConfig | EvalConfig  # of training or of evaluation
    programs: Programs | None = None  # augmentation programs of `transforms`
    views: int = 1  # images per sample
    flat_views: bool = False  # whether every view has a label of its own

    @property
    def only_crops_flips_and_erases(self) -> bool:
        """Whether images are stored as pixels at the batch's size, and training only crops, flips and erases them."""
        aug, side = self.transforms, self.image_size
        if not isinstance(aug, AugConfig) or self.split.encoding != "npy":
            return False
        return self.split.image_shape == (side, side, 3) and aug.crop != "random-resized" and self.programs is None


class Backend:
    """Base class of backends: the decision how samples are transformed and how they reach the device.

    Attributes:
        spec: What to load.
        image_shape: Height, width and channels of a gathered image, or zeros if encoded files are gathered.
        threads: Number of threads that gather samples.
        source_views: Images per sample that the source writes: those of the batch, or one if the runner repeats it.
        stream: CUDA stream on which the threads gather, or None on a CPU.
    """

    image_shape: tuple[int, int, int]
    threads: int
    stream: torch.cuda.Stream | None = None

    def __init__(self, spec: LoaderSpec) -> None:
        self.spec, self.source_views = spec, spec.views

    def source(self, slots: int, slot_size: int) -> SampleSource:
        """Return a source that fills `slots` slots of up to `slot_size` images each."""
        raise NotImplementedError

    def runner(self) -> Runner:
        """Return a runner that turns filled slots into batches on the device."""
        raise NotImplementedError

    def inputs(self, draws: Draws) -> Draws:
        """Convert the draws of `AugmentationSampler` to what the source and the runner of this backend read."""
        return draws


class CpuBackend(Backend):
    """Numba kernels read the stored or decoded pixels and write the batch, which is handed out without a copy."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        self._graph = build_graph(spec)
        is_copy = self._graph is None and spec.split.encoding == "npy"
        self.threads = min(MAX_COPY_THREADS, spec.threads) if is_copy else spec.threads
        self.image_shape = (spec.image_size, spec.image_size, 3)

    def source(self, slots: int, slot_size: int) -> SampleSource:
        buffers = LentBuffers(slots, slot_size, self.image_shape)
        if self.spec.split.encoding == "npy":
            return pixels_on_host(self.spec, buffers, self._graph)
        data = self.spec.data
        # A sample is bad or not whatever part of it an epoch reads, so that a resumed run replaces the same samples.
        to_end = data.on_bad_sample == OnBadSample.SKIP
        return HostJpegs(
            self.spec.split,
            buffers,
            self._graph,
            fast=data.jpeg_decode == "fast",
            to_end=to_end,
            views=self.spec.views,
        )

    def runner(self) -> Runner:
        return HostRunner()


class HostRunner:
    """Runner that passes batches on as they are."""

    def __init__(self) -> None:
        self._ready: deque[RunnerResult] = deque()

    def submit(self, images: StoredImages, labels: np.ndarray, draws: Draws) -> None:
        assert isinstance(images, torch.Tensor)
        self._ready.append((images, torch.from_numpy(labels), no_wait))

    def result(self) -> RunnerResult:
        return self._ready.popleft()

    def restart(self) -> None:
        self._ready.clear()


def build_graph(spec: LoaderSpec) -> CpuGraph | None:
    """Return the transforms of `spec` as CPU kernels, or None if stored pixels need no transforms."""
    split, size, data, transforms = spec.split, spec.image_size, spec.data, spec.transforms
    if isinstance(transforms, AugConfig):
        return graph.train_graph(
            split.image_shape,
            transforms,
            size,
            data.interpolation,
            data.antialias,
            spec.programs,
            split.dataset.mean,
        )
    squash = transforms.crop_mode == "squash"
    return graph.eval_graph(
        split.image_shape, size, transforms.crop_fraction, data.interpolation, data.antialias, squash
    )


def pixels_on_host(spec: LoaderSpec, buffers: SlotBuffers | LentBuffers, graph: CpuGraph | None = None) -> SampleSource:
    """Return a source of the pixels of an npy split, either resident in memory or in the mapped files."""
    split, shape = spec.split, spec.split.image_shape or (0, 0, 0)
    if spec.pixels is not None:
        starts = np.arange(len(split)) * math.prod(shape)
        return HostPixels(spec.pixels.numpy().reshape(-1), starts, shape, buffers, graph)
    if (reader := split.pixel_reader(is_random=True)) is not None:
        return ReadPixels(reader, shape, buffers, graph, split.monitor)
    return HostPixels(split.content, split.pixel_starts(), shape, buffers, graph, split.monitor)
