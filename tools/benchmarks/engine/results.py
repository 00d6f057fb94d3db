"""Tables and rows of a benchmark run with their bounds and ratios. They are written to a JSON file and read again."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median
from typing import Any, TypedDict

import torch

from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement
from train.reporting.run_info import device_name, processor_name


class Bound(TypedDict):
    """Upper bound on a rate."""

    name: str
    images_per_s: float


class Row(TypedDict, total=False):
    """Row of a table. Every row has `name`, `ours` and `error`.

    Rows of tables with `columns` have further fields, which are only shown.
    """

    name: str
    ours: bool  # True for rows of this project
    error: str | None  # text if the measurement failed
    note: str  # reason why a row that did not fail has no figures or incomplete figures
    device: str
    placement: str
    encoding: str
    batch_size: int
    kind: str  # of augmentation
    images_per_s: float  # median per-round rate
    lowest: float  # minimum per-round rate
    highest: float  # maximum per-round rate
    ratio: float  # in rows of peers, our rate divided by the peer's
    of_best_peer: float  # in our rows, the rate divided by that of the fastest peer
    best_peer: str  # name of that peer
    workers: int  # of a peer: worker processes or threads, the fastest number in `sweep`
    sweep: dict[str, float]  # images/s by number of workers, measured once before the rounds
    bound: Bound  # the tightest bound
    share: float  # rate divided by the bound
    binds: str  # what limits the rate
    of_resident: float  # in training, the rate divided by that of the resident batch
    of_plain: float  # rate with an augmentation divided by the rate without it
    training_gflop: float  # in training, per image
    value: float  # of a machine limit, in `unit`
    unit: str
    time_s_mean: float  # of the runs of a speedrun


class Entry(TypedDict, total=False):
    """Table of a run. Every table has a title, a stage and rows."""

    part: str
    title: str
    stage: str
    columns: tuple[str, ...]  # fields to show, or missing to show the columns of the stage
    note: str
    image_size: int
    encoding: str
    model: str
    rows: list[Row]


class Environment(TypedDict, total=False):
    """Machine and date of a run."""

    device: str
    processor: str
    cores: int
    gpu_memory_gib: int
    python: str
    date: str
    versions: dict[str, str]


FORMAT, VERSION = "model-zhu-benchmarks", 1
NOT_MEASURED = "not measured"  # start of the notes of rows without final figures
RUNNING = f"{NOT_MEASURED} to its end: the run was cut off"  # note of a row while its program runs
STOPPED = "stopped at the deadline"
BINDS_FROM = 0.6  # minimum share of a bound at which it is named as the limiting factor
PACKAGES = {  # packages whose versions are recorded
    "torch": "torch",
    "torchvision": "torchvision",
    "dali": "nvidia-dali-cuda120",
    "timm": "timm",
    "webdataset": "webdataset",
    "ffcv": "ffcv",
    "spdl": "spdl",
    "litdata": "litdata",
    "mosaicml-streaming": "mosaicml-streaming",
    "datasets": "datasets",
    "pillow": "pillow",
    "numba": "numba",
    "ours": "model-zhu",
}


def new_row(name: str, **fields: object) -> Row:
    """Return a row of this project without an error, unless `fields` say otherwise."""
    row: Any = {"name": name, "ours": True, "error": None, **fields}
    return row


def measurement_row(measurement: Measurement, **fields: object) -> Row:
    """Return the row of one workload, which is not a row of this project unless `fields` say otherwise.

    Running out of time is not an error. If time ran out before the first round, or if the details could not be fetched,
    the row has a note.
    """
    name = ", ".join(filter(None, (measurement.candidate, measurement.workload)))
    fields = {"ours": False, **fields, **measurement.details}
    if measurement.error not in (None, OUT_OF_TIME):
        return new_row(name, **fields, error=measurement.error)
    if not measurement.rates:
        return new_row(name, **fields, note=OUT_OF_TIME)
    reason = fields.pop("details_error", None)
    if reason is not None and measurement.error is None:  # at the deadline, `measure` ends the process
        fields["note"] = f"without details: {reason}"
    return new_row(name, **fields, **rate_fields(measurement.rates))


def rate_fields(rounds: list[float]) -> dict[str, float]:
    """Return row fields with the median, minimum and maximum per-round rate, in images/s."""
    rates = {"images_per_s": median(rounds), "lowest": min(rounds), "highest": max(rounds)}
    return {name: rounded(rate, 5) for name, rate in rates.items()}


def rounded(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits}g}")


def skipped_row(name: str, note: str = OUT_OF_TIME, **fields: object) -> Row:
    """Return a row without figures for something that was not measured and did not fail.

    `note` is the reason, such as a lack of time or a missing peer.
    """
    return new_row(name, note=note, **fields)


def is_measured(row: Row) -> bool:
    """Return True unless the row failed, was left out, or belongs to a running program."""
    return not row["error"] and not row.get("note", "").startswith(NOT_MEASURED)


def is_complete(row: Row) -> bool:
    """Return True unless the row failed, ran out of time, or belongs to a running program."""
    return not row["error"] and row.get("note") not in (OUT_OF_TIME, RUNNING, STOPPED)


def add_ratios(rows: list[Row]) -> None:
    """Set `ratio` in the rows of all peers, and `of_best_peer` and `best_peer` in our rows.

    `ratio` is our rate divided by the peer's, where our rate is that of the first of our rows that has one.
    """
    ours = next((row["images_per_s"] for row in rows if row["ours"] and "images_per_s" in row), None)
    for other in rows:
        if ours and not other["ours"] and "images_per_s" in other:
            other["ratio"] = rounded(ours / other["images_per_s"], 3)
    peers = [row for row in rows if not row["ours"] and "images_per_s" in row]
    best = max(peers, key=lambda row: row["images_per_s"], default=None)
    for row in rows:
        if best is not None and row["ours"] and "images_per_s" in row:
            row["of_best_peer"] = rounded(row["images_per_s"] / best["images_per_s"], 3)
            row["best_peer"] = best["name"]


def add_bound(row: Row, bounds: dict[str, float], otherwise: str) -> None:
    """Set `bound`, `share` and `binds` of a row from its tightest bound.

    Args:
        row: Row to modify. It is left unchanged if it has no rate or no bound is positive.
        bounds: Upper bounds on the rate in images/s, by name. Bounds of 0 are ignored.
        otherwise: Limiting factor to name if the share is below BINDS_FROM.
    """
    bounds = {name: rate for name, rate in bounds.items() if rate > 0}
    if "images_per_s" not in row or not bounds:
        return
    rate, name = min((rate, name) for name, rate in bounds.items())
    share = row["images_per_s"] / rate
    row["bound"] = {"name": name, "images_per_s": rounded(rate, 5)}
    row["share"] = rounded(share, 3)
    row["binds"] = name if share >= BINDS_FROM else otherwise


def environment() -> Environment:
    """Return the device, processor, number of cores, GPU memory, versions and today's date."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {name: _version(package) for name, package in PACKAGES.items()}
    found: Environment = {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "versions": {name: version for name, version in versions.items() if version},
    }
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        module = __import__(package) if package == "ffcv" and find_spec(package) is not None else None
        return getattr(module, "__version__", None)


def failure_lines(entries: list[Entry]) -> list[str]:
    """Return one line per failed row, with the table, the row and the error."""
    failures = [(entry, row) for entry in entries for row in entry["rows"] if row["error"]]
    return [f"{entry['title']}: {row['name']}: {row['error']}" for entry, row in failures]
