"""Parts of the whole run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.schema import AugConfig
from tools.benchmarks.engine.datasets import limited_batch_size, make_variant
from tools.benchmarks.engine.measured_tables import TableSpec, WholeTable
from tools.benchmarks.suites import augmentations, scale
from tools.benchmarks.suites.datasets import load_config_on, medium_dataset, small_dataset
from tools.benchmarks.suites.loading import PAD_CROP, RESIZED_CROP, loading
from tools.benchmarks.suites.progressive import stage_changes
from tools.benchmarks.suites.settings import Settings
from tools.benchmarks.suites.suite import Part
from tools.benchmarks.suites.training import training


def loaders_beside_peers(settings: Settings, given: Path, aug: AugConfig, size: int) -> Iterator[TableSpec]:
    jpeg = make_variant(given, settings.data / f"{given.name}-jpeg", encoding="jpeg", samples=settings.samples)
    for folder in (given, jpeg):
        for augmentation in (None, aug):
            yield loading(
                [folder],
                augmentation,
                size=size,
                batch_size=limited_batch_size(folder, 512, batches=4),
                device=settings.device,
                scratch=settings.scratch,
                workers=settings.workers,
            )


def lenet_beside_peers(settings: Settings) -> Iterator[TableSpec]:
    config = load_config_on("cifar10_lenet", small_dataset(settings))
    yield training(
        "LeNet 32x32",
        config,
        {"end to end": {}},
        device=settings.device,
        scratch=settings.scratch,
        workers=settings.workers,
    )


def augmented(settings: Settings, folder: Path) -> Iterator[TableSpec]:
    yield augmentations.augmentation_table(
        folder,
        batch_size=limited_batch_size(folder, 512, batches=4),
        device=settings.device,
        scratch=settings.scratch,
        workers=settings.workers,
    )


def cost_per_sample(settings: Settings) -> Iterator[TableSpec]:
    yield WholeTable(scale.title(), "scale", lambda: scale.measure_scale(settings.scratch, settings.seconds))


READ_AND_AUGMENTED = ("reading", "loading")


# loading beside all peers at 32x32 and 96x96, raw and JPEG; training LeNet beside all peers
PARTS = (
    Part(
        "32x32",
        READ_AND_AUGMENTED,
        lambda settings: loaders_beside_peers(settings, small_dataset(settings), PAD_CROP, 32),
    ),
    Part("LeNet", ("training",), lenet_beside_peers),
    Part(
        "96x96",
        READ_AND_AUGMENTED,
        lambda settings: loaders_beside_peers(settings, medium_dataset(settings), RESIZED_CROP, 64),
    ),
    Part("augmentations 32x32", ("augment",), lambda settings: augmented(settings, small_dataset(settings))),
    Part("augmentations 96x96", ("augment",), lambda settings: augmented(settings, medium_dataset(settings))),
    Part("scale", ("scale",), cost_per_sample),
    Part("stages", ("stages",), stage_changes),
)
