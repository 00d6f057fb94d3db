"""Data sets of a whole run: given ones, or others made from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import Config
from configs.utils.errors import UserError
from pipelines.convert.encode import Encoding
from pipelines.convert.source import Options
from pipelines.convert.writer import write_dataset
from tools.benchmarks.engine.datasets import make_variant
from tools.benchmarks.engine.roofline import DISK_FILE_BYTES
from tools.benchmarks.suites.settings import Settings, check_time
from tools.sources.digits import open_digits

ROOT = Path(__file__).parents[3]


# of the larger sizes; on a GPU some dozen batches per epoch, and a few GiB on disk
SAMPLES = {"cpu": 4096, "cuda": 16_384}


def small_dataset(settings: Settings) -> Path:
    """Return the 32x32 data set: the given one, data/cifar10, `source` converted, or scikit-learn's digits."""
    given = settings.small or ROOT / "data" / "cifar10"
    return _small_dataset(given, settings.source, settings.data)


def medium_dataset(settings: Settings) -> Path:
    """Return the 96x96 data set; where none is converted, enlarge the small one."""
    given = settings.medium or ROOT / "data" / "medium-imagenet-96"
    if (given / "dataset.json").is_file():
        return given
    base, samples = small_dataset(settings), settings.samples or SAMPLES[settings.device]
    return make_variant(base, settings.data / f"{base.name}-96-{samples}", size=96, samples=samples)


def load_config_on(name: str, folder: Path, **data: Any) -> Config:
    """Load a config of the project with another data set."""
    changes = {f"data.{key}": value for key, value in {"path": str(folder), **data}.items()}
    return load_config(ROOT / "configs" / f"{name}.yaml", **changes)


MAKING_S = 20.0  # that a data set takes at most


def image_dataset(settings: Settings, side: int, encoding: str = "npy") -> Path:
    """Return a data set of this size and encoding; make it from the small or the medium set unless it exists."""
    if (side, encoding) == (32, "npy"):
        return small_dataset(settings)
    base = small_dataset(settings) if side == 32 else medium_dataset(settings)
    if (side, encoding) == (96, "npy"):
        return base
    samples = settings.samples or SAMPLES["cuda"]
    out = settings.data / f"{base.name}-{side}-{encoding}-{samples}"
    if not (out / "dataset.json").is_file():
        check_time(settings, min(MAKING_S, (settings.part_s or MAKING_S) / 2))
    return make_variant(base, out, encoding=encoding, size=side, samples=samples)


def _small_dataset(given: Path | None, source: Path | None, scratch: Path) -> Path:
    """32x32 images: CIFAR-10 as converted, else converted from `source`, once, else scikit-learn's digits."""
    if given is not None and (given / "dataset.json").is_file():
        return given
    out = scratch / ("digits" if source is None else "cifar10")
    if (out / "dataset.json").is_file():
        return out
    if source is not None:
        from tools.sources.cifar import open_cifar

        opened = open_cifar("cifar10", source)
    else:
        opened = open_digits()
    write_dataset(opened, out, Options(Encoding("npy")), len(os.sched_getaffinity(0)), out.name)
    return out


def check_free_space(folder: Path, needed: int, option: str) -> None:
    """Raise UserError if the disk has no room for the data sets that are still to be made.

    needed: bytes of all data sets; those that the folder has already are subtracted. option: the one that names it.
    """
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    made = [file for about in folder.glob("*/dataset.json") for file in about.parent.iterdir() if file.is_file()]
    needed = max(2 * DISK_FILE_BYTES, needed - sum(file.stat().st_size for file in made))
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free where the benchmark's data sets need {needed / 2**30:.1f}; "
            f"name another folder with {option}"
        )
