"""Parts of `tools/benchmark.py all` on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.schema import AugConfig
from tools.benchmarks.engine.datasets import limited_batch_size, make_variant
from tools.benchmarks.engine.measured_tables import TableSpec
from tools.benchmarks.suites.augmentations import augmentation_table
from tools.benchmarks.suites.datasets import load_config_on, medium_dataset, small_dataset
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP, loading_table
from tools.benchmarks.suites.progressive import stage_changes
from tools.benchmarks.suites.scale import scale_table
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.benchmarks.suites.training import training_table


def loaders_32(settings: Settings) -> Iterator[TableSpec]:
    return _loaders(settings, small_dataset(settings), PAD_CROP, 32)


def loaders_96(settings: Settings) -> Iterator[TableSpec]:
    return _loaders(settings, medium_dataset(settings), RESIZED_CROP, 64)


def _loaders(settings: Settings, raw: Path, aug: AugConfig, size: int) -> Iterator[TableSpec]:
    """Yield tables that compare our loader to the peers on raw pixels and JPEG, with and without augmentation."""
    jpeg = make_variant(raw, settings.data / f"{raw.name}-jpeg", encoding="jpeg", samples=settings.samples)
    for folder in (raw, jpeg):
        batch_size = limited_batch_size(folder, 512, batches=4)
        for augmentation in (None, aug):
            yield loading_table(settings, folder, augmentation, size=size, batch_size=batch_size, with_peers=True)


def lenet(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table that compares our training of LeNet to the peers'."""
    config = load_config_on("cifar10_lenet", small_dataset(settings))
    yield training_table(settings, "LeNet 32x32", config, {"end to end": {}}, with_peers=True)


def augmentations_32(settings: Settings) -> Iterator[TableSpec]:
    yield _augmentations(settings, small_dataset(settings))


def augmentations_96(settings: Settings) -> Iterator[TableSpec]:
    yield _augmentations(settings, medium_dataset(settings))


def _augmentations(settings: Settings, folder: Path) -> TableSpec:
    batch_size = limited_batch_size(folder, 512, batches=4)
    return augmentation_table(settings, folder, batch_size=batch_size, with_peer=True)


def cost_per_sample(settings: Settings) -> Iterator[TableSpec]:
    yield scale_table(settings.scratch, settings.seconds)


PARTS = (
    Part("32x32", ("reading", "loading"), loaders_32),
    Part("LeNet", ("training",), lenet),
    Part("96x96", ("reading", "loading"), loaders_96),
    Part("augmentations 32x32", ("augment",), augmentations_32),
    Part("augmentations 96x96", ("augment",), augmentations_96),
    Part("scale", ("scale",), cost_per_sample),
    Part("stages", ("stages",), stage_changes),
)
