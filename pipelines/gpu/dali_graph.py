"""The DALI graphs, training and evaluation: with `dali_ops` the only place that knows DALI operators.

A graph holds no state and no random operator: image bytes and draws arrive together as inputs, so a batch is a pure
function of what is fed. Output: uint8 [B, H, W, 3] on the device. Normalisation belongs to the model. Labels go another
way, since every input costs the thread that feeds it about 0.1 us per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def

from configs.schema import AugConfig
from pipelines.augment.ops import Programs, grey_levels
from pipelines.gpu.dali_inputs import has_choice, has_numbers
from pipelines.gpu.dali_ops import run_programs

INTERPOLATIONS = {"bilinear": types.DALIInterpType.INTERP_LINEAR, "bicubic": types.DALIInterpType.INTERP_CUBIC}


@dataclass(frozen=True)
class ImageSpec:
    """What the graph is fed."""

    encoding: str  # 'npy': uint8 [B, H, W, 3]; 'jpeg': a list of B byte arrays
    image_shape: tuple[int, int, int] | None  # of every stored image, where they have one shape
    resident: bool  # npy only: batches arrive in GPU memory
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of the train split's pixels, from 0 to 1


@dataclass(frozen=True)
class PipelineConfig:
    """Where and how the graph runs."""

    device_id: int | None  # None: the CPU
    batch_size: int
    threads: int
    hw_decoder_load: float


def train_graph(
    stored: ImageSpec,
    machine: PipelineConfig,
    aug: AugConfig,
    size: int,
    interpolation: str,
    antialias: bool,
    programs: Programs | None,
) -> Pipeline:
    """Inputs `images` and, as `aug` asks, `crop_start`, `crop_end`, `offset` or `shift`, `flip`, those of
    `program_inputs`, `erase_start`, `erase_shape`, `erase_color` and `cutout`.

    Erased are `erase_shape` pixels (height, width; 0: none) from `erase_start` (y, x) on, float32 [B, 2] both; by fill
    random in `erase_color`, whole grey levels from 0 to 255 as float32 [B, 3].
    """
    mean = [float(level) for level in grey_levels(stored.mean)]

    def define() -> DataNode:
        images = _decoded(stored, machine)
        if aug.crop == "random-resized":
            # The resampler mirrors for free: a region that ends left of where it starts comes out flipped.
            region = {"roi_start": _input("crop_start"), "roi_end": _input("crop_end")}
            images = _resized(images, interpolation, antialias, size=[size, size], **region)
        else:
            if aug.crop == "squash":
                images = _squashed(images, stored, size, interpolation, antialias)
            else:
                images = _central(images, stored, size, size, interpolation, antialias)
            if aug.crop == "pad" and aug.padding_mode == "reflect":
                shift = _input("shift", layout="HW")
                images = fn.filter(images, shift if machine.device_id is None else shift.gpu(), border="reflect_101")
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
        if aug.erase.probability > 0:  # after the programs, which would change the colour
            fills: dict[str, Any] = {"mean": mean, "black": 0.0}
            fill = _input("erase_color") if aug.erase.fill == "random" else fills[aug.erase.fill]
            start, shape = _input("erase_start"), _input("erase_shape")
            images = fn.erase(images, anchor=start, shape=shape, axes=[0, 1], fill_value=fill)
        if aug.cutout > 0:
            side = [float(aug.cutout)] * 2
            images = fn.erase(images, anchor=_input("cutout"), shape=side, axes=[0, 1], fill_value=mean)
        return images

    return _pipeline(machine, define, chooses=programs is not None and has_choice(programs))


def eval_graph(
    stored: ImageSpec,
    machine: PipelineConfig,
    size: int,
    crop_fraction: float,
    interpolation: str,
    antialias: bool,
    squash: bool,
) -> Pipeline:
    """Input `images`: shorter side to size / crop_fraction, then the central size x size crop; or, to squash, the whole
    image to size x size."""
    shorter = round(size / crop_fraction)

    def define() -> DataNode:
        images = _decoded(stored, machine)
        if not squash:
            return _central(images, stored, shorter, size, interpolation, antialias)
        return _squashed(images, stored, size, interpolation, antialias)

    return _pipeline(machine, define)


def decoding_graph(stored: ImageSpec, machine: PipelineConfig) -> Pipeline:
    """Input `images`, decoded as training and evaluation do it, and nothing else."""
    return _pipeline(machine, lambda: _decoded(stored, machine))


def _pipeline(machine: PipelineConfig, define: Callable[[], DataNode], chooses: bool = False) -> Pipeline:
    """chooses: operators depend on the sample; DALI then translates the Python code first, which takes a second."""
    # A queue of one: the loader itself decides how many iterations are under way, and feeds each of them.
    options: dict[str, Any] = {
        "batch_size": machine.batch_size,
        "num_threads": machine.threads,
        "device_id": machine.device_id,
        "prefetch_queue_depth": 1,
        "exec_dynamic": True,
        "enable_conditionals": chooses,
    }
    pipeline = pipeline_def(**options)(define)()
    pipeline.build()
    return pipeline


def _input(name: str, **options: Any) -> DataNode:
    return fn.external_source(name=name, **options)  # type: ignore[return-value]


def _decoded(stored: ImageSpec, machine: PipelineConfig) -> DataNode:
    """Pixels on the device; fed buffers are not copied, the loader keeps them alive while DALI reads them."""
    on_gpu = machine.device_id is not None
    if stored.encoding == "jpeg":
        files = fn.external_source(name="images", no_copy=True)
        # Orientation tags are ignored, as torchvision and timm do, so that a JPEG and its npy conversion agree.
        how: dict[str, Any] = {"output_type": types.DALIImageType.RGB, "adjust_orientation": False}
        if on_gpu:
            return fn.decoders.image(files, device="mixed", hw_decoder_load=machine.hw_decoder_load, **how)
        return fn.decoders.image(files, device="cpu", **how)
    if stored.resident and on_gpu:
        return fn.external_source(name="images", device="gpu", layout="HWC", no_copy=True)
    images = fn.external_source(name="images", layout="HWC", no_copy=True)
    return images.gpu() if on_gpu else images


def _central(
    images: DataNode, stored: ImageSpec, shorter: int, size: int, interpolation: str, antialias: bool
) -> DataNode:
    """Shorter side to `shorter`, then the central size x size crop, as far as the stored shape needs either."""
    shape = stored.image_shape
    if shape is None or min(shape[:2]) != shorter:
        images = _resized(images, interpolation, antialias, resize_shorter=shorter)
    if shape is None or shorter != size or shape[0] != shape[1]:
        images = fn.crop(images, crop=(size, size), rounding="truncate")
    return images


def _squashed(images: DataNode, stored: ImageSpec, size: int, interpolation: str, antialias: bool) -> DataNode:
    """Resize both sides to `size`, unless the stored images have that size."""
    if stored.image_shape is not None and stored.image_shape[:2] == (size, size):
        return images
    return _resized(images, interpolation, antialias, size=[size, size])


def _resized(images: DataNode, interpolation: str, antialias: bool, **to: Any) -> DataNode:
    return fn.resize(images, interp_type=INTERPOLATIONS[interpolation], antialias=antialias, **to)  # type: ignore[return-value]
