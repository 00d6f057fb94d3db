"""data.views: each view of a batch equals the batch of a loader of that view alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import (
    AugConfig,
    AutoAugmentConfig,
    BlurConfig,
    ColorJitterConfig,
    DataConfig,
    EraseConfig,
    MixConfig,
    PaddingMode,
)
from configs.utils.errors import UserError
from helpers.backends import use_dali
from helpers.damage import damage_in_turn
from helpers.loaders import NO_AUG, assert_same, copies, data_of, evaluation, merged
from helpers.photos import converted, photos
from pipelines import build_train_loader, view_seed
from pipelines.cpu.jpeg.decoder import JpegDecoder
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch
from pipelines.loader.train_loader import TrainLoader

SEED, VIEWS = 3, 3
CROP = AugConfig(crop="random-resized", scale=(0.05, 1.0), flip=0.5)
PAD = AugConfig(crop="pad", flip=0.5, flip_mode="alternating", cutout=8)
REFLECT = AugConfig(crop="pad", padding_mode=PaddingMode.REFLECT)
ALL = CROP.model_copy(
    update={
        "auto": AutoAugmentConfig(policy="rand-m9-mstd0.5-inc1"),
        "color_jitter": ColorJitterConfig(brightness=0.4, hue=0.1, probability=0.8),
        "grayscale": 0.2,
        "blur": BlurConfig(probability=0.5),
        "erase": EraseConfig(probability=0.5, fill="random"),
    }
)
AUGS = pytest.mark.parametrize(
    "aug", [NO_AUG, PAD, REFLECT, CROP, ALL], ids=["none", "pad", "reflect", "random-resized", "all"]
)


def loader_of(folder: Path, aug: AugConfig, views: int, draw_seed: int | None = None, **options: Any) -> TrainLoader:
    others = {name: options.pop(name) for name in ("rank", "world_size", "device", "flat_views") if name in options}
    data = data_of(folder, **{"batch_size": 20, "views": views, **options})
    return build_train_loader(data, aug, seed=SEED, draw_seed=draw_seed, **{"device": "cpu", **others})


def stacked(folder: Path, aug: AugConfig, epochs: int = 2, **options: Any) -> list[Batch]:
    """Return the batches of VIEWS loaders of one view each, stacked."""
    loaders = [loader_of(folder, aug, 1, view_seed(SEED, view), **options) for view in range(VIEWS)]
    found = [[batch for _ in range(epochs) for batch in copies(loader)] for loader in loaders]
    return [
        Batch(torch.stack([view.images for view in views], 1), views[0].labels) for views in zip(*found, strict=True)
    ]


def epochs_of(loader: TrainLoader, epochs: int = 2) -> list[Batch]:
    return [batch for _ in range(epochs) for batch in copies(loader)]


@pytest.fixture(params=["kernels", "DALI"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "DALI":
        use_dali(monkeypatch)
    return str(request.param)


@AUGS
@pytest.mark.parametrize("placement", ["host", "device"])
def test_views_of_raw_pixels_equal_loaders_of_one_view(
    placement: str, aug: AugConfig, way: str, npy_data: Path
) -> None:
    found = epochs_of(loader_of(npy_data, aug, VIEWS, placement=placement, limit=170))
    assert_same(found, stacked(npy_data, aug, placement=placement, limit=170))
    assert found[0].images.shape == (20, VIEWS, 3, 32, 32)
    assert aug == NO_AUG or not torch.equal(found[0].images[:, 0], found[0].images[:, 1])


@AUGS
@pytest.mark.parametrize("jpeg_decode", ["exact", "fast"])
def test_views_of_jpegs_equal_loaders_of_one_view(jpeg_decode: str, aug: AugConfig, way: str, jpeg_data: Path) -> None:
    options = {"jpeg_decode": jpeg_decode, "limit": 130, "image_size": 24}
    assert_same(epochs_of(loader_of(jpeg_data, aug, VIEWS, **options)), stacked(jpeg_data, aug, **options))


def test_views_of_jpegs_that_are_not_transformed_equal_each_other(tmp_path: Path) -> None:
    folder = converted(tmp_path / "square", photos(40, 40), "jpeg")
    found = epochs_of(loader_of(folder, NO_AUG, VIEWS, batch_size=4))
    assert_same(found, stacked(folder, NO_AUG, batch_size=4))
    assert torch.equal(found[0].images[:, 0], found[0].images[:, 2])


@pytest.mark.parametrize("size", [24, 224])
def test_views_of_photos_at_different_scales_equal_loaders_of_one_view(size: int, tmp_path: Path) -> None:
    folder = converted(tmp_path / "photos", photos(350, 500), "jpeg")
    options = {"jpeg_decode": "fast", "image_size": size, "batch_size": 4}
    assert_same(epochs_of(loader_of(folder, CROP, VIEWS, **options)), stacked(folder, CROP, **options))


@pytest.mark.parametrize(("aug", "decoded"), [(CROP, 20), (NO_AUG, 20)], ids=["random-resized", "none"])
def test_jpeg_is_decoded_once_for_all_views(
    aug: AugConfig, decoded: int, jpeg_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    decode = JpegDecoder.decode

    def counted(self: JpegDecoder, content: np.ndarray, starts: np.ndarray, *rest: Any, **options: Any) -> int:
        counts.append(len(starts) - options["first"])
        return decode(self, content, starts, *rest, **options)

    monkeypatch.setattr(JpegDecoder, "decode", counted)
    loader = loader_of(jpeg_data, aug, VIEWS, image_size=24, limit=20)
    loader.stage.gather(0, loader.plan.indices(0, 0), 0)
    assert sum(counts) == decoded


def test_resumed_views_equal_an_uninterrupted_epoch(way: str, npy_data: Path) -> None:
    through = copies(loader_of(npy_data, CROP, 2))
    resumed = loader_of(npy_data, CROP, 2, threads=2, prefetch=1)
    resumed.position = Position(0, 11)
    assert_same(copies(resumed), through[11:])


def test_views_do_not_depend_on_the_world_size(npy_data: Path) -> None:
    alone = copies(loader_of(npy_data, ALL, 2))
    ranks = [copies(loader_of(npy_data, ALL, 2, batch_size=10, rank=rank, world_size=2)) for rank in range(2)]
    assert_same(merged(ranks), alone)


@pytest.mark.parametrize("flat_views", [False, True])
def test_batches_are_channels_last_and_flatten_without_a_copy(flat_views: bool, way: str, npy_data: Path) -> None:
    split = next(iter(loader_of(npy_data, PAD, 2)))
    batch = next(iter(loader_of(npy_data, PAD, 2, flat_views=flat_views)))
    flat = batch.images if flat_views else batch.images.flatten(0, 1)
    assert flat.data_ptr() == batch.images.data_ptr()
    assert flat.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(flat.unflatten(0, (20, 2)), split.images)
    assert batch.images.shape == ((40, 3, 32, 32) if flat_views else (20, 2, 3, 32, 32))
    assert torch.equal(batch.labels, split.labels.repeat_interleave(2) if flat_views else split.labels)


@pytest.mark.parametrize("views", [1, VIEWS])
def test_own_augmentation_sees_each_view_alone(views: int, npy_data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n\ndef noise(images, generator):\n    assert len(images) == 20\n"
        "    assert images.is_contiguous(memory_format=torch.channels_last)\n"
        "    return images + 20 * torch.randn(images.shape, generator=generator)\n"
    )
    aug = PAD.model_copy(update={"custom": f"{own}:noise"})
    found = epochs_of(loader_of(npy_data, aug, views, limit=80))
    if views == 1:
        assert found[0].images.shape == (20, 3, 32, 32)
    else:
        assert_same(found, stacked(npy_data, aug, limit=80))


def test_bad_sample_is_replaced_in_all_views(way: str, jpeg_copy: Path) -> None:
    bad = [3, 77, 78, 129]
    damage_in_turn(jpeg_copy, bad)
    options: dict[str, Any] = {"on_bad_sample": "skip", "image_size": 24, "limit": 130, "placement": "host"}
    loader = loader_of(jpeg_copy, CROP, VIEWS, **options)
    assert_same(epochs_of(loader), stacked(jpeg_copy, CROP, **options))
    assert loader.bad.found


def test_groups_of_batches_and_buffers_count_views(npy_data: Path) -> None:
    stages = [loader_of(npy_data, PAD, views, batch_size=60).stage for views in (1, 64)]
    assert [stage.batch_images for stage in stages] == [60, 60 * 64]
    assert [next(iter(stage.groups(0, grow=False))) for stage in stages] == [range(8), range(1)]


def test_one_view_is_the_default_and_evaluation_has_one(npy_data: Path) -> None:
    assert DataConfig(path="x").views == 1
    assert_same(copies(loader_of(npy_data, ALL, 1)), copies(loader_of(npy_data, ALL, 1, SEED)))
    assert_same(copies(evaluation(npy_data, views=2)), copies(evaluation(npy_data)))


def test_seeds_of_views_are_distinct() -> None:
    seeds = [view_seed(seed, view) for seed in (0, 1, 2, 2**63 - 1) for view in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert [view_seed(seed, 0) for seed in (0, 7)] == [0, 7]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_mixing_several_views_is_refused(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"data\.views=2 cannot be combined with mixup or CutMix"):
        loader_of(npy_data, AugConfig(mix=MixConfig(mixup=0.2)), 2)


def on_host(batches: list[Batch]) -> list[Batch]:
    return [Batch(images.cpu(), labels.cpu()) for images, labels in batches]


GPU_CASES: dict[str, Callable[[Path, Path], tuple[Path, dict[str, Any]]]] = {
    "raw": lambda npy, _: (npy, {"placement": "host"}),
    "resident": lambda npy, _: (npy, {"placement": "device"}),
    "jpeg": lambda _, jpeg: (jpeg, {"image_size": 24, "hw_decoder_load": 0.0}),
}


@pytest.mark.gpu
@AUGS
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu_views_have_the_layout_of_cpu_views(case: str, aug: AugConfig, npy_data: Path, jpeg_data: Path) -> None:
    folder, options = GPU_CASES[case](npy_data, jpeg_data)
    for flat_views in (False, True):
        on_cpu = next(iter(loader_of(folder, aug, 2, flat_views=flat_views, **options | {"placement": "host"})))
        loader = loader_of(folder, aug, 2, device="cuda", flat_views=flat_views, **options)
        batches = copies(loader)
        assert len(batches) == len(loader)
        assert (batches[0].images.shape, batches[0].images.stride()) == (on_cpu.images.shape, on_cpu.images.stride())
        assert torch.equal(batches[0].labels.cpu(), on_cpu.labels)


@pytest.mark.gpu
@pytest.mark.gpu_values
@AUGS
@pytest.mark.parametrize("case", GPU_CASES)
def test_gpu_views_equal_loaders_of_one_view(case: str, aug: AugConfig, npy_data: Path, jpeg_data: Path) -> None:
    folder, options = GPU_CASES[case](npy_data, jpeg_data)
    found = epochs_of(loader_of(folder, aug, VIEWS, device="cuda", **options))
    assert_same(on_host(found), on_host(stacked(folder, aug, device="cuda", **options)))
