"""The user's own augmentation of batches (aug.custom)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.schema import AugConfig, Config, MixConfig
from configs.utils.errors import UserError
from helpers.loaders import NO_AUG, train
from pipelines.interfaces import Position
from pipelines.loader.batches import MixedBatch
from pipelines.loader.train_loader import TrainLoader
from tools.visualize.samples import augmented_samples
from train.engine.losses import render_batch

OWN = """
import torch

def noise(images, generator):
    return images + 20 * torch.randn(images.shape, generator=generator)

def brighten_in_place(images, generator):
    images[:] = 255 - images
    return images

def halves(images, generator):
    return torch.full(images.shape, 300.4).index_fill(0, torch.tensor([0]), -7.0).index_fill(0, torch.tensor([1]), 1.6)

def cropped(images, generator):
    return images[:, :, 1:]

def integers(images, generator):
    return images.long()

def nothing(images, generator):
    images += 1

def scaled(images, generator):
    return images.float() / 255

def fails(images, generator):
    return images @ images[:, :, :3]

class Flip:
    pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def loader(data: Path, custom: str, rank: int = 0, seed: int = 3, mix: MixConfig | None = None) -> TrainLoader:
    aug = AugConfig(flip=0, custom=custom, mix=mix or MixConfig())
    return train(data, aug=aug, rank=rank, world_size=2, seed=seed)


def epoch(loader: TrainLoader, position: Position) -> list[torch.Tensor]:
    loader.position = position
    return [batch.images.clone() for batch in loader]


def test_draws_are_a_function_of_seed_epoch_batch_and_rank(npy_data: Path, own: str) -> None:
    whole = epoch(loader(npy_data, f"{own}:noise"), Position(1))
    rest = epoch(loader(npy_data, f"{own}:noise"), Position(1, 3))
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], rest, strict=True))
    plain = epoch(train(npy_data, world_size=2), Position(1))
    noises = [images.int() - before.int() for images, before in zip(whole, plain, strict=True)]
    other_epoch = epoch(loader(npy_data, f"{own}:noise"), Position(2))[0].int()
    noises.append(other_epoch - epoch(train(npy_data, world_size=2), Position(2))[0].int())
    rank = epoch(loader(npy_data, f"{own}:noise", rank=1), Position(1))[0].int()
    noises.append(rank - epoch(train(npy_data, rank=1, world_size=2), Position(1))[0].int())
    assert 5 < noises[0].float().std() < 25  # clamped at 0 and 255
    for first in range(len(noises)):
        for second in range(first):
            assert (noises[first] == noises[second]).float().mean() < 0.3  # of equal draws, nearly all


def test_function_may_change_images_in_place(npy_data: Path, own: str) -> None:
    changed, plain = loader(npy_data, f"{own}:brighten_in_place"), train(npy_data, world_size=2)
    for _ in range(2):  # the stored pixels are unchanged
        for ours, theirs in zip(changed, plain, strict=True):
            assert torch.equal(ours.images, 255 - theirs.images)
            assert torch.equal(ours.labels, theirs.labels)


def test_floats_are_rounded_and_clamped_to_uint8(npy_data: Path, own: str) -> None:
    images = next(iter(loader(npy_data, f"{own}:halves"))).images
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert [images[sample].unique().tolist() for sample in range(3)] == [[0], [2], [255]]


def test_mixing_follows_own_augmentation(npy_data: Path, own: str) -> None:
    mix = MixConfig(mixup=1.0)
    batch = next(iter(loader(npy_data, f"{own}:brighten_in_place", mix=mix)))
    plain = next(iter(train(npy_data, aug=AugConfig(flip=0, mix=mix), world_size=2)))
    assert isinstance(batch, MixedBatch)
    difference = render_batch(batch).images.int() - (255 - render_batch(plain).images.int())
    assert difference.abs().max() <= 1  # rounding


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cropped", r"torch\.uint8 \[24, 3, 31, 32\] on cpu"),
        ("integers", r"torch\.int64 \[24, 3, 32, 32\] on cpu"),
        ("nothing", "NoneType"),
    ],
)
def test_results_that_are_no_images_are_refused(npy_data: Path, own: str, name: str, found: str) -> None:
    with pytest.raises(UserError, match=rf"aug\.custom=.*own\.py:{name} returns {found}, but must return images"):
        next(iter(loader(npy_data, f"{own}:{name}")))


def test_floats_from_0_to_1_are_refused(npy_data: Path, own: str) -> None:
    with pytest.raises(UserError, match=r"own\.py:scaled returns floats from 0 to 1, but must return 0 to 255"):
        next(iter(loader(npy_data, f"{own}:scaled")))


def test_failing_function_is_named_with_its_line(npy_data: Path, own: str) -> None:
    line = 1 + OWN[: OWN.index("    return images @")].count("\n")
    with pytest.raises(UserError, match=rf"own\.py:fails failed: RuntimeError: .* \(.*own\.py, line {line}\)$"):
        next(iter(loader(npy_data, f"{own}:fails")))


def test_class_is_refused(npy_data: Path, own: str) -> None:
    with pytest.raises(UserError, match=r"own\.py:Flip is a class, but must be a function \(images, generator\)"):
        loader(npy_data, f"{own}:Flip")


def test_missing_function_is_refused_before_an_epoch(npy_data: Path, own: str) -> None:
    with pytest.raises(UserError, match=r"aug\.custom=.*own\.py:nose: .* did you mean noise\?"):
        loader(npy_data, f"{own}:nose")


def test_shown_samples_and_single_stages_are_augmented(npy_data: Path, own: str) -> None:
    sections = {"data": {"path": str(npy_data), "batch_size": 24}, "model": {"name": "lenet"}}
    custom = Config.model_validate({**sections, "aug": {"flip": 0.0, "custom": f"{own}:brighten_in_place"}})
    plain = Config.model_validate({**sections, "aug": {"flip": 0.0}})
    cpu = torch.device("cpu")
    (_, [ours]), (_, [theirs]) = (augmented_samples(config, [0], 4, cpu) for config in (custom, plain))
    assert torch.equal(ours.images, 255 - theirs.images)


def test_loaders_without_own_augmentation_call_nothing(npy_data: Path) -> None:
    assert train(npy_data, aug=NO_AUG).augment is None
