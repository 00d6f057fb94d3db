"""Run the parts of the whole benchmark in order, each with its deadline. The parts for a GPU are in `gpu`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.load import load_config
from configs.schema import AugConfig, Config, StageConfig
from configs.utils.errors import UserError
from tools.benchmarks.engine import datasets, results, roofline
from tools.benchmarks.engine.datasets import batch_of
from tools.benchmarks.engine.interleaved import TIME_OVER, Contestant, apart, measure
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.suites import augmentations, progressive, scale, tables
from tools.benchmarks.suites.groups import Entry, Measurable, Whole, limit_rows, limits_in, loading, training
from tools.benchmarks.suites.record import Record
from train.distributed.process_group import Ranks
from train.engine.clock import RunTimer

ROOT = Path(__file__).parents[3]
PAD = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED = AugConfig(crop="random-resized", scale=(0.25, 1.0), flip=0.5)
LIMITS = "limits"
# of the larger sizes; on a GPU some dozen batches per epoch, and a few GiB on disk
SAMPLES = {"cpu": 4096, "cuda": 16_384}


@dataclass(frozen=True)
class Settings:
    """Settings of one whole run."""

    device: str  # cpu or cuda
    scratch: Path  # folder for the peers' files, removed at the end
    data: Path  # folder for the data sets that are made
    small: Path | None = None  # converted 32x32 data set
    medium: Path | None = None  # converted 96x96 data set
    source: Path | None = None  # raw CIFAR-10, where none is converted
    reference: Path | None = None  # checkout of cifar10-airbench
    seconds: float = 0.5
    rounds: int = 5
    workers: int = 1  # of the peers
    seeds: int = 10  # of each speedrun
    epochs: int | None = None  # of the runs to an accuracy; None: their config's
    samples: int | None = None  # of made data sets; None: the default of the device
    only: tuple[str, ...] = ()  # stages; empty: all
    deadline: float | None = None  # of the whole run or, within a part, of the part; of time.monotonic()
    part_s: float | None = None  # time limit of each part


@dataclass(frozen=True)
class Part:
    """Tables measured under one time limit, the most important first. stages: those of its tables."""

    name: str
    stages: tuple[str, ...]
    make: Callable[[Settings], Iterator[Measurable]]
    is_bounded: bool = True  # needs the limits of the machine


def choose(parts: Sequence[Part], names: Sequence[str], only: Sequence[str]) -> list[Part]:
    """Return the parts of these names (none: all) that have one of the stages `only` (none: any), in their order."""
    known = [part.name for part in parts]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--part {' '.join(unknown)} is not one of {', '.join(known)}")
    chosen = [
        part
        for part in parts
        if (not names or part.name in names) and (not only or any(stage in only for stage in part.stages))
    ]
    if not chosen:
        stages = sorted({stage for part in parts if not names or part.name in names for stage in part.stages})
        raise UserError(f"--only {' '.join(only)} leaves no part to measure; choose from {', '.join(stages)}")
    return chosen


def run_all(parts: Sequence[Part], settings: Settings, record: Record) -> None:
    """Measure the parts one after the other. A failure is recorded as a row with an error, and the run continues."""
    begin = time.monotonic() - RunTimer().command_s  # what comes before, as the limits, counts towards the first part
    for part in tqdm(parts, desc="parts", leave=False):
        ends = [settings.deadline, settings.part_s and begin + settings.part_s]
        within = replace(settings, deadline=min((end for end in ends if end is not None), default=None))
        found = measured_limits(within, record) if part.is_bounded else {}
        with record.part(part.name):
            if run_part(part, found, within, record.put):
                record.complete()
        begin = time.monotonic()


def measured_limits(settings: Settings, record: Record) -> Limits:
    """Return the limits of the machine from the record, or measure them.

    Those of the record are used where none is missing for time and the day and the versions are the same.
    """
    about, environment = record.run["parts"].get(LIMITS, {}), record.run["environment"]
    rows = [row for entry in record.run["groups"] if entry.get("part") == LIMITS for row in entry["rows"]]
    is_current = all(about.get(name) == environment[name] for name in ("date", "versions"))
    if limits_in(rows) and is_current and about["is_complete"]:
        return limits_in(rows)
    with record.part(LIMITS):
        contestant = Contestant("limits", roofline.limits, (settings.device, settings.data))
        outcomes = measure([contestant], settings.seconds, min(3, settings.rounds), settings.deadline)
        rows = limit_rows(outcomes)
        record.put({"title": "Limits of the machine", "stage": "limits", "rows": rows})
        if all(row.get("note") != TIME_OVER for row in rows):
            record.complete()
    return limits_in(rows)


def run_part(part: Part, found: Limits, settings: Settings, put: Callable[[Entry], None]) -> bool:
    """Measure a part's tables and print each. Return whether all were measured in time and without a failure.

    A table that cannot be made is recorded as a table with one failed row.
    """
    is_complete = True
    try:
        check_time(settings)
        for one in part.make(settings):
            if settings.only and one.stage not in settings.only:
                is_complete = False
                continue
            if is_over(settings):
                is_complete = False
                put(unmeasured(one.title, results.skipped(one.title)))
                continue
            entry = one.run(found, settings.seconds, settings.rounds, settings.deadline, put)
            put(entry)
            is_complete &= all(map(results.is_complete, entry["rows"]))
            tqdm.write(f"\n{tables.of_entry(entry)}")
            sys.stdout.flush()
    except TimeoutError:
        put(unmeasured(f"{part.name}, what remains", results.skipped(part.name)))
        return False
    except Exception as error:  # whatever it is, the other parts go on
        put(unmeasured(part.name, results.failed(part.name, results.sentence(error))))
        return False
    return is_complete


def is_over(settings: Settings, needed_s: float = 0.0) -> bool:
    return settings.deadline is not None and time.monotonic() + needed_s > settings.deadline


def check_time(settings: Settings, needed_s: float = 0.0) -> None:
    """Raise TimeoutError if less than `needed_s` is left until the deadline."""
    if is_over(settings, needed_s):
        raise TimeoutError(TIME_OVER)


def unmeasured(title: str, row: results.Row) -> Entry:
    """Return a table without figures, of one row."""
    return {"title": title, "stage": "failed", "rows": [row]}


def loaders_beside_peers(settings: Settings, given: Path, aug: AugConfig, size: int) -> Iterator[Measurable]:
    jpeg = datasets.remake(given, settings.data / f"{given.name}-jpeg", encoding="jpeg", samples=settings.samples)
    for folder in (given, jpeg):
        for augmentation in (None, aug):
            yield loading([folder], augmentation, size=size, batch_size=batch_of(folder, 512, batches=4),
                          device=settings.device, scratch=settings.scratch, workers=settings.workers)  # fmt: skip


def lenet_beside_peers(settings: Settings) -> Iterator[Measurable]:
    config = config_on("cifar10_lenet", small(settings))
    yield training("LeNet 32x32", config, {"end to end": {}}, device=settings.device, scratch=settings.scratch,
                   workers=settings.workers)  # fmt: skip


def augmented(settings: Settings, folder: Path) -> Iterator[Measurable]:
    yield augmentations.group(folder, batch_size=batch_of(folder, 512, batches=4), device=settings.device,
                              scratch=settings.scratch, workers=settings.workers)  # fmt: skip


def cost_per_sample(settings: Settings) -> Iterator[Measurable]:
    yield Whole(scale.title(), "scale", lambda: scale.group(settings.scratch, settings.seconds))


def changes(settings: Settings) -> Iterator[Measurable]:
    """Measure changes of the image size with ResNet-18 on a GPU, else with LeNet, which takes 32 to 35 pixels."""
    if settings.device == "cuda":
        folder = medium(settings)
        config = config_on("medium_imagenet_96_resnet18_progressive", folder, batch_size=batch_of(folder, 1024))
    else:
        stages = (StageConfig(epoch=0, image_size=32), StageConfig(epoch=1, image_size=35))
        config = config_on("cifar10_lenet", small(settings), stages=stages)
    yield Whole(
        progressive.title(config),
        "stages",
        lambda: apart(progressive.group, config, Ranks(), settings.rounds, deadline=settings.deadline),
    )


def small(settings: Settings) -> Path:
    """Return the 32x32 data set: the given one, data/cifar10, `source` converted, or scikit-learn's digits."""
    given = settings.small or ROOT / "data" / "cifar10"
    return datasets.small_set(given, settings.source, settings.data)


def medium(settings: Settings) -> Path:
    """Return the 96x96 data set; where none is converted, enlarge the small one."""
    given = settings.medium or ROOT / "data" / "medium-imagenet-96"
    if (given / "dataset.json").is_file():
        return given
    base, samples = small(settings), settings.samples or SAMPLES[settings.device]
    return datasets.remake(base, settings.data / f"{base.name}-96-{samples}", size=96, samples=samples)


def config_on(name: str, folder: Path, **data: Any) -> Config:
    """Load a config of the project with another data set."""
    changes = {f"data.{key}": value for key, value in {"path": str(folder), **data}.items()}
    return load_config(ROOT / "configs" / f"{name}.yaml", **changes)


READ_AND_AUGMENTED = ("reading", "loading")
# loading beside all peers at 32x32 and 96x96, raw and JPEG; training LeNet beside all peers
CPU_PARTS = (
    Part("32x32", READ_AND_AUGMENTED, lambda settings: loaders_beside_peers(settings, small(settings), PAD, 32)),
    Part("LeNet", ("training",), lenet_beside_peers),
    Part("96x96", READ_AND_AUGMENTED, lambda settings: loaders_beside_peers(settings, medium(settings), RESIZED, 64)),
    Part("augmentations 32x32", ("augment",), lambda settings: augmented(settings, small(settings))),
    Part("augmentations 96x96", ("augment",), lambda settings: augmented(settings, medium(settings))),
    Part("scale", ("scale",), cost_per_sample),
    Part("stages", ("stages",), changes),
)
