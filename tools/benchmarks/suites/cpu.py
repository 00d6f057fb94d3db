"""Parts of `tools/benchmark.py all` on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from configs.schema import AugConfig, EvalConfig
from tools.benchmarks.engine.datasets import limited_batch_size, make_variant
from tools.benchmarks.engine.measured_tables import TableSpec
from tools.benchmarks.suites.augmentations import augmentation_table
from tools.benchmarks.suites.datasets import full_size_dataset, load_config_on, medium_dataset, small_dataset
from tools.benchmarks.suites.loading import IMAGENET_CROP, PAD_CROP, RESIZED_CROP, loading_table
from tools.benchmarks.suites.progressive import stage_changes
from tools.benchmarks.suites.scale import scale_table
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.benchmarks.suites.training import training_table

FULL_SIZES = {(500, 375): 64, (1000, 750): 32}  # batch sizes, small since slow peers are warmed up with whole batches


def loaders(dataset: Callable[[Settings], Path], aug: AugConfig, size: int, settings: Settings) -> Iterator[TableSpec]:
    """Yield tables that compare our loader to the peers on raw pixels and JPEG, with and without augmentation."""
    raw = dataset(settings)
    jpeg = make_variant(raw, settings.data / f"{raw.name}-jpeg", encoding="jpeg", samples=settings.samples)
    for folder in (raw, jpeg):
        batch_size = limited_batch_size(folder, 512, batches=4)
        for augmentation in (None, aug):
            yield loading_table(settings, folder, augmentation, size=size, batch_size=batch_size, with_peers=True)


def full_size(settings: Settings) -> Iterator[TableSpec]:
    """Yield tables that compare our loader to the peers on JPEG of 500x375 and 1000x750 pixels, cropped to 224."""
    for size, batch in FULL_SIZES.items():
        folder = full_size_dataset(settings, size)
        batch_size = limited_batch_size(folder, batch, batches=4)
        build = partial(loading_table, settings, folder, size=224, batch_size=batch_size, with_peers=True)
        yield build(IMAGENET_CROP)
        if size == (500, 375):
            yield build(None, evaluation=EvalConfig(crop_fraction=0.875))


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
    Part("full size", ("loading",), full_size),
    Part("augmentations 32x32", ("augment",), partial(augmentations, small_dataset)),
    Part("augmentations 96x96", ("augment",), partial(augmentations, medium_dataset)),
    Part("scale", ("scale",), cost_per_sample),
    Part("stages", ("stages",), stage_changes),
)
