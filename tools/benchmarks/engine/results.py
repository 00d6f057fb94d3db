"""Rows of measurements, their bounds and ratios, and the tables made of them.

Rows are plain dicts, since they are written to a JSON file and read again. A row:
    name, ours (bool), device, placement, encoding, batch_size, error (None or a sentence), note (why there is no figure
    where nothing failed), on a GPU memory_gib and device_memory_gib,
    images_per_s (median), lowest, highest, ratio (ours / this, where it is a peer),
    bound {name, images_per_s}, share of it, binds; in training also of_resident, training_gflop per image, precision
"""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch

from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement
from train.reporting.run_info import device_name, processor_name

Row = dict[str, Any]
Entry = dict[str, Any]  # a table of a run: title, stage, rows and more
FORMAT, VERSION = "model-zhu-benchmarks", 1
RUNNING = "not measured to its end: the run was cut off"  # the note of a row while its program runs
STOPPED = "stopped at the deadline"
BINDS_FROM = 0.6  # share of a bound from which that bound is named as what binds
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "dali": "nvidia-dali-cuda120",
    "timm": "timm",
    "webdataset": "webdataset",
    "ffcv": "ffcv",
    "numba": "numba",
    "ours": "model-zhu",
}


def measurement_row(measurement: Measurement, *, ours: bool = False, **facts: Any) -> Row:
    """Return a row of the figures of one stream."""
    name = ", ".join(filter(None, (measurement.candidate, measurement.workload)))
    result: Row = {"name": name, "ours": ours, **facts, **measurement.details, "error": measurement.error}
    if measurement.error in (None, OUT_OF_TIME):
        result["error"] = None
        if measurement.rates:
            result |= rate_fields(measurement.rates)
        else:
            result["note"] = OUT_OF_TIME
    return result


def rate_fields(rounds: list[float]) -> Row:
    """Return the median, the lowest and the highest of the rounds, in images/s."""
    figures = (median(rounds), min(rounds), max(rounds))
    return dict(zip(("images_per_s", "lowest", "highest"), (float(f"{x:.5g}") for x in figures), strict=True))


def failed_row(name: str, error: str, **facts: Any) -> Row:
    return {"name": name, "ours": True, "error": error, **facts}


def skipped_row(name: str, note: str = OUT_OF_TIME, **facts: Any) -> Row:
    """Return a row without figures that is no failure, for lack of time or of a peer."""
    return {"name": name, "ours": True, "error": None, "note": note, **facts}


def is_measured(row: Row) -> bool:
    """Return whether the row has a figure and its program has ended."""
    return not row["error"] and row.get("note") not in (OUT_OF_TIME, RUNNING)


def is_complete(row: Row) -> bool:
    """Return whether a row was measured and not stopped at the deadline."""
    return is_measured(row) and row.get("note") != STOPPED


def error_text(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def add_ratios(rows: list[Row]) -> None:
    """Set the ratio, ours / this, of every row of a peer; `ours` is the first of our rows with a figure."""
    ours = next(
        (row["images_per_s"] for row in rows if row["ours"] and "images_per_s" in row),
        None,
    )
    for other in rows:
        if ours and not other["ours"] and "images_per_s" in other:
            other["ratio"] = float(f"{ours / other['images_per_s']:.3g}")


def add_bound(row: Row, bounds: dict[str, float], otherwise: str) -> None:
    """Set the tightest of `bounds` (images/s by name), its share reached, and what binds: it, or else `otherwise`."""
    bounds = {name: rate for name, rate in bounds.items() if rate > 0}
    if "images_per_s" not in row or not bounds:
        return
    name = min(bounds, key=lambda name: bounds[name])
    share = row["images_per_s"] / bounds[name]
    row["bound"] = {"name": name, "images_per_s": float(f"{bounds[name]:.5g}")}
    row["share"] = float(f"{share:.3g}")
    row["binds"] = name if share >= BINDS_FROM else otherwise


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the date of a run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {"device": device_name(device), "processor": processor_name()}
    facts["cores"] = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    facts |= {"python": platform.python_version(), "date": date.today().isoformat()}
    versions = {name: _version(package) for name, package in PACKAGES.items()}
    return facts | {"versions": {name: found for name, found in versions.items() if found}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        module = __import__(package) if package == "ffcv" and _importable(package) else None
        return getattr(module, "__version__", None)


def _importable(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def failure_lines(groups: list[dict[str, Any]]) -> list[str]:
    """Return a line for each failed row."""
    return [
        f"{group['title']}: {row['name']}: {row['error']}" for group in groups for row in group["rows"] if row["error"]
    ]
