"""Rows of measurements with their bounds and ratios.

Rows are plain dicts that are written to a JSON file and read again. Their fields:
    name
    ours: True for rows of this project
    device, placement, encoding, batch_size
    error: text if the measurement failed, or None
    note: reason why a row that did not fail has no figures or incomplete figures
    images_per_s, lowest, highest: median, minimum and maximum per-round rate
    ratio: in rows of peers, our rate divided by the peer's
    bound: {name, images_per_s} of the tightest bound
    share: rate divided by the bound
    binds: what limits the rate
    memory_gib, device_memory_gib: on a GPU; see `train.engine.metrics.memory_usage`
    of_resident: in training, the rate divided by that of the resident batch
    training_gflop, precision: in training, GFLOP per image and dtype
"""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from tools.benchmarks.engine.interleaved import OUT_OF_TIME, Measurement
from train.reporting.run_info import device_name, processor_name

Row = dict[str, Any]
Entry = dict[str, Any]  # table of a run: title, stage, rows and additional fields
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
    "numba": "numba",
    "ours": "model-zhu",
}


def measurement_row(measurement: Measurement, *, ours: bool = False, **fields: Any) -> Row:
    """Return the row of one workload.

    Running out of time is not an error. If time ran out before the first round, or if the details could not be fetched,
    the row has a note.
    """
    name = ", ".join(filter(None, (measurement.candidate, measurement.workload)))
    result: Row = {"name": name, "ours": ours, **fields, **measurement.details, "error": measurement.error}
    if measurement.error in (None, OUT_OF_TIME):
        result["error"] = None
        if measurement.rates:
            result |= rate_fields(measurement.rates)
            reason = result.pop("details_error", None)
            if reason is not None and measurement.error is None:  # at the deadline, `measure` ends the process
                result["note"] = f"without details: {reason}"
        else:
            result["note"] = OUT_OF_TIME
    return result


def rate_fields(rounds: list[float]) -> Row:
    """Return row fields with the median, minimum and maximum per-round rate, in images/s."""
    rates = {"images_per_s": median(rounds), "lowest": min(rounds), "highest": max(rounds)}
    return {name: float(f"{rate:.5g}") for name, rate in rates.items()}


def failed_row(name: str, error: str, **fields: Any) -> Row:
    return {"name": name, "ours": True, "error": error, **fields}


def skipped_row(name: str, note: str = OUT_OF_TIME, **fields: Any) -> Row:
    """Return a row without figures for something that was not measured and did not fail.

    `note` is the reason, such as a lack of time or a missing peer.
    """
    return {"name": name, "ours": True, "error": None, "note": note, **fields}


def is_measured(row: Row) -> bool:
    """Return True unless the row failed, was left out, or belongs to a running program."""
    return not row["error"] and not row.get("note", "").startswith(NOT_MEASURED)


def is_complete(row: Row) -> bool:
    """Return True unless the row failed, ran out of time, or belongs to a running program."""
    return not row["error"] and row.get("note") not in (OUT_OF_TIME, RUNNING, STOPPED)


def add_ratios(rows: list[Row]) -> None:
    """Set `ratio` in the rows of all peers to our rate divided by the peer's.

    Our rate is taken from the first of our rows that has a rate.
    """
    ours = next((row["images_per_s"] for row in rows if row["ours"] and "images_per_s" in row), None)
    for other in rows:
        if ours and not other["ours"] and "images_per_s" in other:
            other["ratio"] = float(f"{ours / other['images_per_s']:.3g}")


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
    name = min(bounds, key=lambda name: bounds[name])
    share = row["images_per_s"] / bounds[name]
    row["bound"] = {"name": name, "images_per_s": float(f"{bounds[name]:.5g}")}
    row["share"] = float(f"{share:.3g}")
    row["binds"] = name if share >= BINDS_FROM else otherwise


def environment() -> dict[str, Any]:
    """Return the device, processor, number of cores, GPU memory, versions and today's date."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"device": device_name(device), "processor": processor_name()}
    result["cores"] = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        result["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30)
    result |= {"python": platform.python_version(), "date": date.today().isoformat()}
    versions = {name: _version(package) for name, package in PACKAGES.items()}
    return result | {"versions": {name: found for name, found in versions.items() if found}}


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
