"""The backend that transforms images in a DALI graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from nvidia.dali.pipeline import Pipeline

from configs.schema import AugConfig
from pipelines.gpu import dali_graph, dali_inputs
from pipelines.gpu.copy_backend import DevicePixels
from pipelines.gpu.dali_graph import ImageSpec, PipelineConfig
from pipelines.gpu.dali_runner import DaliRunner, DecodeCheck
from pipelines.interfaces import Draws, Runner, SampleSource
from pipelines.loader.backend import MAX_COPY_THREADS, Backend, LoaderSpec, pixels_on_host
from pipelines.loader.buffers import SlotBuffers
from pipelines.loader.jpeg_sources import MappedFiles


class DaliBackend(Backend):
    """A graph decodes JPEG files, or reads stored pixels, and transforms them. Tests also run it on the CPU."""

    def __init__(self, spec: LoaderSpec) -> None:
        super().__init__(spec)
        split = spec.split
        on_gpu = spec.device.type == "cuda"
        self._gathers_on_gpu = spec.pixels is not None and on_gpu
        self._images = ImageSpec(split.encoding, split.image_shape, self._gathers_on_gpu, split.dataset.mean)
        device_id = spec.device.index if on_gpu else None
        memory = {str(argument): size for argument, size in spec.data.decoder_memory.items()}
        self._config = PipelineConfig(
            device_id, spec.batch_size * spec.views, spec.threads, spec.data.hw_decoder_load, memory
        )
        self.image_shape = split.image_shape or (0, 0, 0)
        # One thread suffices to list encoded files or to launch kernels.
        copies = split.encoding == "npy" and not self._gathers_on_gpu
        self.threads = min(MAX_COPY_THREADS, spec.threads) if copies else 1
        self.stream = torch.cuda.Stream(spec.device) if on_gpu else None

    def source(self, slots: int, slot_size: int) -> SampleSource:
        spec = self.spec
        if spec.split.encoding != "npy":
            single = replace(self._config, batch_size=1)
            return MappedFiles(spec.split, DecodeCheck(lambda: dali_graph.decoding_graph(self._images, single)).decodes)
        if spec.pixels is not None and self._gathers_on_gpu:
            return DevicePixels(spec.pixels, self.image_shape, slot_size, slots, waits=True)
        pinned = spec.device.type == "cuda"
        return pixels_on_host(spec, SlotBuffers(slots, slot_size, self.image_shape, pinned=pinned))

    def runner(self) -> Runner:
        return DaliRunner(self._build, self.spec.device)

    def inputs(self, draws: Draws) -> Draws:
        transforms = self.spec.transforms
        if not isinstance(transforms, AugConfig):
            return draws
        return dali_inputs.graph_inputs(draws, transforms, self.spec.programs, self.spec.image_size)

    def _build(self) -> Pipeline:
        spec, data, transforms = self.spec, self.spec.data, self.spec.transforms
        if isinstance(transforms, AugConfig):
            return dali_graph.train_graph(
                self._images,
                self._config,
                transforms,
                spec.image_size,
                data.interpolation,
                data.antialias,
                spec.programs,
            )
        return dali_graph.eval_graph(
            self._images,
            self._config,
            spec.image_size,
            transforms.crop_fraction,
            data.interpolation,
            data.antialias,
            transforms.crop_mode == "squash",
        )
