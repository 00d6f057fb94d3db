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
from tools.benchmarks.engine.datasets import limited_batch_size
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Candidate, measure, run_in_subprocess
from tools.benchmarks.engine.roofline import Limits
from tools.benchmarks.engine.run_file import RunFile
from tools.benchmarks.suites import augmentations, progressive, scale, tables
from tools.benchmarks.suites.groups import Entry, TableSpec, WholeTable, limit_rows, limits_in, loading, training
from train.distributed.process_group import Ranks
from train.engine.clock import RunTimer

ROOT = Path(__file__).parents[3]
PAD_CROP = AugConfig(crop="pad", padding=4, flip=0.5)
RESIZED_CROP = AugConfig(crop="random-resized", scale=(0.25, 1.0), flip=0.5)
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
    tables: Callable[[Settings], Iterator[TableSpec]]
    needs_limits: bool = True  # needs the limits of the machine


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


def run_parts(parts: Sequence[Part], settings: Settings, record: RunFile) -> None:
    """Measure the parts one after the other. A failure is recorded as a row with an error, and the run continues."""
    begin = time.monotonic() - RunTimer().command_s  # what comes before, as the limits, counts towards the first part
    for part in tqdm(parts, desc="parts", leave=False):
        ends = [settings.deadline, settings.part_s and begin + settings.part_s]
        within = replace(settings, deadline=min((end for end in ends if end is not None), default=None))
        found = machine_limits(within, record) if part.needs_limits else {}
        with record.part(part.name):
            if run_part(part, found, within, record.add):
                record.complete()
        begin = time.monotonic()


def machine_limits(settings: Settings, record: RunFile) -> Limits:
    """Return the limits of the machine from the record, or measure them.

    Those of the record are used where none is missing for time and the day and the versions are the same.
    """
    about, environment = record.run["parts"].get(LIMITS, {}), record.run["environment"]
    rows = [row for entry in record.run["groups"] if entry.get("part") == LIMITS for row in entry["rows"]]
    is_current = all(about.get(name) == environment[name] for name in ("date", "versions"))
    if limits_in(rows) and is_current and about["is_complete"]:
        return limits_in(rows)
    with record.part(LIMITS):
        candidate = Candidate("limits", roofline.limit_workloads, (settings.device, settings.data))
        measurements = measure([candidate], settings.seconds, min(3, settings.rounds), settings.deadline)
        rows = limit_rows(measurements)
        record.add({"title": "Limits of the machine", "stage": "limits", "rows": rows})
        if all(row.get("note") != OUT_OF_TIME for row in rows):
            record.complete()
    return limits_in(rows)


def run_part(part: Part, found: Limits, settings: Settings, put: Callable[[Entry], None]) -> bool:
    """Measure a part's tables and print each. Return whether all were measured in time and without a failure.

    A table that cannot be made is recorded as a table with one failed row.
    """
    is_complete = True
    try:
        check_time(settings)
        for one in part.tables(settings):
            if settings.only and one.stage not in settings.only:
                is_complete = False
                continue
            if is_out_of_time(settings):
                is_complete = False
                put(one_row_table(one.title, results.skipped_row(one.title)))
                continue
            entry = one.run(found, settings.seconds, settings.rounds, settings.deadline, put)
            put(entry)
            is_complete &= all(map(results.is_complete, entry["rows"]))
            tqdm.write(f"\n{tables.table_markdown(entry)}")
            sys.stdout.flush()
    except TimeoutError:
        put(one_row_table(f"{part.name}, what remains", results.skipped_row(part.name)))
        return False
    except Exception as error:  # whatever it is, the other parts go on
        put(one_row_table(part.name, results.failed_row(part.name, results.error_text(error))))
        return False
    return is_complete


def is_out_of_time(settings: Settings, needed_s: float = 0.0) -> bool:
    return settings.deadline is not None and time.monotonic() + needed_s > settings.deadline


def check_time(settings: Settings, needed_s: float = 0.0) -> None:
    """Raise TimeoutError if less than `needed_s` is left until the deadline."""
    if is_out_of_time(settings, needed_s):
        raise TimeoutError(OUT_OF_TIME)


def one_row_table(title: str, row: results.Row) -> Entry:
    """Return a table without figures, of one row."""
    return {"title": title, "stage": "failed", "rows": [row]}


def loaders_beside_peers(settings: Settings, given: Path, aug: AugConfig, size: int) -> Iterator[TableSpec]:
    jpeg = datasets.make_variant(given, settings.data / f"{given.name}-jpeg", encoding="jpeg", samples=settings.samples)
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


def stage_changes(settings: Settings) -> Iterator[TableSpec]:
    """Measure changes of the image size with ResNet-18 on a GPU, else with LeNet, which takes 32 to 35 pixels."""
    if settings.device == "cuda":
        folder = medium_dataset(settings)
        config = load_config_on(
            "medium_imagenet_96_resnet18_progressive", folder, batch_size=limited_batch_size(folder, 1024)
        )
    else:
        stages = (StageConfig(epoch=0, image_size=32), StageConfig(epoch=1, image_size=35))
        config = load_config_on("cifar10_lenet", small_dataset(settings), stages=stages)
    yield WholeTable(
        progressive.title(config),
        "stages",
        lambda: run_in_subprocess(
            progressive.measure_stage_changes, config, Ranks(), settings.rounds, deadline=settings.deadline
        ),
    )


def small_dataset(settings: Settings) -> Path:
    """Return the 32x32 data set: the given one, data/cifar10, `source` converted, or scikit-learn's digits."""
    given = settings.small or ROOT / "data" / "cifar10"
    return datasets.small_dataset(given, settings.source, settings.data)


def medium_dataset(settings: Settings) -> Path:
    """Return the 96x96 data set; where none is converted, enlarge the small one."""
    given = settings.medium or ROOT / "data" / "medium-imagenet-96"
    if (given / "dataset.json").is_file():
        return given
    base, samples = small_dataset(settings), settings.samples or SAMPLES[settings.device]
    return datasets.make_variant(base, settings.data / f"{base.name}-96-{samples}", size=96, samples=samples)


def load_config_on(name: str, folder: Path, **data: Any) -> Config:
    """Load a config of the project with another data set."""
    changes = {f"data.{key}": value for key, value in {"path": str(folder), **data}.items()}
    return load_config(ROOT / "configs" / f"{name}.yaml", **changes)


READ_AND_AUGMENTED = ("reading", "loading")
# loading beside all peers at 32x32 and 96x96, raw and JPEG; training LeNet beside all peers
CPU_PARTS = (
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
