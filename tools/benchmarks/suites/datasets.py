"""Data sets for `tools/benchmark.py all`, either supplied by the user or generated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from pipelines.convert.source import Encoding, Options
from pipelines.convert.writer import convert_source
from tools.benchmarks.engine.datasets import make_full_size, make_variant
from tools.benchmarks.engine.roofline import DISK_FILE_BYTES
from tools.benchmarks.suites.settings import Settings, check_time
from tools.sources.cifar import open_cifar
from tools.sources.digits import open_digits

ROOT = Path(__file__).parents[3]
# samples of generated data sets; on a GPU at least a dozen batches per epoch, in a few GiB on disk
SAMPLES = {"cpu": 4096, "cuda": 16_384}
FULL_SIZE_SAMPLES = 512
GENERATION_S = 20.0  # estimated maximum time to generate a data set
GIB = 2**30


def small_dataset(settings: Settings) -> Path:
    """Return the folder of a converted data set of 32x32 images. Write the data set if necessary.

    The data set is `settings.small` (by default data/cifar10) if that folder contains one. Otherwise the raw CIFAR-10
    in `settings.source` is converted or, if `settings.source` is None, scikit-learn's digits.

    Raises:
        UserError: Raw CIFAR-10 is needed but missing, unreadable, incomplete or damaged.
    """
    out = settings.data / ("digits" if settings.source is None else "cifar10")
    for folder in (settings.small or ROOT / "data" / "cifar10", out):
        if (folder / "dataset.json").is_file():
            return folder
    opened = open_digits() if settings.source is None else open_cifar("cifar10", settings.source)
    convert_source(opened, out, Options(Encoding("npy")), len(os.sched_getaffinity(0)), out.name)
    return out


def medium_dataset(settings: Settings) -> Path:
    """Return the folder of a converted data set of 96x96 images. Write the data set if necessary.

    The data set is `settings.medium` (by default data/medium-imagenet-96) if that folder contains one. Otherwise the
    images of `small_dataset` are enlarged, and repeated if there are too few.

    Raises:
        UserError: Raw CIFAR-10 is needed but missing, unreadable, incomplete or damaged.
    """
    given = settings.medium or ROOT / "data" / "medium-imagenet-96"
    if (given / "dataset.json").is_file():
        return given
    base, samples = small_dataset(settings), settings.samples or SAMPLES[settings.device]
    return make_variant(base, settings.data / f"{base.name}-96-{samples}", size=96, samples=samples)


def image_dataset(settings: Settings, side: int, encoding: str = "npy") -> Path:
    """Return the folder of a data set of `side` x `side` images for a part on a GPU. Generate it if necessary.

    Raises:
        TimeoutError: Too little time is left to generate the data set.
        UserError: Raw CIFAR-10 is needed but missing, unreadable, incomplete or damaged.
    """
    base = small_dataset(settings) if side == 32 else medium_dataset(settings)
    if (side, encoding) in ((32, "npy"), (96, "npy")):
        return base
    samples = settings.samples or SAMPLES["cuda"]
    out = settings.data / f"{base.name}-{side}-{encoding}-{samples}"
    if not (out / "dataset.json").is_file():
        check_time(settings, min(GENERATION_S, (settings.part_s or GENERATION_S) / 2))
    return make_variant(base, out, encoding=encoding, size=side, samples=samples)


def full_size_dataset(settings: Settings, size: tuple[int, int]) -> Path:
    """Return the folder of a JPEG data set of `size` (width, height) images, enlarged from `medium_dataset`.

    Raises:
        UserError: Raw CIFAR-10 is needed but missing, unreadable, incomplete or damaged.
    """
    base, samples = medium_dataset(settings), min(settings.samples or FULL_SIZE_SAMPLES, FULL_SIZE_SAMPLES)
    out = settings.data / f"{base.name}-{size[0]}x{size[1]}-{samples}"
    return make_full_size(base, out, size=size, samples=samples)


def load_config_on(name: str, folder: Path, **data: Any) -> Config:
    """Load one of the project's configs with data.path set to `folder`.

    `data` overrides other settings in config section `data`.
    """
    changes = {f"data.{key}": value for key, value in {"path": str(folder), **data}.items()}
    return load_config(ROOT / "configs" / f"{name}.yaml", **changes)


def check_free_space(folder: Path, needed_bytes: int, option: str) -> None:
    """Check that the disk has enough space for the data sets yet to be generated.

    Args:
        folder: Folder for generated data sets.
        needed_bytes: Total size of all data sets. The size of those already in the folder is subtracted.
        option: Command-line option that sets the folder, for the error message.

    Raises:
        UserError: The disk has too little free space.
    """
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    existing = [file for info in folder.glob("*/dataset.json") for file in info.parent.iterdir() if file.is_file()]
    needed_bytes = max(2 * DISK_FILE_BYTES, needed_bytes - sum(file.stat().st_size for file in existing))
    if free_bytes < needed_bytes:
        raise UserError(
            f"{folder} has {free_bytes / GIB:.1f} GiB free, but the benchmark's data sets need "
            f"{needed_bytes / GIB:.1f} GiB; name another folder with {option}"
        )
