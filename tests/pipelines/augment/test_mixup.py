"""Mixing of batches: draws against NumPy and timm, pixels against timm, and resumed runs.

timm pairs sample i with sample B - 1 - i; here 2i is paired with 2i + 1. timm's input is reordered to match.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.mixup import Mixup, rand_bbox

from configs.schema import AugConfig, DataConfig, MixConfig, StageConfig
from configs.utils.errors import UserError
from helpers.training import (
    CPU,
    DIGITS,
    alone,
    broken_after,
    lenet,
    make_state,
    on_ranks,
    random_batch,
    record_gradients,
)
from pipelines import build_train_loader
from pipelines.augment.mixup import check_mixing, draw_mixes, mix_table, mixing_enabled
from pipelines.interfaces import Position
from pipelines.loader.batches import Batch, MixedBatch
from pipelines.loader.train_loader import TrainLoader
from pipelines.rng import uniform
from tools import convert
from train import ddp
from train.checkpoint import store
from train.distributed.process_group import Ranks
from train.engine.losses import identity_mix, mix_images, render_batch, swap_pairs
from train.engine.step import train_step
from train.reporting import image_grids

MANY, SEED, EPOCH = 10_000, 5, 3
SIZE = 32
MODES = pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
BOTH = {"mixup": 0.4, "cutmix": 1.0}


def many_mixes(size: int = 224, **settings: Any) -> np.ndarray:
    return draw_mixes(MixConfig(**settings), np.arange(MANY), SEED, EPOCH, size)


def loader_of(data: Path, mix: MixConfig, batch_size: int = 16, **where: Any) -> TrainLoader:
    section = DataConfig(path=str(data), batch_size=batch_size)
    return build_train_loader(section, AugConfig(crop="pad", mix=mix), seed=SEED, device=CPU, **where)


def mixed(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Return training images, both labels, and the shares."""
    assert isinstance(batch, MixedBatch)
    return mix_images(batch.images, batch.mix), batch.labels.clone(), swap_pairs(batch.labels), batch.mix[:, 0]


# Distributions


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_mixup_share_follows_beta_distribution(alpha: float) -> None:
    table = many_mixes(mixup=alpha)
    numpys = np.random.default_rng(0).beta(alpha, alpha, MANY).astype(np.float32)
    assert stats.ks_2samp(table[:, 0], numpys).pvalue > 0.01
    assert not table[:, 1:].any()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_boxes_match_timm_and_leave_exact_share(alpha: float) -> None:
    table = many_mixes(cutmix=alpha).astype(np.float64)
    state = np.random.get_state()
    np.random.seed(0)
    theirs = np.array([rand_bbox((3, 224, 224), share) for share in np.random.beta(alpha, alpha, MANY)])
    np.random.set_state(state)
    top, bottom, left, right = table[:, 1:].T
    area = (bottom - top) * (right - left)
    np.testing.assert_allclose(table[:, 0], 1 - area / 224**2, rtol=0, atol=1e-7)
    assert stats.ks_2samp(area, (theirs[:, 1] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 2])).pvalue > 0.01
    assert stats.ks_2samp(top + bottom, theirs[:, 0] + theirs[:, 1]).pvalue > 0.01
    assert stats.ks_2samp(left + right, theirs[:, 2] + theirs[:, 3]).pvalue > 0.01
    assert abs(np.corrcoef(top + bottom, left + right)[0, 1]) < 5 / np.sqrt(MANY)
    assert np.array_equal(table[:, 1:], np.clip(np.round(table[:, 1:]), 0, 224))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mixup": 1.0, "cutmix": 1.0, "probability": 0.7, "switch_probability": 0.4}, (0.3, 0.42, 0.28)),
        ({"mixup": 1.0, "probability": 0.7, "switch_probability": 0.4}, (0.3, 0.7, 0.0)),
        ({"cutmix": 1.0, "probability": 0.7, "switch_probability": 0.4}, (0.3, 0.0, 0.7)),
        ({"mixup": 1.0, "cutmix": 1.0, "switch_probability": 0.0}, (0.0, 1.0, 0.0)),
        ({"mixup": 1.0, "cutmix": 1.0, "switch_probability": 1.0}, (0.0, 0.0, 1.0)),
    ],
    ids=["both", "mixup", "cutmix", "never switched", "always switched"],
)
def test_mixing_kinds_occur_with_their_probabilities(settings: dict[str, Any], expected: Sequence[float]) -> None:
    table = many_mixes(**settings)
    cut = table[:, 2] > table[:, 1]
    counts = np.array([(table[:, 0] == 1).sum(), ((table[:, 0] < 1) & ~cut).sum(), cut.sum()])
    possible = np.array(expected) > 0
    assert not counts[~possible].any()
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], MANY * np.array(expected)[possible]).pvalue > 0.01


def test_mix_draws_differ_between_seeds_and_epochs() -> None:
    mix = MixConfig(mixup=1.0)
    first = draw_mixes(mix, np.arange(MANY), 0, 0, SIZE)[:, 0]
    for seed, epoch in ((1, 0), (0, 1)):
        other = draw_mixes(mix, np.arange(MANY), seed, epoch, SIZE)[:, 0]
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(MANY)


# Against timm


class OurDraws:
    """Replaces numpy.random in timm's Mixup; drawn: float64 [N, 5], our uniform numbers in timm's order."""

    def __init__(self, drawn: np.ndarray, mix: MixConfig, per_batch: bool) -> None:
        columns = (0, 1) if per_batch else (1, 0)
        self._uniforms = iter([drawn[:, column] for column in columns])
        self._shares = drawn[:, 2]
        boxes = drawn[(drawn[:, 0] < mix.probability) & (drawn[:, 1] < mix.switch_probability)]
        self._centers = iter(boxes[:, 3:].reshape(-1))  # y and x, one box after another

    def rand(self, *shape: int) -> Any:
        values = next(self._uniforms)
        return values if shape else values[0]

    def beta(self, a: float, b: float, size: int | None = None) -> Any:
        values = stats.beta.ppf(self._shares, a, b)
        return values if size is not None else values[0]

    def randint(self, low: int, high: int, size: None = None) -> int:
        assert low == 0
        return int(next(self._centers) * high)


@MODES
def test_mixed_batches_match_timm_for_same_draws(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = MixConfig(**BOTH, probability=0.8, mode=mode)
    samples, kinds = 16, set()
    order = [*range(0, samples, 2), *range(samples - 1, 0, -2)]  # timm's pairs become ours
    for step in range(8):
        batch = random_batch(samples, seed=step)
        positions = step * samples + np.arange(samples)
        keys = {"batch": np.array([step]), "pair": positions[::2] // 2, "elem": positions[order]}[mode]
        ours = OurDraws(uniform(keys, SEED, EPOCH, "mix", 5), mix, per_batch=mode == "batch")
        for name in ("rand", "beta", "randint"):
            monkeypatch.setattr(np.random, name, getattr(ours, name))
        timms = Mixup(mix.mixup, mix.cutmix, prob=mix.probability, mode=mode, label_smoothing=0.1, num_classes=10)
        images, targets = timms(batch.images[order].float(), batch.labels[order])
        monkeypatch.undo()

        table = torch.from_numpy(mix_table(mix, SEED, EPOCH, step, samples, SIZE))
        torch.testing.assert_close(mix_images(batch.images, table)[order], images, rtol=0, atol=1e-3)
        share = table[order, :1]
        own = torch.nn.functional.one_hot(batch.labels[order], 10) * 0.9 + 0.01
        other = torch.nn.functional.one_hot(swap_pairs(batch.labels)[order], 10) * 0.9 + 0.01
        torch.testing.assert_close(share * own + (1 - share) * other, targets, rtol=0, atol=1e-6)
        kinds |= {"none" if row[0] == 1 else "cutmix" if row[2] > row[1] else "mixup" for row in table.tolist()}
    assert kinds == {"none", "cutmix", "mixup"}


# On the device


def test_share_of_one_keeps_pixels_and_channels_last() -> None:
    batch = random_batch(8)
    same = mix_images(batch.images, identity_mix(batch).mix)
    assert torch.equal(same, batch.images.float())
    table = torch.from_numpy(mix_table(MixConfig(**BOTH, mode="elem"), SEED, EPOCH, 0, 8, SIZE))
    for images in (same, mix_images(batch.images, table)):
        assert images.stride() == batch.images.stride()
        assert images.dtype == torch.float32


def test_cutmix_box_shows_neighbour_pixels_only_inside() -> None:
    batch = random_batch(4)
    table = torch.tensor([[0.5, 0, 32, 0, 16], [1, 0, 0, 0, 0], [1 - 6 / 1024, 30, 32, 29, 32], [0, 0, 32, 0, 32]])
    images = mix_images(batch.images, table)
    expected = batch.images.float().clone()
    expected[0, :, :, :16] = batch.images[1, :, :, :16]
    expected[2, :, 30:, 29:] = batch.images[3, :, 30:, 29:]
    expected[3] = batch.images[2]
    assert torch.equal(images, expected)


def test_rendered_batch_is_rounded_mix_with_both_names() -> None:
    images, labels = random_batch(4)
    labels[:] = torch.tensor([0, 1, 1, 0])
    table = torch.tensor([[0.7, 0, 0, 0, 0], [0.7, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1 / 3, 0, 32, 0, 16]])
    seen = render_batch(MixedBatch(images, labels, table))
    blend = 0.7 * images[0].double() + 0.3 * images[1].double()
    assert (seen.images[0].double() - blend).abs().max() <= 0.5 + 1e-4
    assert torch.equal(seen.images[2], images[2])
    names = image_grids.mix_captions(seen, ["cat", "dog"])
    assert names == ["cat 0.70 + dog 0.30", "dog 0.70 + cat 0.30", "dog", "cat 0.33 + dog 0.67"]
    plain = render_batch(Batch(images, labels))
    assert torch.equal(plain.images, images)
    assert image_grids.mix_captions(plain, ["cat", "dog"]) == ["cat", "dog", "dog", "cat"]


# Batches of the loader


def batches_of(data: Path, mix: MixConfig, updates: int, pieces: int = 1, world_size: int = 1) -> list[Any]:
    """Return the mixed global batches of 16 of the first steps, joined from micro-steps and ranks."""
    size = 16 // pieces // world_size
    ranks = [
        iter(loader_of(data, mix, size, rank=rank, world_size=world_size, accumulation_steps=pieces))
        for rank in range(world_size)
    ]
    found = []
    for _ in range(updates):
        parts = [mixed(next(rank)) for _ in range(pieces) for rank in ranks]
        found.append([torch.cat(part) for part in zip(*parts, strict=True)])
    for rank in ranks:
        rank.close()  # type: ignore[attr-defined]
    return found


@MODES
def test_mixing_is_independent_of_batch_split(mode: str, npy_data: Path) -> None:
    mix = MixConfig(**BOTH, mode=mode)
    whole = batches_of(npy_data, mix, updates=3)
    for cut in ({"world_size": 2}, {"pieces": 2}, {"pieces": 2, "world_size": 2}):
        for ours, expected in zip(batches_of(npy_data, mix, updates=3, **cut), whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    shares = [batch[3].tolist() for batch in whole]
    assert [len(set(batch)) for batch in shares] == [{"batch": 1, "pair": 8, "elem": 16}[mode]] * 3
    assert shares[0] != shares[1] != shares[2]


@MODES
def test_resumed_epoch_is_mixed_like_uninterrupted_one(mode: str, npy_data: Path) -> None:
    mix = MixConfig(**BOTH, mode=mode, off_epoch=2)
    loader = loader_of(npy_data, mix, 100)
    epochs = [[mixed(batch) for batch in loader] for _ in range(3)]
    for epoch in (1, 2):
        again = loader_of(npy_data, mix, 100)
        again.position = Position(epoch, 4)
        for ours, expected in zip(map(mixed, again), epochs[epoch][4:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert all((shares < 1).any() for epoch in epochs[:2] for *_, shares in epoch)
    assert all((shares == 1).all() for *_, shares in epochs[2])  # from off_epoch on
    assert not torch.equal(epochs[0][0][3], epochs[1][0][3])


@pytest.mark.parametrize(
    "settings", [{}, {"mixup": 1.0, "probability": 0.0}, {"cutmix": 1.0, "off_epoch": 0}, {"mode": "pair"}]
)
def test_batches_without_mixing_are_plain_with_any_size(settings: dict[str, Any], npy_data: Path) -> None:
    mix = MixConfig(**settings)
    assert not mixing_enabled(mix)
    assert type(next(iter(loader_of(npy_data, mix, batch_size=15)))) is Batch


def test_odd_batch_with_mixing_is_a_user_error(npy_data: Path) -> None:
    with pytest.raises(UserError, match=r"a batch of 15 samples .* cannot be mixed, since aug\.mix .*; use an even"):
        loader_of(npy_data, MixConfig(mixup=0.2), batch_size=15)
    staged = DataConfig(path="x", batch_size=16, stages=(StageConfig(epoch=0), StageConfig(epoch=1, batch_size=9)))
    with pytest.raises(UserError, match="a batch of 9 samples"):
        check_mixing(staged, MixConfig(cutmix=1.0))
    check_mixing(staged, MixConfig())
    check_mixing(DataConfig(path="x", batch_size=7, stages=(StageConfig(epoch=0, batch_size=8),)), MixConfig(cutmix=1))


def gradients(ranks: Ranks, data: Path, accumulation_steps: int) -> list[list[torch.Tensor]]:
    """Return LeNet's float64 gradients at the first steps of an epoch with mixing, global batch 16."""
    size = 16 // accumulation_steps // ranks.world_size
    loader = loader_of(
        data,
        MixConfig(**BOTH, mode="pair"),
        size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation_steps=accumulation_steps,
    )
    sgd = {"name": "sgd", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    training = make_state(lenet(classes=12).double(), sgd, mixes=True, accumulation_steps=accumulation_steps, lr=0.01)
    seen = record_gradients(training)
    batches = iter(loader)
    for step in range(3 * accumulation_steps):
        train_step(training, next(batches), optimizer_step=(step + 1) % accumulation_steps == 0)
    return seen


@pytest.mark.slow
def test_mixed_gradients_are_independent_of_ranks_and_accumulation(npy_data: Path) -> None:
    with alone():
        expected = gradients(Ranks(), npy_data, 1)
        cut = gradients(Ranks(), npy_data, 4)
    for found in (cut, *on_ranks(2, gradients, npy_data, 2)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Whole runs


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train on digits with mixup and CutMix for two epochs in this process; return the run's folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert convert.main(["digits", "--out", str(tmp_path / "digits"), "--workers", "1"]) == 0

    def call(name: str, *options: str) -> Path:
        fixed = [
            "train.epochs=2",
            "train.warmup_epochs=0",
            "aug.mix.mixup=0.2",
            "aug.mix.cutmix=1",
            f"name={name}",
            "aug.mix.mode=elem",
            "train.loss=bce",
            "train.bce_threshold=0.2",
            "train.label_smoothing=0.1",
            "train.save_every_steps=5",
            f"data.path={tmp_path / 'digits'}",
            f"output={tmp_path}",
        ]
        monkeypatch.setattr(sys, "argv", ["ddp.py", "--cfg", str(DIGITS), "--opts", *fixed, *options])
        ddp.main()
        return tmp_path / name

    return call


def last(folder: Path) -> dict[str, Any]:
    return store.load(folder / "last.pt")


STAGED = ("train.accumulation_steps=2", "data.stages=[{epoch: 1, image_size: 35, batch_size: 32}]")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "epoch"), [((), 0), (STAGED, 1)], ids=["plain", "in a stage with accumulation"])
def test_resumed_mixing_run_reaches_identical_weights(
    options: tuple[str, ...], epoch: int, run: Callable[..., Path]
) -> None:
    unbroken = run("unbroken", *options)
    with broken_after(lambda _, position: position["epoch"] == epoch and position["step"] >= 8):
        run("broken", *options)
    resumed = run("broken", *options, "--resume", "auto")
    expected, found = last(unbroken)["model"], last(resumed)["model"]
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    with pytest.raises(UserError, match=r'aug\.mix\.mode: .*train\.loss: "bce" then, "cross-entropy" now'):
        run("broken", "train.loss=cross-entropy", "train.bce_threshold=null", "aug.mix.mode=pair", "--resume", "auto")


def test_odd_batch_is_rejected_before_training(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a batch of 63 samples"):
        run("odd", "data.batch_size=63")
    assert not (tmp_path / "odd").exists()
