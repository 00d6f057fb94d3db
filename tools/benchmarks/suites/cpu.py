"""Parts of `tools/benchmark.py all` on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
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


def loaders(dataset: Callable[[Settings], Path], aug: AugConfig, size: int, settings: Settings) -> Iterator[TableSpec]:
    """Yield tables that compare our loader to the peers on raw pixels and JPEG, with and without augmentation."""
    raw = dataset(settings)
    jpeg = make_variant(raw, settings.data / f"{raw.name}-jpeg", encoding="jpeg", samples=settings.samples)
    for folder in (raw, jpeg):
        batch_size = limited_batch_size(folder, 512, batches=4)
        for augmentation in (None, aug):
            yield loading_table(settings, folder, augmentation, size=size, batch_size=batch_size, with_peers=True)


def lenet(settings: Settings) -> Iterator[TableSpec]:
    """Yield a table that compares our training of LeNet to the peers'."""
    config = load_config_on("cifar10_lenet", small_dataset(settings))
    yield training_table(settings, "LeNet 32x32", config, {"end to end": {}}, with_peers=True)


def augmentations(dataset: Callable[[Settings], Path], settings: Settings) -> Iterator[TableSpec]:
    folder = dataset(settings)
    yield augmentation_table(settings, folder, batch_size=limited_batch_size(folder, 512, batches=4), with_peer=True)


def cost_per_sample(settings: Settings) -> Iterator[TableSpec]:
    yield scale_table(settings.scratch, settings.seconds)


PARTS = (
    Part("32x32", ("reading", "loading"), partial(loaders, small_dataset, PAD_CROP, 32)),
    Part("LeNet", ("training",), lenet),
    Part("96x96", ("reading", "loading"), partial(loaders, medium_dataset, RESIZED_CROP, 64)),
    Part("augmentations 32x32", ("augment",), partial(augmentations, small_dataset)),
    Part("augmentations 96x96", ("augment",), partial(augmentations, medium_dataset)),
    Part("scale", ("scale",), cost_per_sample),
    Part("stages", ("stages",), stage_changes),
)
