"""Compare the DALI graphs with NumPy, Pillow and torchvision for the same draws, on photos.

Tests marked gpu compare a GPU with the CPU. They need neither hypothesis nor webdataset, so that a bare machine can run
them.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from configs.schema import AugConfig, ColorJitterConfig, DataConfig, EvalConfig
from configs.schema.aug import AutoAugmentConfig, BlurConfig, EraseConfig
from configs.utils.errors import UserError
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.photos import BATCH, converted, photos
from pipelines import build_eval_loader, build_train_loader
from pipelines.augment import geometry
from pipelines.augment.ops import Op, Programs
from pipelines.gpu import dali_graph
from pipelines.gpu.copy_backend import CopyRunner
from pipelines.gpu.dali_inputs import program_inputs
from pipelines.gpu.dali_runner import DaliRunner
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch
from pipelines.loader.eval_loader import EvalLoader
from pipelines.loader.train_loader import TrainLoader
from pipelines.storage.dataset import load_dataset
from pipelines.storage.open import open_split
from pipelines.storage.split import Split

CPU = torch.device("cpu")
SEED, EPOCH = 5, 2
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
INTERPOLATIONS = pytest.mark.parametrize("interpolation", MODES)
RANDOM_RESIZED = AugConfig(crop="random-resized", flip=0.5)
PAD = AugConfig(crop="pad", padding=4, flip=0.5)
JITTERED = AugConfig(crop="random-resized", color_jitter=ColorJitterConfig(brightness=0.4, saturation=0.4, hue=0.1))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 12 npy images of 160x240."""
    return converted(tmp_path_factory.mktemp("wide") / "tiny", photos(160, 240), "npy")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 12 npy images of 96x96."""
    return converted(tmp_path_factory.mktemp("square") / "tiny", photos(96, 96), "npy")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 12 JPEGs of three sizes."""
    images = photos(160, 240, 4) + photos(301, 200, 4) + photos(97, 111, 4)
    return converted(tmp_path_factory.mktemp("mixed") / "tiny", images, "jpeg")


def train(folder: Path, aug: AugConfig, device: Any = "cpu", **options: Any) -> TrainLoader:
    """Return a loader at the start of EPOCH."""
    data = DataConfig(path=str(folder), **{"batch_size": BATCH, "threads": 1, **options})
    loader = build_train_loader(data, aug, seed=SEED, device=device)
    loader.position = Position(EPOCH)
    return loader


def evaluate(folder: Path, device: Any = "cpu", crop_fraction: float = 1.0, **options: Any) -> EvalLoader:
    data = DataConfig(path=str(folder), **{"batch_size": BATCH, "threads": 1, **options})
    return build_eval_loader(data, EvalConfig(crop_fraction=crop_fraction), device=device)


def pixels(split: Split) -> np.ndarray:
    """Return all images of an npy split: uint8 [samples, H, W, 3]."""
    view, rows = split.pixel_rows()
    assert split.image_shape is not None
    return view[rows].reshape(-1, *split.image_shape)


def trained_on(loader: TrainLoader, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first batch [B, H, W, 3], its stored images, and their sample indices."""
    indices = loader.plan.indices(EPOCH, 0)
    return nhwc(next(iter(loader))), pixels(open_split(folder, "train"))[indices], indices


def nhwc(batch: Batch) -> np.ndarray:
    return batch.images.permute(0, 2, 3, 1).cpu().numpy()


def with_torch(function: Callable[[torch.Tensor], torch.Tensor], image: np.ndarray) -> np.ndarray:
    """Apply a torchvision function to an image [H, W, 3]."""
    return function(torch.from_numpy(image.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()


def resized_crop(image: np.ndarray, box: list[int], size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Apply torchvision's resized_crop; box: top, left, height, width."""
    mode = MODES[interpolation]
    return with_torch(lambda x: F.resized_crop(x, *box, [size, size], mode, antialias=True), image)


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference of each image, in grey levels [B]."""
    assert first.shape == second.shape
    return np.abs(first.astype(int) - second).mean(axis=(1, 2, 3))


def drawn_crops(indices: np.ndarray, split: Split, aug: AugConfig) -> np.ndarray:
    sizes = split.heights[indices], split.widths[indices]
    return geometry.random_resized_crops(indices, SEED, EPOCH, *sizes, aug.scale, aug.ratio)


def run(pipeline: Any, images: Any, **feeds: np.ndarray) -> np.ndarray:
    """Run one batch through a graph: uint8 [B, H, W, 3]."""
    runner = DaliRunner(lambda: pipeline, CPU)
    runner.submit(images, np.arange(len(images)), feeds)
    outputs, labels, _ = runner.result()
    assert labels.tolist() == list(range(len(images)))
    return outputs.numpy()


# Training


@pytest.mark.parametrize("padding", [1, 4, 30])
def test_pad_crop_and_flip_equal_numpy(padding: int, square: Path) -> None:
    loader = train(square, AugConfig(crop="pad", padding=padding, flip=0.5))
    ours, stored, indices = trained_on(loader, square)
    offsets = geometry.pad_crop_offsets(indices, SEED, EPOCH, padding) + padding
    flips = geometry.flips(indices, SEED, EPOCH, 0.5)
    assert 0 < flips.sum() < BATCH
    padded = np.pad(stored, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for image, source, (top, left), flip in zip(ours, padded, offsets, flips, strict=True):
        crop = source[top : top + 96, left : left + 96]
        np.testing.assert_array_equal(image, crop[:, ::-1] if flip else crop)


@pytest.mark.parametrize("padding", [0, 2, 4, 95])
def test_reflected_padding_equals_torch_bitwise(padding: int, square: Path) -> None:
    aug = AugConfig(crop="pad", padding=padding, padding_mode="reflect", flip=0.5, flip_mode="alternating")
    ours, stored, indices = trained_on(train(square, aug), square)
    offsets = geometry.pad_crop_offsets(indices, SEED, EPOCH, padding) + padding
    flips = geometry.alternating_flips(indices, SEED, EPOCH, 0.5)
    for image, source, (top, left), flip in zip(ours, stored, offsets, flips, strict=True):
        wide = torch.from_numpy(source.copy()).permute(2, 0, 1)[None].double()
        padded = torch.nn.functional.pad(wide, (padding,) * 4, mode="reflect")[0].permute(1, 2, 0).numpy()
        crop = padded[top : top + 96, left : left + 96]
        np.testing.assert_array_equal(image, crop[:, ::-1] if flip else crop)


@pytest.mark.gpu
@pytest.mark.gpu_values
def test_gpu_reflected_padding_and_cutout_equal_cpu(square: Path) -> None:
    aug = AugConfig(crop="pad", padding=4, padding_mode="reflect", flip=0.5, flip_mode="alternating", cutout=12)
    ours, _, _ = trained_on(train(square, aug, device="cuda"), square)
    theirs, _, _ = trained_on(train(square, aug), square)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("aug", "message"),
    [
        (AugConfig(crop="pad", padding=96, padding_mode="reflect"), r"aug\.padding=96 .* use at most 95"),
        (AugConfig(cutout=97), r"aug\.cutout=97 .* use at most 96"),
    ],
)
def test_padding_and_cutout_beyond_image_are_user_errors(aug: AugConfig, message: str, square: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(square, aug)
    train(square, AugConfig(crop="pad", padding=96))


def test_cutout_paints_only_its_square(square: Path) -> None:
    ours, stored, indices = trained_on(train(square, AugConfig(flip=0, cutout=20)), square)
    mean = [round(255 * share) for share in load_dataset(square).mean]
    corners = geometry.cutout_corners(indices, SEED, EPOCH, 96, 20)
    for image, source, (top, left) in zip(ours, stored, corners, strict=True):
        expected = source.copy()
        expected[top : top + 20, left : left + 20] = mean
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_flip_is_exact(probability: float, square: Path) -> None:
    ours, stored, indices = trained_on(train(square, AugConfig(flip=probability)), square)
    flips = geometry.flips(indices, SEED, EPOCH, probability)
    for image, source, flip in zip(ours, stored, flips, strict=True):
        np.testing.assert_array_equal(image, source[:, ::-1] if flip else source)


@INTERPOLATIONS
@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_random_resized_crop_matches_torchvision(
    scale: tuple[float, float], size: int, interpolation: str, wide: Path
) -> None:
    aug = AugConfig(crop="random-resized", scale=scale, flip=0.5)
    ours, stored, indices = trained_on(train(wide, aug, image_size=size, interpolation=interpolation), wide)
    boxes = drawn_crops(indices, open_split(wide, "train"), aug)
    flips = geometry.flips(indices, SEED, EPOCH, 0.5)
    theirs = []
    for source, box, flip in zip(stored, boxes.tolist(), flips, strict=True):
        crop = resized_crop(source, box, size, interpolation)
        theirs.append(crop[:, ::-1] if flip else crop)
    assert distance(ours, np.stack(theirs)).max() < 2


def test_random_resized_crop_of_mixed_size_jpegs_matches_torchvision(mixed: Path) -> None:
    split = open_split(mixed, "train")
    loader = train(mixed, RANDOM_RESIZED, image_size=64)
    indices = loader.plan.indices(EPOCH, 0)
    ours = nhwc(next(iter(loader)))
    flips = geometry.flips(indices, SEED, EPOCH, 0.5)
    boxes = drawn_crops(indices, split, RANDOM_RESIZED).tolist()
    for image, sample, box, flip in zip(ours, indices, boxes, flips, strict=True):
        begin = int(split.address[sample])
        source = np.asarray(Image.open(io.BytesIO(split.content[begin : begin + int(split.size[sample])].tobytes())))
        crop = resized_crop(source, box, 64)
        assert distance(image[None], (crop[:, ::-1] if flip else crop)[None]) < 2


@INTERPOLATIONS
def test_mirrored_region_is_the_flipped_crop(interpolation: str, wide: Path) -> None:
    stored = torch.from_numpy(pixels(open_split(wide, "train")).copy())
    boxes = drawn_crops(np.arange(BATCH), open_split(wide, "train"), RANDOM_RESIZED)
    start, end = boxes[:, :2].astype(np.float32), (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
    kind, machine = dali_graph.ImageSpec("npy", (160, 240, 3), False), dali_graph.PipelineConfig(None, BATCH, 1, 0.0)
    pipeline = dali_graph.train_graph(kind, machine, RANDOM_RESIZED, 100, interpolation, True, None)
    straight = run(pipeline, stored, crop_start=start, crop_end=end)
    start[:, 1], end[:, 1] = end[:, 1].copy(), start[:, 1].copy()
    mirrored = run(pipeline, stored, crop_start=start, crop_end=end)
    assert np.abs(mirrored[:, :, ::-1].astype(int) - straight).max() <= 1
    assert distance(mirrored, straight).min() > 2


@INTERPOLATIONS
def test_training_without_crop_uses_evaluations_central_square(interpolation: str, wide: Path) -> None:
    ours, stored, _ = trained_on(train(wide, AugConfig(flip=0), image_size=80, interpolation=interpolation), wide)
    theirs = np.stack([central(source, 80, 1.0, interpolation) for source in stored])
    assert distance(ours, theirs).max() < 2


def test_pad_crop_of_other_size_resizes_first(wide: Path) -> None:
    ours, _, indices = trained_on(train(wide, AugConfig(crop="pad", flip=0), image_size=80), wide)
    resized, _, _ = trained_on(train(wide, AugConfig(flip=0), image_size=80), wide)
    offsets = geometry.pad_crop_offsets(indices, SEED, EPOCH, 4) + 4
    padded = np.pad(resized, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for image, source, (top, left) in zip(ours, padded, offsets, strict=True):
        np.testing.assert_array_equal(image, source[top : top + 80, left : left + 80])


def erased(images: np.ndarray, fill: Any, aug: AugConfig | None = None, **feeds: np.ndarray) -> np.ndarray:
    """Run square images uint8 [B, side, side, 3] through a training graph with erasing and the rest of `aug`."""
    kind = dali_graph.ImageSpec("npy", images.shape[1:], False, mean=(0.1, 0.5, 0.9))
    aug = (aug or AugConfig(flip=0)).model_copy(update={"erase": EraseConfig(probability=0.5, fill=fill)})
    machine = dali_graph.PipelineConfig(None, len(images), 1, 0.0)
    pipeline = dali_graph.train_graph(kind, machine, aug, images.shape[1], "bilinear", True, None)
    return run(pipeline, torch.from_numpy(images.copy()), **feeds)


BOXES = np.array([[0, 0, 96, 96], [5, 7, 20, 31], [90, 0, 6, 1], [0, 95, 96, 1], [40, 40, 0, 0], [95, 95, 0, 9]])


@pytest.mark.parametrize("fill", ["mean", "black", "random"])
def test_erasing_matches_torchvision_and_empty_box_is_noop(fill: str) -> None:
    images, boxes = np.stack(photos(96, 96, len(BOXES))), BOXES.astype(np.float32)
    colors = np.random.default_rng(3).integers(0, 256, (len(BOXES), 3))
    feeds = {"erase_start": boxes[:, :2].copy(), "erase_shape": boxes[:, 2:].copy()}
    if fill == "random":
        feeds["erase_color"] = colors.astype(np.float32)
    fixed = {"mean": [26, 128, 230], "black": [0, 0, 0]}
    for found, image, (top, left, height, width), color in zip(
        erased(images, fill, **feeds), images, BOXES.tolist(), colors, strict=True
    ):
        paint = torch.tensor(fixed.get(fill, color), dtype=torch.uint8)[:, None, None]
        expected = with_torch(lambda x: F.erase(x, top, left, height, width, paint), image)  # noqa: B023
        np.testing.assert_array_equal(found, expected)


def test_cutout_follows_erasing() -> None:
    images = np.stack(photos(96, 96, 2))
    start, shape = np.full((2, 2), 10, np.float32), np.full((2, 2), 30, np.float32)
    corner = np.full((2, 2), 20, np.float32)
    aug = AugConfig(flip=0, cutout=8)
    found = erased(images, "black", aug, erase_start=start, erase_shape=shape, cutout=corner)
    expected = images.copy()
    expected[:, 10:40, 10:40] = 0
    expected[:, 20:28, 20:28] = 26, 128, 230
    np.testing.assert_array_equal(found, expected)


def test_programs_run_between_flip_and_erasing() -> None:
    images = np.stack(photos(96, 96, 3))
    programs = Programs((frozenset({Op.SHEAR_X}), frozenset({Op.INVERT})), False, (9, 9, 9), 1)
    ops = np.tile(np.array([Op.SHEAR_X, Op.INVERT], np.int32), (3, 1))
    values = np.tile(np.array([0.4, 0], np.float32), (3, 1))
    aug = AugConfig(flip=1, erase=EraseConfig(probability=1, fill="black"))
    kind, machine = dali_graph.ImageSpec("npy", (96, 96, 3), False), dali_graph.PipelineConfig(None, 3, 1, 0.0)
    feeds = program_inputs(programs, ops, values, 96) | {
        "flip": np.ones(3, np.int32),
        "erase_start": np.zeros((3, 2), np.float32),
        "erase_shape": np.full((3, 2), 10, np.float32),
    }
    pipeline = dali_graph.train_graph(kind, machine, aug, 96, "bilinear", True, programs)
    found = run(pipeline, torch.from_numpy(images.copy()), **feeds)
    shear = [math.degrees(math.atan(0.4)), 0]
    for result, image in zip(found, images, strict=True):
        moved = with_torch(lambda x: F.affine(x.flip(2), 0, [0, 0], 1, shear, fill=[9.0] * 3, center=[0, 0]), image)
        expected = 255 - moved
        expected[:10, :10] = 0
        np.testing.assert_array_equal(result, expected)


@INTERPOLATIONS
@pytest.mark.parametrize("size", [64, 224])
def test_random_resized_crop_without_antialias_matches_torchvision(size: int, interpolation: str) -> None:
    images = np.stack(photos(160, 240, 6))
    boxes = np.array(
        [[0, 0, 160, 240], [10, 20, 150, 150], [3, 5, 61, 47], [0, 100, 160, 100], [9, 9, 64, 64], [1, 2, 99, 200]]
    )
    start, end = boxes[:, :2].astype(np.float32), (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
    kind, machine = dali_graph.ImageSpec("npy", (160, 240, 3), False), dali_graph.PipelineConfig(None, 6, 1, 0.0)
    aug = AugConfig(crop="random-resized", flip=0)
    pipeline = dali_graph.train_graph(kind, machine, aug, size, interpolation, False, None)
    ours = run(pipeline, torch.from_numpy(images.copy()), crop_start=start, crop_end=end)
    theirs = [
        with_torch(lambda x: F.resized_crop(x, *box, [size, size], MODES[interpolation], antialias=False), image)  # noqa: B023
        for image, box in zip(images, boxes.tolist(), strict=True)
    ]
    assert distance(ours, np.stack(theirs)).max() < 2


# Evaluation


SIZES = pytest.mark.parametrize(("size", "crop_fraction"), [(64, 0.875), (96, 1.0), (160, 0.8), (75, 0.93)])


@INTERPOLATIONS
@SIZES
def test_evaluation_of_square_images_matches_torchvision(
    size: int, crop_fraction: float, interpolation: str, square: Path
) -> None:
    def reference(image: torch.Tensor) -> torch.Tensor:
        resized = F.resize(image, [round(size / crop_fraction)], MODES[interpolation], antialias=True)
        return F.center_crop(resized, [size, size])

    loader = evaluate(square, crop_fraction=crop_fraction, image_size=size, interpolation=interpolation)
    theirs = np.stack([with_torch(reference, image) for image in pixels(open_split(square, "val"))])
    assert distance(nhwc(next(iter(loader))), theirs).max() < 2


def central(image: np.ndarray, size: int, crop_fraction: float, interpolation: str = "bilinear") -> np.ndarray:
    """Apply torchvision's resize and a central crop, with both sides rounded; torchvision truncates the longer one."""
    height, width = image.shape[:2]
    scale = round(size / crop_fraction) / min(height, width)
    to = [round(height * scale), round(width * scale)]
    top, left = (to[0] - size) // 2, (to[1] - size) // 2
    resized = with_torch(lambda x: F.resize(x, to, MODES[interpolation], antialias=True), image)
    return resized[top : top + size, left : left + size]


@INTERPOLATIONS
@SIZES
def test_evaluation_of_other_images_takes_resized_central_square(
    size: int, crop_fraction: float, interpolation: str, wide: Path
) -> None:
    loader = evaluate(wide, crop_fraction=crop_fraction, image_size=size, interpolation=interpolation)
    images = pixels(open_split(wide, "val"))
    theirs = np.stack([central(image, size, crop_fraction, interpolation) for image in images])
    assert distance(nhwc(next(iter(loader))), theirs).max() < 2


@INTERPOLATIONS
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [64, 200])
def test_squashed_evaluation_matches_torchvisions_resize(size: int, antialias: bool, interpolation: str) -> None:
    images = np.stack(photos(160, 240, 6))
    kind, machine = dali_graph.ImageSpec("npy", (160, 240, 3), False), dali_graph.PipelineConfig(None, 6, 1, 0.0)
    pipeline = dali_graph.eval_graph(kind, machine, size, 0.875, interpolation, antialias, True)
    ours = run(pipeline, torch.from_numpy(images.copy()))
    mode = MODES[interpolation]
    theirs = [with_torch(lambda x: F.resize(x, [size, size], mode, antialias=antialias), image) for image in images]
    assert distance(ours, np.stack(theirs)).max() < 2


def test_squashed_evaluation_of_same_size_is_exact() -> None:
    images, machine = np.stack(photos(96, 96, 3)), dali_graph.PipelineConfig(None, 3, 1, 0.0)
    pipeline = dali_graph.eval_graph(
        dali_graph.ImageSpec("npy", (96, 96, 3), False), machine, 96, 0.5, "bilinear", True, True
    )
    np.testing.assert_array_equal(run(pipeline, torch.from_numpy(images.copy())), images)


def test_evaluation_at_stored_size_is_exact(square: Path) -> None:
    np.testing.assert_array_equal(nhwc(next(iter(evaluate(square)))), photos(96, 96))


def test_evaluation_of_mixed_size_jpegs_takes_same_square(mixed: Path) -> None:
    split = open_split(mixed, "val")
    ours = nhwc(next(iter(evaluate(mixed, crop_fraction=0.875, image_size=64))))
    for image, begin, length in zip(ours, split.address.tolist(), split.size.tolist(), strict=True):
        source = np.asarray(Image.open(io.BytesIO(split.content[begin : begin + length].tobytes())))
        assert distance(image[None], central(source, 64, 0.875)[None]) < 2


def decoded(files: list[bytes], side: int) -> np.ndarray:
    """Run JPEG files of side x side pixels through the evaluation graph, which only decodes them."""
    machine = dali_graph.PipelineConfig(None, len(files), 1, 0.0)
    pipeline = dali_graph.eval_graph(
        dali_graph.ImageSpec("jpeg", (side, side, 3), False), machine, side, 1.0, "bilinear", True, False
    )
    return run(pipeline, [np.frombuffer(file, np.uint8) for file in files])


@pytest.mark.parametrize("options", [{"quality": 95}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_jpeg_files_decode_like_pillow(options: dict[str, Any]) -> None:
    files = []
    for image in photos(96, 96):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    theirs = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    assert distance(decoded(files, 96), theirs).max() < 2


def test_orientation_tag_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    buffer = io.BytesIO()
    Image.fromarray(photos(96, 96)[0]).save(buffer, "JPEG", quality=95, exif=exif)
    rows = MemoryRows([buffer.getvalue()])
    images = []
    for encoding in ("npy", "jpeg"):
        write(memory_source(train=rows), tmp_path / encoding, encoding)
        images.append(nhwc(next(iter(train(tmp_path / encoding, AugConfig(flip=0), batch_size=1, image_size=96)))))
    assert distance(*images) < 2
    assert distance(images[0], photos(96, 96, 1)[0][None]) < 6


def test_real_jpeg_files_decode_like_pillow(shared_data: Path) -> None:
    files: list[bytes] = []
    with tarfile.open(shared_data / "tiny200-mini.tar.xz", "r:xz") as archive:
        for member in archive:
            if member.name.endswith(".jpg") and (file := archive.extractfile(member)):
                files.append(file.read())
            if len(files) == 300:
                break
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert {image.mode for image in images} == {"RGB", "L"}
    theirs = np.stack([np.asarray(image.convert("RGB")) for image in images])
    assert distance(decoded(files, 64), theirs).max() < 2


# On a GPU


# Pixels on the device are gathered by a kernel; those on the host are only copied.
PLACEMENTS = pytest.mark.parametrize("placement", ["host", pytest.param("device", marks=pytest.mark.gpu_values)])
AUGS = pytest.mark.parametrize("aug", [RANDOM_RESIZED, PAD, JITTERED], ids=["random-resized", "pad", "jittered"])


def epoch(loader: TrainLoader) -> list[Batch]:
    """Return one epoch from EPOCH on, copied to the host batch by batch."""
    loader.position = Position(EPOCH)
    return [Batch(images.cpu(), labels.cpu()) for images, labels in loader]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set of 400 npy images of 64x64: enough batches to reuse buffers."""
    return converted(tmp_path_factory.mktemp("many") / "tiny", photos(64, 64, 400), "npy")


@pytest.mark.gpu
@AUGS
def test_gpu_batch_has_same_layout_as_cpu_batch(aug: AugConfig, square: Path) -> None:
    on_cpu, on_gpu = next(iter(train(square, aug))), next(iter(train(square, aug, "cuda")))
    assert on_gpu.images.is_cuda
    assert on_gpu.labels.is_cuda
    assert on_gpu.images.is_contiguous(memory_format=torch.channels_last)
    assert (on_gpu.images.shape, on_gpu.images.dtype) == (on_cpu.images.shape, on_cpu.images.dtype)
    assert torch.equal(on_gpu.labels.cpu(), on_cpu.labels)


@pytest.mark.gpu
@AUGS
@PLACEMENTS
def test_gpu_augments_npy_like_cpu(placement: str, aug: AugConfig, square: Path) -> None:
    on_gpu = train(square, aug, "cuda", placement=placement, image_size=64)
    assert distance(nhwc(next(iter(on_gpu))), nhwc(next(iter(train(square, aug, image_size=64))))).max() <= 2


@pytest.mark.gpu
@PLACEMENTS
def test_gpu_applies_all_augmentations_like_cpu(placement: str, square: Path) -> None:
    aug = JITTERED.model_copy(
        update={
            "auto": AutoAugmentConfig(policy="rand-m9-mstd0.5-inc1"),
            "grayscale": 0.2,
            "blur": BlurConfig(probability=0.5),
            "erase": EraseConfig(probability=0.5, fill="random"),
            "cutout": 9,
        }
    )
    on_gpu = train(square, aug, "cuda", placement=placement, image_size=64)
    found = distance(nhwc(next(iter(on_gpu))), nhwc(next(iter(train(square, aug, image_size=64)))))
    assert np.median(found) <= 1
    assert found.max() <= 12  # equalize and auto-contrast amplify a difference of one level


@pytest.mark.gpu
@AUGS
@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65])
def test_gpu_augments_jpeg_like_cpu(hw_decoder_load: float, aug: AugConfig, mixed: Path) -> None:
    on_gpu = train(mixed, aug, "cuda", hw_decoder_load=hw_decoder_load, image_size=64)
    assert distance(nhwc(next(iter(on_gpu))), nhwc(next(iter(train(mixed, aug, image_size=64))))).max() <= 12


@pytest.mark.gpu
@PLACEMENTS
def test_gpu_evaluates_like_cpu(placement: str, wide: Path, square: Path) -> None:
    for folder, options in ((wide, {"image_size": 64, "crop_fraction": 0.875}), (square, {})):
        on_gpu, on_cpu = evaluate(folder, "cuda", placement=placement, **options), evaluate(folder, **options)  # type: ignore[arg-type]
        assert distance(nhwc(next(iter(on_gpu))), nhwc(next(iter(on_cpu)))).max() <= 2


@pytest.mark.gpu
def test_gpu_evaluates_jpeg_like_cpu(mixed: Path) -> None:
    options: dict[str, Any] = {"image_size": 64, "crop_fraction": 0.875}
    on_gpu, on_cpu = evaluate(mixed, "cuda", **options), evaluate(mixed, **options)
    assert distance(nhwc(next(iter(on_gpu))), nhwc(next(iter(on_cpu)))).max() <= 12


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("aug", [AugConfig(flip=0), RANDOM_RESIZED, PAD], ids=["none", "random-resized", "pad"])
def test_gpu_placements_give_same_bytes(aug: AugConfig, many: Path) -> None:
    host, device = (train(many, aug, "cuda", placement=placement) for placement in ("host", "device"))
    assert_same(epoch(host), epoch(device))
    assert len(epoch(host)) == 400 // BATCH


@pytest.mark.gpu
@PLACEMENTS
@pytest.mark.parametrize(
    "aug",
    [AugConfig(flip=0), RANDOM_RESIZED, pytest.param(PAD, marks=pytest.mark.gpu_values)],
    ids=["none", "random-resized", "pad"],
)
def test_gpu_batches_kept_by_user_are_not_overwritten(aug: AugConfig, placement: str, many: Path) -> None:
    expected = epoch(train(many, aug, "cuda", placement=placement))
    kept = list(train(many, aug, "cuda", placement=placement, prefetch=1))
    assert_same([Batch(images.cpu(), labels.cpu()) for images, labels in kept], expected)


@pytest.mark.gpu
@PLACEMENTS
@pytest.mark.parametrize("aug", [AugConfig(flip=0), RANDOM_RESIZED], ids=["none", "random-resized"])
def test_slow_gpu_stream_reads_the_right_batches(aug: AugConfig, placement: str, many: Path) -> None:
    """The host runs far ahead of the GPU, so a buffer that is reused too early would change while it is read."""
    expected = epoch(train(many, aug, "cuda", placement=placement))
    busy = torch.randn(4096, 4096, device="cuda")
    seen = []
    for images, labels in train(many, aug, "cuda", placement=placement):
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        seen.append(Batch(images.clone(), labels.clone()))
        del images, labels
    assert_same([Batch(images.cpu(), labels.cpu()) for images, labels in seen], expected)


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("placement", ["host", "device"])
def test_dali_output_outlives_its_reading_stream(placement: str, many: Path) -> None:
    """Each batch is read after a kernel of about 50 ms and dropped at once, while DALI works on the next ones."""
    expected = epoch(train(many, RANDOM_RESIZED, "cuda", placement=placement))
    seen, read = [], []
    overlaps = 0
    for images, labels in train(many, RANDOM_RESIZED, "cuda", placement=placement):
        overlaps += bool(read and not read[-1].query())  # the next batch arrived before the last one was read
        torch.cuda._sleep(100_000_000)
        seen.append(Batch(images.clone(), labels.clone()))
        read.append(torch.cuda.current_stream().record_event())
        del images, labels
    assert overlaps > 0
    assert_same([Batch(images.cpu(), labels.cpu()) for images, labels in seen], expected)


@pytest.mark.gpu
def test_batch_without_graph_is_the_gathered_tensor() -> None:
    device = torch.device("cuda", 0)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        gathered = torch.zeros((3, 4, 4, 3), dtype=torch.uint8, device=device)
    runner = CopyRunner(device, stream)
    runner.submit(gathered, np.arange(3), {})
    images, labels, released = runner.result()
    released()
    assert images.data_ptr() == gathered.data_ptr()
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.gpu
@PLACEMENTS
@pytest.mark.parametrize("aug", [AugConfig(flip=0), RANDOM_RESIZED], ids=["none", "random-resized"])
def test_gpu_resumed_run_gives_same_bytes(aug: AugConfig, placement: str, many: Path) -> None:
    through = epoch(train(many, aug, "cuda", placement=placement))
    resumed = train(many, aug, "cuda", placement=placement, threads=3, prefetch=2)
    resumed.position = Position(EPOCH, 20)
    assert_same([Batch(images.cpu(), labels.cpu()) for images, labels in resumed], through[20:])


@pytest.mark.gpu
@PLACEMENTS
@pytest.mark.parametrize("aug", [AugConfig(flip=0), RANDOM_RESIZED], ids=["none", "random-resized"])
def test_gpu_loop_left_early_continues_with_next_batch(aug: AugConfig, placement: str, many: Path) -> None:
    expected = epoch(train(many, aug, "cuda", placement=placement))
    loader, seen = train(many, aug, "cuda", placement=placement), []
    for stop in (1, 5, 3, 999):
        for images, labels in loader:
            seen.append(Batch(images.cpu(), labels.cpu()))
            if (stop := stop - 1) == 0:
                break
    assert_same(seen, expected)


@pytest.mark.gpu
def test_gpu_jpeg_is_reproducible_without_hardware_decoder(mixed: Path) -> None:
    loaders = [train(mixed, RANDOM_RESIZED, "cuda", hw_decoder_load=0.0, image_size=64) for _ in range(2)]
    assert_same(epoch(loaders[0]), epoch(loaders[1]))
