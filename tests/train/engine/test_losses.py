"""Losses and counts of a step equal timm's losses, with and without mixing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from configs.schema import MixConfig, TrainConfig
from configs.utils.code import load_object
from configs.utils.errors import UserError
from helpers.training import lenet, random_batch
from pipelines.augment.mixup import mix_table
from pipelines.loader.batches import Batch, MixedBatch
from train.engine.losses import LossAndCounts, build_loss, mix_images, swap_pairs, with_class_weights

SAMPLES, CLASSES = 16, 10
SETTINGS = pytest.mark.parametrize("smoothing", [0.0, 0.1])


def mixed_batch(step: int = 0) -> MixedBatch:
    table = mix_table(MixConfig(mixup=1.0, cutmix=1.0, mode="elem", probability=0.9), 0, 0, step, SAMPLES, 32)
    return MixedBatch(*random_batch(SAMPLES, seed=step), torch.from_numpy(table))


def timm_targets(batch: MixedBatch, smoothing: float) -> torch.Tensor:
    """Return targets by timm's mixup_target, which pairs sample i with B - 1 - i: our pairs, for a batch of two."""
    rows = []
    for i in range(SAMPLES):
        pair = batch.labels[[i, i ^ 1]]
        rows.append(mixup_target(pair, CLASSES, float(batch.mix[i, 0]), smoothing)[0])
    return torch.stack(rows)


def assert_same_loss(loss: torch.Tensor, model: nn.Module, expected: torch.Tensor, reference: nn.Module) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(reference.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@SETTINGS
def test_mixed_cross_entropy_equals_timm_with_soft_targets(smoothing: float) -> None:
    batch, model, reference = mixed_batch(), lenet(), lenet()
    loss, _ = build_loss(TrainConfig(), mixes=True)(model, batch, smoothing)
    logits = reference(mix_images(batch.images, batch.mix))
    assert_same_loss(loss, model, SoftTargetCrossEntropy()(logits, timm_targets(batch, smoothing)), reference)


@SETTINGS
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_mixed_binary_cross_entropy_equals_timm(smoothing: float, threshold: float | None) -> None:
    batch, model, reference = mixed_batch(), lenet(), lenet()
    loss, _ = build_loss(TrainConfig(loss="bce", bce_threshold=threshold), mixes=True)(model, batch, smoothing)
    logits = reference(mix_images(batch.images, batch.mix))
    timms = BinaryCrossEntropy(target_threshold=threshold)
    assert_same_loss(loss, model, timms(logits, timm_targets(batch, smoothing)), reference)


@SETTINGS
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_cross_entropy_of_plain_labels_equals_timm(smoothing: float, threshold: float | None) -> None:
    batch, model, reference = random_batch(SAMPLES), lenet(), lenet()
    loss, counts = build_loss(TrainConfig(loss="bce", bce_threshold=threshold), mixes=False)(model, batch, smoothing)
    logits = reference(batch.images)
    assert_same_loss(loss, model, BinaryCrossEntropy(smoothing, threshold)(logits, batch.labels), reference)
    assert int(counts[1]) == int((logits.argmax(1) == batch.labels).sum())


@SETTINGS
@pytest.mark.parametrize("mixes", [False, True])
def test_class_weights_equal_torch_with_soft_targets(mixes: bool, smoothing: float) -> None:
    weights = torch.linspace(0, 3, CLASSES)
    batch, model, reference = mixed_batch() if mixes else random_batch(SAMPLES), lenet(), lenet()
    config = TrainConfig(class_weights=tuple(weights.tolist()))
    loss, counts = build_loss(config, mixes)(model, batch, smoothing)
    if isinstance(batch, MixedBatch):
        logits, targets = reference(mix_images(batch.images, batch.mix)), timm_targets(batch, smoothing)
        expected = F.cross_entropy(logits, targets, weights)
    else:
        logits = reference(batch.images)
        expected = F.cross_entropy(logits, batch.labels, weights, reduction="sum", label_smoothing=smoothing) / SAMPLES
    assert_same_loss(loss, model, expected, reference)
    assert counts.tolist()[0] == pytest.approx(SAMPLES * expected.item(), rel=1e-6)
    assert counts.tolist()[1:] == build_loss(TrainConfig(), mixes)(model, batch, smoothing)[1].tolist()[1:]


@SETTINGS
def test_class_weights_of_bce_scale_the_positive_terms(smoothing: float) -> None:
    weights = torch.linspace(0, 3, CLASSES)
    batch, model, reference = random_batch(SAMPLES), lenet(), lenet()
    config = TrainConfig(loss="bce", class_weights=tuple(weights.tolist()))
    loss, _ = build_loss(config, mixes=False)(model, batch, smoothing)
    probability = reference(batch.images).sigmoid()
    targets = F.one_hot(batch.labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES
    terms = -weights * targets * probability.log() - (1 - targets) * (1 - probability).log()
    assert_same_loss(loss, model, terms.mean(), reference)


def test_weighted_loss_of_a_batch_is_the_mean_over_its_halves() -> None:
    """A batch-wise division by the weights, as in torch, would make results depend on the number of ranks."""
    loss = build_loss(TrainConfig(class_weights=(0.1, *[1.0] * 8, 5.0)), mixes=False)
    batch, model = random_batch(SAMPLES), lenet()
    halves = [Batch(batch.images[part], batch.labels[part]) for part in (slice(8), slice(8, SAMPLES))]
    parts = torch.stack([loss(model, half, 0.1)[0] for half in halves])
    torch.testing.assert_close(parts.mean(), loss(model, batch, 0.1)[0])


def test_balanced_weights_equal_scikit_learn_and_spare_missing_classes() -> None:
    labels = np.repeat([0, 1, 3], [5, 20, 75])
    balanced = with_class_weights(TrainConfig(class_weights="balanced"), lambda: labels, 5).class_weights
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert balanced == pytest.approx((expected[0], expected[1], 1.0, expected[2], 1.0))
    for weights in (None, (1.0, 2.0)):
        config = TrainConfig(class_weights=weights)
        assert with_class_weights(config, lambda: pytest.fail("labels were read"), 2) is config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_weights": (1.0, -1.0)}, "one weight of at least 0 per class"),
        ({"class_weights": (0.0, 0.0)}, "one of them above 0"),
        ({"class_weights": ()}, "one of them above 0"),
        ({"class_weights": "equal"}, "balanced"),
        ({"class_weights": "balanced", "loss": "own.py:loss"}, "weight the classes in your own loss instead"),
    ],
)
def test_unusable_class_weights_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_bce_threshold_is_exclusive() -> None:
    images, labels = random_batch(2)
    labels[:] = torch.tensor([3, 4])
    batch = MixedBatch(images, labels, torch.tensor([[0.25, 0, 0, 0, 0]] * 2))
    model = lenet()
    loss, _ = build_loss(TrainConfig(loss="bce", bce_threshold=0.25), mixes=True)(model, batch, 0.0)
    targets = F.one_hot(torch.tensor([4, 3]), CLASSES).float()  # three quarters of the neighbour
    expected = F.binary_cross_entropy_with_logits(model(mix_images(images, batch.mix)), targets)
    torch.testing.assert_close(loss, expected)


@SETTINGS
def test_plain_cross_entropy_equals_torch_bitwise_and_timm_closely(smoothing: float) -> None:
    batch, model = random_batch(SAMPLES), lenet()
    loss, counts = build_loss(TrainConfig(), mixes=False)(model, batch, smoothing)
    logits = model(batch.images)
    assert torch.equal(loss, F.cross_entropy(logits, batch.labels, label_smoothing=smoothing))
    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(smoothing)(logits, batch.labels))
    hits = int((logits.argmax(1) == batch.labels).sum())
    assert counts.tolist() == [SAMPLES * loss.double().item(), hits, SAMPLES]


@pytest.mark.parametrize("settings", [{}, {"loss": "bce"}], ids=["cross-entropy", "bce"])
def test_prediction_counts_by_shares_of_its_labels(settings: dict[str, Any]) -> None:
    class Says(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.tensor([0, 0, 2, 0, 5, 5]), CLASSES).float()

    images, _ = random_batch(6)
    labels = torch.tensor([0, 1, 0, 2, 5, 5])
    mix = torch.zeros(6, 5)
    mix[:, 0] = torch.tensor([0.7, 0.6, 0.9, 1.0, 0.3, 0.3])
    _, counts = build_loss(TrainConfig(**settings), mixes=True)(Says(), MixedBatch(images, labels, mix), 0.0)
    assert counts[1].item() == pytest.approx(0.7 + 0.4 + 0.1 + 0.0 + 1.0 + 1.0)
    assert counts[2].item() == 6


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss": "bce", "bce_threshold": 0.2}], ids=["cross-entropy", "bce"])
def test_one_compiled_graph_serves_all_mixed_batches(settings: dict[str, Any]) -> None:
    loss = build_loss(TrainConfig(**settings), mixes=True)
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    model, kinds = lenet(), set()
    for step in range(3):
        batch = mixed_batch(step)
        for ours, theirs in zip(compiled(model, batch, 0.1), loss(model, batch, 0.1), strict=True):
            torch.testing.assert_close(ours, theirs)
        kinds |= set(np.sign(batch.mix.numpy()[:, 2]).tolist())
    assert kinds == {0.0, 1.0}  # with and without boxes
    assert counters["stats"]["unique_graphs"] == 1


def test_bf16_logits_are_widened_before_the_loss() -> None:
    batch, model = mixed_batch(), lenet()
    loss = build_loss(TrainConfig(loss="bce"), mixes=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(mix_images(batch.images, batch.mix))
        found, _ = loss(model, batch, 0.0)
    assert logits.dtype == torch.bfloat16
    expected = BinaryCrossEntropy()(logits.float(), timm_targets(batch, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_neighbours_of_each_pair_are_swapped() -> None:
    assert swap_pairs(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]
    assert isinstance(mixed_batch(), Batch)


OWN_LOSS = """
import torch
import torch.nn.functional as F

seen = []

def loss(logits, labels):
    seen.append((logits.detach(), labels))
    return 2 * F.cross_entropy(logits, labels)

def vector(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")

def number(logits, labels):
    return 1.0

def hits(logits, labels):
    return (logits.argmax(1) != labels).float().mean()

def wrong(logits, labels):
    return F.cross_entropy(logits + torch.zeros(3), labels)

def labels_only(logits, labels):
    return F.nll_loss(logits.log_softmax(1), labels)

class Doubled(torch.nn.Module):
    def forward(self, logits, labels):
        return 2 * F.cross_entropy(logits, labels)

class Scaled:
    def __init__(self, scale):
        self.scale = scale

class Silent:
    pass
"""


def own_loss(tmp_path: Path, name: str, mixes: bool = False, **settings: Any) -> LossAndCounts:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    return build_loss(TrainConfig(loss=f"{tmp_path / 'own.py'}:{name}", **settings), mixes)


def test_own_loss_gets_labels_and_counts_hits_like_cross_entropy(tmp_path: Path) -> None:
    model, reference, batch = lenet(), lenet(), random_batch(SAMPLES)
    loss, counts = own_loss(tmp_path, "loss")(model, batch, 0.0)
    expected, expected_counts = build_loss(TrainConfig(), False)(reference, batch, 0.0)
    assert_same_loss(loss, model, 2 * expected, reference)
    torch.testing.assert_close(counts, expected_counts * torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
    logits, labels = load_object(f"{tmp_path / 'own.py'}:loss", "train.loss").__globals__["seen"][-1]
    assert logits.dtype == torch.float32
    assert labels is batch.labels


@pytest.mark.parametrize(("mixes", "smoothing"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_own_loss_gets_mixed_and_smoothed_probabilities(tmp_path: Path, mixes: bool, smoothing: float) -> None:
    batch = mixed_batch() if mixes else random_batch(SAMPLES)
    settings = {"label_smoothing": smoothing}
    model, reference = lenet(), lenet()
    loss, _ = own_loss(tmp_path, "loss", mixes, **settings)(model, batch, smoothing)
    expected, _ = build_loss(TrainConfig(**settings), mixes)(reference, batch, smoothing)
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-6, atol=0)
    _, labels = load_object(f"{tmp_path / 'own.py'}:loss", "train.loss").__globals__["seen"][-1]
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels.sum(1), torch.ones(SAMPLES))


def test_own_loss_gets_float32_logits_with_autocast(tmp_path: Path) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own_loss(tmp_path, "loss")(lenet(), random_batch(SAMPLES), 0.0)
    logits, _ = load_object(f"{tmp_path / 'own.py'}:loss", "train.loss").__globals__["seen"][-1]
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("name", "found"), [("vector", r"\[16\] of torch\.float32"), ("number", "float")])
def test_own_loss_that_is_no_mean_is_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(
        UserError, match=rf"train\.loss=.*own\.py:{name} returns {found}, but must return the mean loss"
    ):
        own_loss(tmp_path, name)(lenet(), random_batch(SAMPLES), 0.0)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_own_loss_without_a_gradient_is_refused(tmp_path: Path, is_compiled: bool) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    options = {"compiled": compiled_eagerly} if is_compiled else {}
    loss = build_loss(TrainConfig(loss=f"{tmp_path / 'own.py'}:hits"), False, **options)
    with pytest.raises(UserError, match=r"own\.py:hits returns a loss without a gradient"):
        loss(lenet(), random_batch(SAMPLES), 0.0)


def compiled_eagerly(function: LossAndCounts) -> LossAndCounts:
    compiled: LossAndCounts = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    return compiled


def test_own_loss_may_be_a_module_class(tmp_path: Path) -> None:
    model, batch = lenet(), random_batch(SAMPLES)
    loss, _ = own_loss(tmp_path, "Doubled")(model, batch, 0.0)
    expected, _ = build_loss(TrainConfig(), False)(model, batch, 0.0)
    torch.testing.assert_close(loss, 2 * expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Scaled", "is a class, and calling it without arguments failed: TypeError: .*'scale'.*; give its arguments"),
        ("Silent", "is a class without __call__"),
    ],
)
def test_loss_class_that_cannot_be_called_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"train\.loss=.*own\.py:{name} {message}"):
        own_loss(tmp_path, name)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_failing_own_loss_is_named_with_its_line(tmp_path: Path, is_compiled: bool) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    line = 1 + OWN_LOSS[: OWN_LOSS.index("    return F.cross_entropy(logits + torch")].count("\n")
    options = {"compiled": compiled_eagerly} if is_compiled else {}
    loss = build_loss(TrainConfig(loss=f"{tmp_path / 'own.py'}:wrong"), False, **options)
    with pytest.raises(
        UserError, match=rf"own\.py:wrong failed: RuntimeError: The size .* \(.*own\.py, line {line}\)$"
    ):
        loss(lenet(), random_batch(SAMPLES), 0.0)


def test_own_loss_that_fails_on_probabilities_is_told_so(tmp_path: Path) -> None:
    loss = own_loss(tmp_path, "labels_only", label_smoothing=0.1)
    with pytest.raises(UserError, match=r"labels_only failed: .*; labels are probabilities \[B, C\] here because"):
        loss(lenet(), random_batch(SAMPLES), 0.1)


def test_failing_model_is_not_blamed_on_the_own_loss(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        own_loss(tmp_path, "loss")(nn.Linear(3, 10), random_batch(SAMPLES), 0.0)


def test_own_loss_can_be_compiled(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS.replace("    seen.append((logits.detach(), labels))\n", ""))
    config = TrainConfig(loss=f"{tmp_path / 'own.py'}:loss")
    function = build_loss(config, True)
    batch, model, reference = mixed_batch(), lenet(), lenet()
    compiled = build_loss(config, True, compiled=compiled_eagerly)
    loss, counts = compiled(model, batch, 0.0)
    expected, expected_counts = function(reference, batch, 0.0)
    torch.testing.assert_close(counts, expected_counts)
    assert_same_loss(loss, model, expected, reference)
