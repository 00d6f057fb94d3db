"""Compare the CPU graphs with DALI's on the same inputs, and the kernels with NumPy and torch, on photos."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

from configs.schema import AugConfig, DataConfig, EraseConfig
from configs.utils.errors import UserError
from helpers.memory_source import MemoryRows, memory_source, write
from helpers.threads import THREADS, at_once
from pipelines import build_eval_loader
from pipelines.augment.ops import Op, Programs
from pipelines.convert.source import Encoding
from pipelines.cpu import batch
from pipelines.cpu import graph as cpu_graph
from pipelines.cpu.graph import Images, whole_parts
from pipelines.gpu import dali_graph
from pipelines.gpu.dali_runner import DaliRunner
from pipelines.loader.bad_samples import Undecodable
from pipelines.loader.buffers import SlotBuffers
from pipelines.loader.jpeg_sources import HostJpegs
from pipelines.storage.open import open_split

BATCH = 24
MEAN = (0.5, 0.25, 0.125)
RANDOM = np.random.default_rng(0)
PHOTOS = load_sample_images().images


def photos(height: int, width: int, count: int = BATCH) -> np.ndarray:
    """Return crops of scikit-learn's two photographs: uint8 [count, H, W, 3]."""
    parts = []
    for number in range(count):
        photo = PHOTOS[number % len(PHOTOS)]
        top, left = RANDOM.integers(0, photo.shape[0] - height + 1), RANDOM.integers(0, photo.shape[1] - width + 1)
        parts.append(photo[top : top + height, left : left + width])
    return np.stack(parts)


def images_of(pixels: np.ndarray) -> Images:
    """Return the input of a graph for uint8 [B, H, W, 3]."""
    count, height, width, _ = pixels.shape
    begins = np.arange(count) * (height * width * 3)
    return Images(np.ascontiguousarray(pixels).reshape(-1), begins, np.full(count, height), np.full(count, width))


def whole(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the first arguments of `batch.resize`."""
    content, offsets, heights, widths, _ = images_of(pixels)
    return content, offsets, heights, widths, whole_parts(heights, widths).boxes


def train_graph(
    pixels: np.ndarray,
    aug: AugConfig,
    size: int,
    interpolation: str = "bilinear",
    antialias: bool = True,
    programs: Programs | None = None,
) -> cpu_graph.CpuGraph | None:
    return cpu_graph.train_graph(pixels.shape[1:], aug, size, interpolation, antialias, programs, MEAN)


def by_cpu(graph_: cpu_graph.CpuGraph | None, pixels: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    assert graph_ is not None
    side = graph_.stages[-1].side
    out = np.full((len(pixels), side, side, 3), 77, np.uint8)
    graph_(images_of(pixels), feeds, out)
    return out


def by_dali(pipeline: Any, pixels: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    runner = DaliRunner(lambda: pipeline, torch.device("cpu"))
    runner.submit(torch.from_numpy(pixels), np.arange(len(pixels)), feeds)
    return runner.result()[0].numpy().copy()


def stored(pixels: np.ndarray) -> dali_graph.ImageSpec:
    return dali_graph.ImageSpec("npy", pixels.shape[1:], False)


MACHINE = dali_graph.PipelineConfig(None, BATCH, 1, 0.0)


def assert_same_but_for_rounding(first: np.ndarray, second: np.ndarray, share: float) -> None:
    """Check that values differ by at most one grey level, in at most `share` of them."""
    difference = np.abs(first.astype(int) - second)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


@pytest.mark.parametrize("side", [32, 45])
@pytest.mark.parametrize("padding", [0, 4, 40])
def test_pad_crop_and_flip_equal_dali_bitwise(side: int, padding: int) -> None:
    pixels, aug = photos(side, side), AugConfig(crop="pad", padding=padding, flip=0.5)
    feeds = {
        "offset": RANDOM.integers(-padding, padding + 1, (BATCH, 2)).astype(np.int32),
        "flip": RANDOM.integers(0, 2, BATCH).astype(np.int32),
    }
    expected = by_dali(
        dali_graph.train_graph(stored(pixels), MACHINE, aug, side, "bilinear", True, None), pixels, feeds
    )
    found = by_cpu(train_graph(pixels, aug, side, "bilinear"), pixels, feeds)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [17, 64, 150])
def test_random_resized_crops_equal_dali_up_to_rounding(size: int, interpolation: str) -> None:
    pixels, aug = photos(97, 120), AugConfig(crop="random-resized")
    top, left = RANDOM.integers(0, 60, BATCH), RANDOM.integers(0, 80, BATCH)
    start = np.stack([top, left], axis=1).astype(np.float32)
    end = start + np.stack([RANDOM.integers(1, 97 - top + 1), RANDOM.integers(1, 120 - left + 1)], axis=1)
    start[::2, 1], end[::2, 1] = end[::2, 1].copy(), start[::2, 1].copy()  # mirrored
    feeds = {"crop_start": start, "crop_end": end.astype(np.float32)}
    expected = by_dali(
        dali_graph.train_graph(stored(pixels), MACHINE, aug, size, interpolation, True, None), pixels, feeds
    )
    found = by_cpu(train_graph(pixels, aug, size, interpolation), pixels, feeds)
    assert_same_but_for_rounding(found, expected, share=0.01)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(97, 120), (120, 97), (64, 64), (64, 91), (50, 333)])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.875])
def test_central_crops_equal_dali_up_to_rounding(
    height: int, width: int, crop_fraction: float, interpolation: str
) -> None:
    pixels = photos(height, width)
    for size in (31, 56, 64):
        ours = cpu_graph.eval_graph(pixels.shape[1:], size, crop_fraction, interpolation, True, False)
        if ours is None:
            assert (height, width, size) == (64, 64, 64)
            continue
        dalis = dali_graph.eval_graph(stored(pixels), MACHINE, size, crop_fraction, interpolation, True, False)
        assert_same_but_for_rounding(by_cpu(ours, pixels, {}), by_dali(dalis, pixels, {}), share=0.01)


def test_resize_before_pad_crop_equals_dali_up_to_rounding() -> None:
    pixels, aug = photos(80, 64, 100), AugConfig(crop="pad", padding=9)
    feeds = {
        "offset": RANDOM.integers(-9, 10, (100, 2)).astype(np.int32),
        "flip": RANDOM.integers(0, 2, 100).astype(np.int32),
    }
    machine = dali_graph.PipelineConfig(None, 100, 1, 0.0)
    expected = by_dali(dali_graph.train_graph(stored(pixels), machine, aug, 70, "bilinear", True, None), pixels, feeds)
    ours = train_graph(pixels, aug, 70, "bilinear")
    assert ours is not None
    assert len(ours.stages) == 2
    assert_same_but_for_rounding(by_cpu(ours, pixels, feeds), expected, share=0.01)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(97, 120, 31), (64, 91, 64), (50, 40, 90)])
def test_squashed_images_equal_dali_up_to_rounding(
    height: int, width: int, size: int, interpolation: str, antialias: bool
) -> None:
    pixels = photos(height, width)
    ours = cpu_graph.eval_graph(pixels.shape[1:], size, 0.5, interpolation, antialias, True)

    def define() -> Any:
        images, how = fn.external_source(name="images", layout="HWC"), dali_graph.INTERPOLATIONS[interpolation]
        return fn.resize(images, size=[size, size], interp_type=how, antialias=antialias)

    dalis = dali_graph._pipeline(MACHINE, define)
    assert_same_but_for_rounding(by_cpu(ours, pixels, {}), by_dali(dalis, pixels, {}), share=0.01)


@pytest.mark.parametrize(("height", "width", "size"), [(97, 120, 31), (64, 91, 64), (64, 64, 64)])
def test_squashed_training_equals_evaluation_with_flips(height: int, width: int, size: int) -> None:
    pixels, aug = photos(height, width), AugConfig(crop="squash", flip=0.5)
    feeds = {"flip": RANDOM.integers(0, 2, BATCH).astype(np.int32)}
    whole = cpu_graph.eval_graph(pixels.shape[1:], size, 0.5, "bilinear", True, True)
    squashed = pixels if whole is None else by_cpu(whole, pixels, {})
    mirrored = np.where(feeds["flip"][:, None, None, None] == 1, squashed[:, :, ::-1], squashed)
    ours = by_cpu(train_graph(pixels, aug, size), pixels, feeds)
    assert np.array_equal(ours, mirrored)
    dalis = dali_graph.train_graph(stored(pixels), MACHINE, aug, size, "bilinear", True, None)
    assert_same_but_for_rounding(ours, by_dali(dalis, pixels, feeds), share=0.01)


@pytest.mark.parametrize("size", [31, 90])
def test_resize_without_antialias_equals_torchvision_up_to_rounding(size: int) -> None:
    pixels = photos(80, 61)
    found = by_cpu(cpu_graph.eval_graph(pixels.shape[1:], size, 0.5, "bilinear", False, True), pixels, {})
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()  # for uint8, torch rounds after each direction
    expected = F.resize(planes, [size, size], antialias=False).permute(0, 2, 3, 1).round().numpy()
    assert_same_but_for_rounding(found, expected, share=0.01)


def test_squashing_keeps_stored_pixels_of_right_size() -> None:
    assert cpu_graph.eval_graph((64, 64, 3), 64, 0.875, "bilinear", True, True) is None
    assert cpu_graph.eval_graph((64, 65, 3), 64, 0.875, "bilinear", True, True) is not None


SOLARIZED = Programs((frozenset({Op.SOLARIZE}),), bilinear=False, fill=(0, 0, 0), radius=1)
NONE = AugConfig(flip=0)
PAD, RANDOM_RESIZED = AugConfig(crop="pad", padding=9, flip=0.5), AugConfig(crop="random-resized")


@pytest.mark.parametrize(
    ("aug", "shape"), [(NONE, (70, 70)), (NONE, (80, 64)), (PAD, (80, 64)), (RANDOM_RESIZED, (80, 64))]
)
def test_programs_erasing_cutout_follow_any_crop(aug: AugConfig, shape: tuple[int, int]) -> None:
    count = 100  # several pieces
    pixels = photos(*shape, count)
    feeds: dict[str, np.ndarray] = {}
    if aug.crop == "random-resized":
        feeds |= {"crop_start": np.full((count, 2), 5, np.float32), "crop_end": np.full((count, 2), 60, np.float32)}
    elif aug.crop == "pad":
        offsets = RANDOM.integers(-9, 10, (count, 2)).astype(np.int32)
        feeds |= {"offset": offsets, "flip": RANDOM.integers(0, 2, count).astype(np.int32)}
    plain = train_graph(pixels, aug, 70)
    expected = pixels.copy() if plain is None else by_cpu(plain, pixels, feeds)
    expected = np.where(expected >= 128, 255 - expected, expected)
    boxes = np.stack([RANDOM.integers(low, high, count) for low, high in ((0, 50), (0, 50), (0, 20), (1, 20))], axis=1)
    colors = RANDOM.integers(0, 256, (count, 3), dtype=np.uint8)
    corners = RANDOM.integers(0, 70 - 11 + 1, (count, 2))
    for image, (top, left, height, width), color, (y, x) in zip(expected, boxes, colors, corners, strict=True):
        image[top : top + height, left : left + width] = color
        image[y : y + 11, x : x + 11] = (128, 64, 32)  # round(255 * mean)
    feeds |= {"ops": np.full((count, 1), int(Op.SOLARIZE), np.int32), "values": np.full((count, 1), 128, np.float32)}
    feeds |= {"erase_box": boxes.astype(np.int32), "erase_color": colors, "cutout": corners.astype(np.float32)}
    everything = aug.model_copy(update={"erase": EraseConfig(probability=0.5), "cutout": 11})
    assert np.array_equal(by_cpu(train_graph(pixels, everything, 70, programs=SOLARIZED), pixels, feeds), expected)


@pytest.mark.parametrize("side", [32, 45])
def test_cutout_equals_dali_bitwise(side: int) -> None:
    pixels, aug = photos(side, side), AugConfig(crop="pad", padding=4, flip=0, cutout=9)
    feeds = {
        "offset": RANDOM.integers(-4, 5, (BATCH, 2)).astype(np.int32),
        "cutout": RANDOM.integers(0, side - 9 + 1, (BATCH, 2)).astype(np.float32),
    }
    dalis = dali_graph.train_graph(replace(stored(pixels), mean=MEAN), MACHINE, aug, side, "bilinear", True, None)
    assert np.array_equal(by_cpu(train_graph(pixels, aug, side), pixels, feeds), by_dali(dalis, pixels, feeds))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crop_flip_equals_numpy(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(2, 40)), data.draw(st.integers(2, 60))
    reflect = data.draw(st.booleans())
    size = data.draw(st.integers(1, min(height, width) if reflect else 70))  # a crop shows one reflection at most
    pad_y, pad_x = (height - 1, width - 1) if reflect else (80, 80)
    high_y, high_x = height + pad_y - size, width + pad_x - size
    y, x = data.draw(st.integers(-pad_y, high_y)), data.draw(st.integers(-pad_x, high_x))
    flip = data.draw(st.booleans())
    pixels = RANDOM.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    out = np.full((1, size, size, 3), 77, np.uint8)
    given_ = images_of(pixels)
    offsets, flips = np.array([[y, x]], np.int32), np.array([flip], np.int32)
    batch.crop_flip(given_.content, given_.offsets, height, width, offsets, flips, reflect, out)
    pads = [(pad_y, pad_y), (pad_x, pad_x), (0, 0)]
    padded = np.pad(pixels[0], pads, mode="reflect" if reflect else "constant")
    expected = padded[y + pad_y : y + pad_y + size, x + pad_x : x + pad_x + size]
    assert np.array_equal(out[0], expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 7, 3), (1, 1, 3)])
@pytest.mark.parametrize("shift", [0, 1, 8])
def test_copies_are_exact_for_any_alignment(shape: tuple[int, int, int], shift: int) -> None:
    pixels = RANDOM.integers(0, 256, (50, *shape), dtype=np.uint8)
    size = pixels[0].size
    rows = RANDOM.permutation(50)[:20]
    memory = np.full(20 * size + 128, 77, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    out = memory[begin : begin + 20 * size].reshape(20, *shape)
    batch.copy(pixels.reshape(-1), rows * size, out)
    assert np.array_equal(out, pixels[rows])
    assert (memory[:begin] == 77).all()
    assert (memory[begin + 20 * size :] == 77).all()


def test_resize_writes_only_its_batch() -> None:
    pixels = photos(40, 40, 5)
    memory = np.full(5 * 33 * 33 * 3 + 64, 77, np.uint8)
    region = np.zeros((5, 2), np.float32), np.full((5, 2), 40, np.float32)
    batch.resize(*whole(pixels), *region, False, True, memory[: 5 * 33 * 33 * 3].reshape(5, 33, 33, 3))
    assert (memory[5 * 33 * 33 * 3 :] == 77).all()


def test_resize_to_same_size_is_identity() -> None:
    pixels = photos(40, 40, 5)
    for cubic in (False, True):
        out = np.empty_like(pixels)
        region = np.zeros((5, 2), np.float32), np.full((5, 2), 40, np.float32)
        batch.resize(*whole(pixels), *region, cubic, True, out)
        assert np.array_equal(out, pixels)


def test_threads_can_share_a_graph() -> None:
    pixels, aug = photos(80, 64, 200), AugConfig(crop="pad", padding=9)
    feeds = {"offset": np.zeros((200, 2), np.int32), "flip": np.ones(200, np.int32)}
    feeds |= {"ops": RANDOM.integers(0, len(Op), (200, 3)).astype(np.int32), "values": np.ones((200, 3), np.float32)}
    feeds["values"][feeds["ops"] == Op.HUE] = 0.3
    ours = train_graph(pixels, aug, 70, "bilinear", programs=replace(SOLARIZED, radius=3))
    expected = by_cpu(ours, pixels, feeds)
    found = at_once(lambda: by_cpu(ours, pixels, feeds))
    assert len(found) == THREADS
    assert all(np.array_equal(one, expected) for one in found)


# JPEG


def central(crop_fraction: float) -> cpu_graph.CpuGraph | None:
    return cpu_graph.eval_graph(None, 64, crop_fraction, "bilinear", True, False)


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Return a split of 24 JPEGs of three sizes."""
    rows = MemoryRows([*photos(160, 240, 8), *photos(301, 200, 8), *photos(97, 111, 8)])
    write(memory_source(train=rows, val=rows), tmp_path / "tiny", Encoding("jpeg"))
    return tmp_path / "tiny"


def test_decoded_pixels_equal_dali_bitwise(tmp_path: Path) -> None:
    rows = MemoryRows([*photos(97, 97)])
    write(memory_source(train=rows, val=rows), tmp_path / "tiny", Encoding("jpeg"))
    split = open_split(tmp_path / "tiny", "val")
    ours = HostJpegs(split, SlotBuffers(1, BATCH, (97, 97, 3))).fill(0, np.arange(BATCH), {})
    pipeline = dali_graph.eval_graph(
        dali_graph.ImageSpec("jpeg", (97, 97, 3), False), MACHINE, 97, 1.0, "bilinear", True, False
    )
    runner = DaliRunner(lambda: pipeline, torch.device("cpu"))
    files = [split.content[a : a + s] for a, s in zip(split.address.tolist(), split.size.tolist(), strict=True)]
    runner.submit(files, np.arange(BATCH), {})
    assert torch.equal(ours, runner.result()[0])


def test_jpegs_of_several_sizes_match_dali(jpegs: Path) -> None:
    split = open_split(jpegs, "val")
    ours = HostJpegs(split, SlotBuffers(1, BATCH, (64, 64, 3)), central(0.875))
    ours.CHUNK = 2**17  # forces several pieces, some of one image
    order = RANDOM.permutation(BATCH)
    found = ours.fill(0, order, {}).numpy()
    pipeline = dali_graph.eval_graph(
        dali_graph.ImageSpec("jpeg", None, False), MACHINE, 64, 0.875, "bilinear", True, False
    )
    runner = DaliRunner(lambda: pipeline, torch.device("cpu"))
    files = [split.content[a : a + s] for a, s in zip(split.address.tolist(), split.size.tolist(), strict=True)]
    runner.submit([files[i] for i in order], np.arange(BATCH), {})
    assert_same_but_for_rounding(found, runner.result()[0].numpy(), share=0.01)


def overwrite(folder: Path, sample: int, content: bytes) -> None:
    """Overwrite a sample's JPEG with other bytes, padded with zeros."""
    split = open_split(folder, "val", verify="off")
    offset, size = int(split.address[sample]) - int(split.shard[sample]) * split.slot_bytes, int(split.size[sample])
    assert len(content) <= size
    with split.files[split.shard[sample]].open("r+b") as file:
        file.seek(offset)
        file.write(content.ljust(size, b"\0"))


def evaluate(folder: Path) -> np.ndarray:
    data = DataConfig(path=str(folder), image_size=64, batch_size=8, verify="off")
    loader = build_eval_loader(data, device="cpu")
    return np.concatenate([images.permute(0, 2, 3, 1).numpy() for images, _ in loader])


def encoded(pixels: np.ndarray, quality: int = 60) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def decoded(folder: Path, sample: int) -> np.ndarray:
    """Return a stored image; re-encoded at a lower quality it takes fewer bytes."""
    split = open_split(folder, "val")
    begin, size = int(split.address[sample]), int(split.size[sample])
    return np.asarray(Image.open(io.BytesIO(split.content[begin : begin + size].tobytes())))


def test_jpeg_with_decoder_warning_is_read(jpegs: Path) -> None:
    content = encoded(decoded(jpegs, 3))
    overwrite(jpegs, 3, content)
    expected = evaluate(jpegs)[3]
    overwrite(jpegs, 3, content[:2] + b"\xff\xfe\x00\x02" + b"\x00" * 5 + content[2:])  # extraneous bytes
    assert np.array_equal(evaluate(jpegs)[3], expected)


def test_truncated_jpeg_is_an_error_naming_the_sample(jpegs: Path) -> None:
    split = open_split(jpegs, "val")
    size = split.size.copy()
    size[3] //= 2
    ours = HostJpegs(replace(split, size=size), SlotBuffers(1, 8, (64, 64, 3)), central(1))
    with pytest.raises(Undecodable, match=r"samples \[3\] cannot be decoded"):
        ours.fill(0, np.arange(8), {})


def test_jpeg_of_unexpected_size_is_an_error(jpegs: Path) -> None:
    photo = decoded(jpegs, 3)
    for other in (photo[:50, :60], photo.swapaxes(0, 1)):
        overwrite(jpegs, 3, encoded(other))
        shape = other.shape
        with pytest.raises(
            UserError, match=rf"sample 3 .* has {shape[0]} x {shape[1]} pixels where the index says 160"
        ):
            evaluate(jpegs)
