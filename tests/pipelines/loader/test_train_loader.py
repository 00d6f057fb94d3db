"""Loaders with stages: only the sizes change, on schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import AugConfig, DataConfig, EvalConfig
from configs.stages import data_at
from configs.utils.errors import UserError
from pipelines import build_eval_loader, build_train_loader
from pipelines.interfaces import Position
from pipelines.loader.train_loader import TrainLoader

SEED = 4
AUG = AugConfig(crop="random-resized", flip=0.5, flip_mode="alternating", auto="randaugment")  # type: ignore[arg-type]
STAGES = [{"epoch": 1, "image_size": 24}, {"epoch": 3, "image_size": 40, "batch_size": 16}]


def train(
    folder: Path, stages: list[dict[str, int]], aug: AugConfig = AUG, rank: int = 0, world_size: int = 1, **options: Any
) -> TrainLoader:
    data = DataConfig(path=str(folder), stages=stages, threads=1, **{"batch_size": 32, **options})  # type: ignore[arg-type]
    return build_train_loader(data, aug, seed=SEED, device="cpu", rank=rank, world_size=world_size)


def epoch_of(loader: TrainLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images and labels of the rest of an epoch."""
    batches = [(images.clone(), labels.clone()) for images, labels in loader]
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_sizes_change_with_the_epoch_except_in_evaluation(npy_data: Path) -> None:
    loader = train(npy_data, STAGES)
    seen = []
    for epoch in range(5):
        assert loader.position == Position(epoch)
        length, size, batch = len(loader), loader.image_size, loader.plan.batch_size
        shapes = {tuple(images.shape) for images, _ in loader}
        assert shapes == {(batch, 3, size, size)}
        seen.append((length, size, batch))
    assert seen == [(21, 32, 32), (21, 24, 32), (21, 24, 32), (43, 40, 16), (43, 40, 16)]
    evaluation = build_eval_loader(
        DataConfig(path=str(npy_data), stages=STAGES, batch_size=32),  # type: ignore[arg-type]
        EvalConfig(image_size=36),
        device="cpu",
    )
    assert {images.shape[2] for images, _ in evaluation} == {36}


def test_stages_do_not_change_order_and_draws(npy_data: Path) -> None:
    staged = train(npy_data, STAGES)
    for epoch in (0, 2, 3):
        plain = train(npy_data, [], image_size=staged.at(epoch).image_size, batch_size=staged.at(epoch).plan.batch_size)
        staged.position = plain.position = Position(epoch)
        for ours, theirs in zip(epoch_of(staged), epoch_of(plain), strict=True):
            assert torch.equal(ours, theirs)


def test_two_ranks_share_the_batches_of_one(npy_data: Path) -> None:
    halved = [{key: size // 2 if key == "batch_size" else size for key, size in stage.items()} for stage in STAGES]
    whole = train(npy_data, STAGES)
    ranks = [train(npy_data, halved, batch_size=16, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(4):
        images, labels = epoch_of(whole)
        halves = [epoch_of(loader) for loader in ranks]
        size = ranks[0].at(ranks[0].position.epoch - 1).plan.batch_size
        for parts, expected in zip(zip(*halves, strict=True), (images, labels), strict=True):
            pieces = [part.unflatten(0, (-1, size)) for part in parts]  # [batches, samples of a rank, ...]
            assert torch.equal(torch.cat(pieces, dim=1).flatten(0, 1), expected)


def test_resume_continues_within_any_stage(npy_data: Path) -> None:
    whole = train(npy_data, STAGES)
    for epoch in (0, 1, 3):
        whole.position = Position(epoch)
        images, labels = epoch_of(whole)
        resumed = train(npy_data, STAGES)
        resumed.position = Position(epoch, 5)
        size = resumed.plan.batch_size
        again, again_labels = epoch_of(resumed)
        assert torch.equal(again, images[5 * size :])
        assert torch.equal(again_labels, labels[5 * size :])
        assert resumed.position == Position(epoch + 1)


def test_iterator_raises_after_another_stage_was_started(npy_data: Path) -> None:
    for goes_on in (lambda loader: None, lambda loader: next(iter(loader))):
        loader = train(npy_data, STAGES)
        first = iter(loader)
        next(first)
        loader.position = Position(1)
        goes_on(loader)
        with pytest.raises(RuntimeError, match="one iterator at a time"):
            next(first)


def test_part_of_an_epoch_has_only_its_own_sizes() -> None:
    data = DataConfig(path="x", batch_size=32, image_size=48, stages=STAGES)  # type: ignore[arg-type]
    sections = [data_at(data, epoch) for epoch in range(5)]
    sizes = [(section.image_size, section.batch_size, section.stages) for section in sections]
    assert sizes == [(48, 32, ()), (24, 32, ()), (24, 32, ()), (40, 16, ()), (40, 16, ())]


def test_wait_time_is_summed_over_stages(npy_data: Path) -> None:
    loader = train(npy_data, [{"epoch": 0, "image_size": 24}, {"epoch": 1, "image_size": 32}])
    epoch_of(loader)
    first = loader.wait_s
    epoch_of(loader)
    assert loader.wait_s > first > 0


def test_stages_share_pixels_in_memory(npy_data: Path) -> None:
    loader = train(npy_data, STAGES, AugConfig(flip=0.5), placement="device")
    contents = [stage.source._content for stage in loader.stages]  # type: ignore[attr-defined]
    assert len(contents) == 3
    assert all(np.shares_memory(contents[0], content) for content in contents)


def test_invalid_stage_is_rejected_before_training(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"aug\.cutout=30 exceeds images of 24 pixels"):
        train(npy_data, STAGES, AugConfig(cutout=30))
    with pytest.raises(UserError, match=r"data\.batch_size=5000 exceeds the 700 samples"):
        train(npy_data, [{"epoch": 2, "batch_size": 5000}])


@pytest.mark.gpu
@pytest.mark.gpu_values
@pytest.mark.parametrize("placement", ["host", "device"])
def test_gpu_stages_give_the_cpus_batches(placement: str, npy_data: Path) -> None:
    """Stages at the stored size do not need DALI if pixels are resident; the others do, and share the pixels."""
    data = DataConfig(path=str(npy_data), stages=STAGES, batch_size=32, threads=1, placement=placement)  # type: ignore[arg-type]
    aug = AugConfig(crop="pad", padding=2, flip=0.5)
    on_gpu, on_cpu = (build_train_loader(data, aug, seed=SEED, device=device) for device in ("cuda", "cpu"))
    for epoch in range(4):
        images, labels = epoch_of(on_gpu)
        expected, expected_labels = epoch_of(on_cpu)
        assert torch.equal(labels.cpu(), expected_labels)
        assert (images.cpu().int() - expected.int()).abs().max() <= (0 if epoch == 0 else 2)
