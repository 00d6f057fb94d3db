"""DALI graphs for training and evaluation.

The inputs of a graph are images and draws, i.e. random augmentation parameters that the loader draws in advance. A
graph has no state or random operators, so its output is a pure function of its inputs. The output is uint8 [B, H, W, 3]
on the device; the model normalizes it. Labels bypass the graph, since every input costs the feeding thread about 0.1 µs
per sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def

from configs.schema import AugConfig, PaddingMode
from pipelines.augment.ops import Programs, grey_levels
from pipelines.gpu.dali_inputs import has_choice, has_numbers
from pipelines.gpu.dali_ops import run_programs

Resizer = Callable[..., DataNode]  # `fn.resize` with its filter
INTERPOLATIONS = {"bilinear": types.DALIInterpType.INTERP_LINEAR, "bicubic": types.DALIInterpType.INTERP_CUBIC}


@dataclass(frozen=True)
class ImageSpec:
    """Format and mean of the stored images that are fed to a graph."""

    encoding: str  # 'npy': uint8 [B, H, W, 3]; 'jpeg': a list of B byte arrays
    image_shape: tuple[int, int, int] | None  # None if shapes differ
    resident: bool  # npy only: whether inputs are already in GPU memory
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # per-channel mean of the train split's pixels, 0 to 1


@dataclass(frozen=True)
class PipelineConfig:
    """Device and resources of a graph."""

    device_id: int | None  # None for the CPU
    batch_size: int
    threads: int
    hw_decoder_load: float  # share of JPEGs decoded by the GPU's hardware decoder
    decoder_memory: Mapping[str, int] = field(default_factory=dict)  # see data.decoder_memory


def train_graph(
    spec: ImageSpec,
    config: PipelineConfig,
    aug: AugConfig,
    size: int,
    interpolation: str,
    antialias: bool,
    programs: Programs | None,
) -> Pipeline:
    """Build the training graph. Its inputs are `images` and the arrays that `dali_inputs.graph_inputs` returns.

    Args:
        spec: Format of the stored images.
        config: Device and resources.
        aug: Config section `aug`.
        size: Height and width of the output, pixels.
        interpolation: "bilinear" or "bicubic".
        antialias: Whether to widen the filter by the scale factor when downscaling.
        programs: Result of `build_programs`, or None if there are no programs.
    """
    mean = [float(level) for level in grey_levels(spec.mean)]
    resize = _resizer(interpolation, antialias)

    def define() -> DataNode:
        images = _decoded(spec, config)
        if aug.crop == "random-resized":
            # The resampler flips for free: a region whose end is left of its start is mirrored.
            region = {"roi_start": _input("crop_start"), "roi_end": _input("crop_end")}
            images = resize(images, size=[size, size], **region)
        else:
            if aug.crop == "squash":
                images = _squashed(images, spec, size, resize)
            else:
                images = _central(images, spec, size, size, resize)
            if aug.crop == "pad" and aug.padding_mode == PaddingMode.REFLECT:
                shift = _input("shift", layout="HW")
                images = fn.filter(images, shift if config.device_id is None else shift.gpu(), border="reflect_101")
            elif aug.crop == "pad":
                images = fn.slice(
                    images, start=_input("offset"), shape=[size, size], axes=[0, 1], out_of_bounds_policy="pad"
                )
            if aug.flip > 0:
                images = fn.flip(images, horizontal=_input("flip"))
        if programs is not None:
            chosen = _input("branches") if has_choice(programs) else None
            numbers = _input("numbers") if has_numbers(programs) else None
            images = run_programs(images, programs, size, chosen, numbers)
        if aug.erase.probability > 0:  # after the programs, which would change the fill color
            fills = {"mean": mean, "black": [0.0]}
            fill = _input("erase_color") if aug.erase.fill == "random" else fills[aug.erase.fill]
            start, shape = _input("erase_start"), _input("erase_shape")
            images = fn.erase(images, anchor=start, shape=shape, axes=[0, 1], fill_value=fill)
        if aug.cutout > 0:
            side = [float(aug.cutout)] * 2
            images = fn.erase(images, anchor=_input("cutout"), shape=side, axes=[0, 1], fill_value=mean)
        return images

    return _pipeline(config, define, chooses=programs is not None and has_choice(programs))


def eval_graph(
    spec: ImageSpec,
    config: PipelineConfig,
    size: int,
    crop_fraction: float,
    interpolation: str,
    antialias: bool,
    squash: bool,
) -> Pipeline:
    """Build the evaluation graph. Its only input is `images`.

    Args:
        spec: Format of the stored images.
        config: Device and resources.
        size: Height and width of the output, pixels.
        crop_fraction: The shorter side is resized to round(size / crop_fraction) before the central crop.
        interpolation: "bilinear" or "bicubic".
        antialias: Whether to widen the filter by the scale factor when downscaling.
        squash: Whether to resize the whole image to size x size, ignoring its aspect ratio. If so, `crop_fraction` is
            unused.
    """
    shorter, resize = round(size / crop_fraction), _resizer(interpolation, antialias)

    def define() -> DataNode:
        images = _decoded(spec, config)
        if not squash:
            return _central(images, spec, shorter, size, resize)
        return _squashed(images, spec, size, resize)

    return _pipeline(config, define)


def decoding_graph(spec: ImageSpec, config: PipelineConfig) -> Pipeline:
    """Build a graph that decodes its input `images` like the other graphs and has no other operators."""
    return _pipeline(config, lambda: _decoded(spec, config))


def _pipeline(config: PipelineConfig, define: Callable[[], DataNode], chooses: bool = False) -> Pipeline:
    """Build the pipeline that `define` describes.

    Args:
        config: Device and resources.
        define: Function that builds the operators and returns the output.
        chooses: Whether different samples need different operators. If so, DALI converts `define` with AutoGraph,
            which takes about one second.
    """
    # A queue of one, since the loader controls how many batches are in flight.
    options: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_threads": config.threads,
        "device_id": config.device_id,
        "prefetch_queue_depth": 1,
        "exec_dynamic": True,
        "enable_conditionals": chooses,
    }
    pipeline = pipeline_def(**options)(define)()
    pipeline.build()
    return pipeline


def _input(name: str, layout: str | None = None) -> DataNode:
    return fn.external_source(name=name, layout=layout)  # type: ignore[return-value]


def _decoded(spec: ImageSpec, config: PipelineConfig) -> DataNode:
    """Return the input `images` as decoded pixels on the device.

    The input is not copied within host memory. `DaliRunner` keeps the arrays alive while DALI reads them.
    """
    on_gpu = config.device_id is not None
    if spec.encoding == "jpeg":
        files = fn.external_source(name="images", no_copy=True)
        # Like torchvision and timm, ignore orientation tags, so that a JPEG and its npy conversion agree.
        decode = partial(fn.decoders.image, files, output_type=types.DALIImageType.RGB, adjust_orientation=False)
        if not on_gpu:
            return decode(device="cpu")
        return decode(device="mixed", hw_decoder_load=config.hw_decoder_load, **config.decoder_memory)
    if spec.resident and on_gpu:
        return fn.external_source(name="images", device="gpu", layout="HWC", no_copy=True)
    images = fn.external_source(name="images", layout="HWC", no_copy=True)
    return images.gpu() if on_gpu else images


def _central(images: DataNode, spec: ImageSpec, shorter: int, size: int, resize: Resizer) -> DataNode:
    """Resize the shorter side to `shorter` and crop the central size x size pixels.

    An operator is omitted if all stored images have the same shape and do not need it.
    """
    shape = spec.image_shape
    if shape is None or min(shape[:2]) != shorter:
        images = resize(images, resize_shorter=shorter)
    if shape is None or shorter != size or shape[0] != shape[1]:
        images = fn.crop(images, crop=(size, size), rounding="truncate")
    return images


def _squashed(images: DataNode, spec: ImageSpec, size: int, resize: Resizer) -> DataNode:
    """Resize images to size x size, unless all stored images have this size."""
    if spec.image_shape is not None and spec.image_shape[:2] == (size, size):
        return images
    return resize(images, size=[size, size])


def _resizer(interpolation: str, antialias: bool) -> Resizer:
    return partial(fn.resize, interp_type=INTERPOLATIONS[interpolation], antialias=antialias)  # type: ignore[return-value]
