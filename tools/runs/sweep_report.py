"""Report on a sweep so far: write sweep.csv, curves.csv, sweep.json and two plots, and print a table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.load import split_overrides
from configs.schema import Config, settings_by_key
from configs.utils.console import terminal_width
from configs.utils.files import read_small_text
from tools.common import tables
from tools.common.tables import Row
from tools.runs.curve_plot import plot_curves
from tools.runs.records import (
    RunRecord,
    comparison_rows,
    curve_rows,
    differing_keys,
    format_setting,
    read_global_batch,
)
from tools.runs.sweep_plots import numbers_of, plot_values
from tools.runs.sweep_points import Point
from tools.runs.sweep_runner import run_folder
from train.reporting import figures
from train.reporting.metrics_file import read_metrics


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and the folder that contains them."""

    folder: Path
    points: list[Point]
    processes: int  # processes per run
    command: list[str]  # the command that trains one point, without settings
    opts: list[str]  # overrides for all points
    errors: dict[str, str] = field(default_factory=dict)  # one-line error of each failed run, by run name


def read_records(sweep: Sweep) -> list[RunRecord]:
    """Return the record of each point's run. If the run has no folder yet, its metrics are empty.

    If the global batch size of a run was not recorded, it is computed from the config.

    Raises:
        UserError: The metrics of a run cannot be read or are invalid.
    """
    records = []
    for point in sweep.points:
        folder, config = run_folder(point), point.config
        batch = config.data.batch_size * config.train.accumulation_steps * sweep.processes
        records.append(RunRecord(folder, config, read_metrics(folder), read_global_batch(folder) or batch))
    return records


def sweep_rows(sweep: Sweep, records: Sequence[RunRecord]) -> list[Row]:
    """Return a row per point with its status: finished, running or stopped, failed, or not started."""
    rows = comparison_rows(records, [point.name for point in sweep.points])
    for row, record in zip(rows, records, strict=True):
        del row["time_ratio"]  # a sweep has no reference run
        if row["run"] in sweep.errors:
            row["status"] = f"failed at epoch {record.epochs_trained} of {record.config.train.epochs}"
            row["error"] = sweep.errors[row["run"]]
        elif not record.folder.exists():
            row["status"] = "not started"
    return rows


def best_row(rows: Sequence[Row]) -> int | None:
    """Return the index of the finished run with the highest validation accuracy, or None if there is none."""
    finished = [n for n, row in enumerate(rows) if row["status"] == "finished" and row["best_val_top1"] is not None]
    return max(finished, key=lambda number: float(rows[number]["best_val_top1"]), default=None)


def write_tables(sweep: Sweep) -> list[Row]:
    """Write sweep.csv, curves.csv and sweep.json. Return the rows of sweep.csv."""
    records = read_records(sweep)
    rows = sweep_rows(sweep, records)
    tables.write_csv(sweep.folder / "sweep.csv", rows)
    tables.write_csv(sweep.folder / "curves.csv", curve_rows(records, [point.name for point in sweep.points]))
    runs = [{"settings": list(point.settings), **row} for point, row in zip(sweep.points, rows, strict=True)]
    best = best_row(rows)
    content = {"command": sweep.command, "opts": sweep.opts, "runs": runs, "best": None if best is None else runs[best]}
    tables.write_text(sweep.folder / "sweep.json", json.dumps(content, indent=2) + "\n")
    return rows


def runs_of_another_sweep(sweep: Sweep) -> list[str]:
    """Return the names of the runs in the folder's sweep.json that do not belong to this sweep."""
    points = {point.name for point in sweep.points}
    try:
        runs = json.loads(read_small_text(sweep.folder / "sweep.json"))["runs"]
        return [run["run"] for run in runs if run["run"] not in points]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # missing, or not written by a sweep
        return []


def write_report(sweep: Sweep) -> None:
    """Write tables and plots, and print the table and the names of the files.

    If there is a best run, also print its settings, the command that trains with them, and the hints of `edge_hints`.
    """
    rows = write_tables(sweep)
    plots = draw_plots(sweep, rows)
    print(tables.runs_table(rows, terminal_width(), always=("best_val_top1",)))
    if (best := best_row(rows)) is not None:
        point = sweep.points[best]
        opts = [f"{key}={value}" for key, value in split_overrides([*sweep.opts, *point.settings])]
        command = shlex.join([*sweep.command, *opts])
        print(f"best: {' '.join(point.settings) or point.name} (val top1 {rows[best]['best_val_top1']:.4f}): {command}")
        for hint in edge_hints([one.config for one in sweep.points], best):
            print(hint)
    print(f"{sweep.folder}: {', '.join(['sweep.csv', 'sweep.json', 'curves.csv', *plots])}", flush=True)


def edge_hints(configs: Sequence[Config], best: int) -> list[str]:
    """Return a hint for each numeric setting whose best value is the smallest or largest of at least three values.

    The hint suggests trying values beyond the best one. `best` is the index of the best run's config.
    """
    settings = [settings_by_key(config) for config in configs]
    hints = []
    for key in differing_keys(configs):
        values = sorted(set(numbers_of(settings, key)))
        if len(values) >= 3 and (value := settings[best][key]) in (values[0], values[-1]):
            which, others = ("smallest", "smaller") if value == values[0] else ("largest", "larger")
            hints.append(f"{key}={format_setting(value)} is the {which} that was tried; {others} ones may be better")
    return hints


def draw_plots(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """Draw sweep.png if any run has metrics, and sweep_values.png if the finished runs can be compared in one plot.

    Existing plots are removed first, since they belong to tables that have been replaced.

    Returns:
        The names of the plots that were drawn.
    """
    for name in ("sweep.png", "sweep_values.png"):
        (sweep.folder / name).unlink(missing_ok=True)
    records = read_records(sweep)
    started = [number for number, record in enumerate(records) if record.metrics]
    if not started:
        return []
    names = [sweep.points[number].label for number in started]
    title = f"{sweep.folder.name}: {len(started)} of {len(sweep.points)} runs"
    drawn = {"sweep.png": plot_curves([records[number] for number in started], names, title)}
    finished = [number for number in started if rows[number]["status"] == "finished"]
    points, results = [sweep.points[number] for number in finished], [rows[number] for number in finished]
    if (figure := plot_values(points, results, sweep.folder.name)) is not None:
        drawn["sweep_values.png"] = figure
    for name, figure in drawn.items():
        figures.save(figure, sweep.folder / name)
    return list(drawn)
