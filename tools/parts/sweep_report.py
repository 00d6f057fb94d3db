"""What a sweep found, for whatever part of it is done: the table, sweep.csv, sweep.json and two pictures."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import read_record
from configs.schema import Config
from tools.parts import tables
from tools.parts.overlay import overlay
from tools.parts.run_records import RunRecord, curve_rows, differing, flat, global_batch, show, table
from tools.parts.sweep_points import Point
from tools.parts.sweep_runs import folder_of
from tools.parts.tables import Row
from train import figures
from train.log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

LOG_FACTOR = 10  # values that span more are drawn on a log axis
LINES = 8  # up to so many lines in the picture over a setting's values


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep and where they lie."""

    folder: Path
    points: list[Point]
    processes: int  # of each run
    command: list[str]  # of train/ddp.py on one of them, without --opts
    opts: list[str]  # overrides of all of them
    errors: dict[str, str] = field(default_factory=dict)  # one line by the name of each run that failed


def records_of(sweep: Sweep) -> list[RunRecord]:
    """What there is of each point, also of those without a folder yet."""
    records = []
    for point in sweep.points:
        folder, config = folder_of(point), point.config
        batch = config.data.batch_size * config.train.accumulation_steps * sweep.processes
        records.append(RunRecord(folder, config, read_metrics(folder), global_batch(folder) or batch))
    return records


def rows_of(sweep: Sweep, records: Sequence[RunRecord]) -> list[Row]:
    """A row per point, whatever has become of it."""
    rows = table(records, [point.name for point in sweep.points])
    for row, record in zip(rows, records, strict=True):
        del row["time_ratio"]  # no point is the one to compare with
        if row["run"] in sweep.errors:
            row["status"] = f"failed at epoch {record.epochs_trained} of {record.config.train.epochs}"
            row["error"] = sweep.errors[row["run"]]
        elif not record.folder.exists():
            row["status"] = "not started"
    return rows


def best_of(rows: Sequence[Row]) -> int | None:
    """The number of the finished run with the highest validation accuracy."""
    finished = [n for n, row in enumerate(rows) if row["status"] == "finished" and row["best_val_top1"] is not None]
    return max(finished, key=lambda number: float(rows[number]["best_val_top1"]), default=None)


def write_tables(sweep: Sweep) -> list[Row]:
    """sweep.csv, curves.csv and sweep.json; returns the rows of the first."""
    records = records_of(sweep)
    rows = rows_of(sweep, records)
    tables.write_csv(sweep.folder / "sweep.csv", rows)
    tables.write_csv(sweep.folder / "curves.csv", curve_rows(records, [point.name for point in sweep.points]))
    runs = [{"settings": list(point.settings), **row} for point, row in zip(sweep.points, rows, strict=True)]
    best = best_of(rows)
    content = {"command": sweep.command, "opts": sweep.opts, "runs": runs, "best": None if best is None else runs[best]}
    tables.write_text(sweep.folder / "sweep.json", json.dumps(content, indent=2) + "\n")
    return rows


def replaced_runs(sweep: Sweep) -> list[str]:
    """The runs in the folder's sweep.json that are none of this sweep's: its tables and pictures lose them."""
    points = {point.name for point in sweep.points}
    try:
        runs = json.loads(read_record(sweep.folder / "sweep.json"))["runs"]
        return [run["run"] for run in runs if run["run"] not in points]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or a file of another program
        return []


def finish(sweep: Sweep) -> None:
    """Tables, pictures, and on the console the table and the setting to go on with."""
    rows = write_tables(sweep)
    pictures = draw(sweep, rows)
    print(tables.markdown(rows))
    if (best := best_of(rows)) is not None:
        point = sweep.points[best]
        opts = [*sweep.opts, *point.settings]
        command = shlex.join([*sweep.command, *(["--opts", *opts] if opts else [])])
        print(f"best: {' '.join(point.settings) or point.name} (val top1 {rows[best]['best_val_top1']:.4f}): {command}")
        for hint in beyond([one.config for one in sweep.points], best):
            print(hint)
    print(f"{sweep.folder}: {', '.join(['sweep.csv', 'sweep.json', 'curves.csv', *pictures])}", flush=True)


def beyond(configs: Sequence[Config], best: int) -> list[str]:
    """A sentence for each number whose best value is the smallest or the largest of at least three."""
    settings = [flat(config) for config in configs]
    hints = []
    for key in differing(configs):
        values = sorted({one[key] for one in settings if type(one[key]) in (int, float)})
        if len(values) >= 3 and (value := settings[best][key]) in (values[0], values[-1]):
            which, others = ("smallest", "smaller") if value == values[0] else ("largest", "larger")
            hints.append(f"{key}={show(value)} is the {which} that was tried; {others} ones may be better")
    return hints


def draw(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """The names of the pictures: sweep.png, and sweep_values.png where a number was varied. None is left of an earlier
    sweep, whose figures the tables beside it no longer hold."""
    for name in ("sweep.png", "sweep_values.png"):
        (sweep.folder / name).unlink(missing_ok=True)
    records = records_of(sweep)
    begun = [number for number, record in enumerate(records) if record.metrics]
    if not begun:
        return []
    names = [sweep.points[number].name for number in begun]
    title = f"{sweep.folder.name}: {len(begun)} of {len(sweep.points)} runs"
    figures.save(overlay([records[number] for number in begun], names, title), sweep.folder / "sweep.png")
    finished = [number for number in begun if rows[number]["status"] == "finished"]
    figure = values_figure(
        [records[number].config for number in finished], [rows[number] for number in finished], sweep.folder.name
    )
    if figure is None:
        return ["sweep.png"]
    figures.save(figure, sweep.folder / "sweep_values.png")
    return ["sweep.png", "sweep_values.png"]


def values_figure(configs: Sequence[Config], rows: Sequence[Row], title: str) -> Figure | None:
    """Best validation accuracy and training time over one or two numeric settings; None where none is varied."""
    settings = [flat(config) for config in configs]
    keys = differing(configs)
    numeric = [key for key in keys if all(type(one[key]) in (int, float) for one in settings)]
    if len(numeric) == 2 and len(keys) == 2:
        return _maps(numeric, settings, rows, title)
    if len(numeric) != 1:
        return None
    key, others = numeric[0], [key for key in keys if key not in numeric]
    lines: dict[str, list[tuple[Any, Row]]] = {}
    for one, row in zip(settings, rows, strict=True):
        lines.setdefault(", ".join(f"{other}={show(one[other])}" for other in others), []).append((one[key], row))
    if len(lines) > LINES:
        return None
    figure, axes = figures.new_figure(1, 2, size=(10, 4 + 0.22 * len(lines) * bool(others)))
    for axis, (quantity, label) in zip(axes, _MEASURES, strict=True):
        for name, points in lines.items():
            points.sort(key=lambda point: point[0])
            axis.plot([value for value, _ in points], [row[quantity] for _, row in points], marker="o", label=name)
        _set_value_axis(axis, [one[key] for one in settings])
        axis.set_xlabel(key)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, 1.08 * max(row["training_time_s"] for row in rows))
    if others:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", fontsize=9)
    figure.suptitle(title, parse_math=False)
    return figure


_MEASURES = (("best_val_top1", "best validation top-1 accuracy"), ("training_time_s", "training time in s"))


def _maps(keys: Sequence[str], settings: Sequence[dict[str, Any]], rows: Sequence[Row], title: str) -> Figure:
    """Both measures for each pair of values; a grid as a heat map, scattered points as points."""
    horizontal, vertical = (sorted({one[key] for one in settings}) for key in keys)
    is_grid = len(horizontal) * len(vertical) <= 2 * len(settings)
    size = (1.8 * len(horizontal) + 4, 0.5 * len(vertical) + 2) if is_grid else (0.0, 0.0)
    figure, axes = figures.new_figure(1, 2, size=(max(11.0, size[0]), max(4.5, size[1])))
    for axis, (quantity, label) in zip(axes, _MEASURES, strict=True):
        values = [row[quantity] for row in rows]
        shown: ScalarMappable
        colours: dict[str, Any] = {"cmap": "viridis" if quantity == "best_val_top1" else "Greys"}
        if is_grid:
            cells = [[math.nan] * len(horizontal) for _ in vertical]
            for one, value in zip(settings, values, strict=True):
                cells[vertical.index(one[keys[1]])][horizontal.index(one[keys[0]])] = value
            shown = axis.imshow(cells, origin="lower", aspect="auto", **colours)
            axis.set_xticks(range(len(horizontal)), map(show, horizontal))
            axis.set_yticks(range(len(vertical)), map(show, vertical))
            for row, column in ((r, c) for r in range(len(vertical)) for c in range(len(horizontal))):
                value = cells[row][column]
                text = "" if math.isnan(value) else f"{value:.4f}" if quantity == "best_val_top1" else f"{value:.3g}"
                box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.5}
                axis.text(column, row, text, ha="center", va="center", fontsize=8, bbox=box if text else None)
        else:
            places = [[one[key] for one in settings] for key in keys]
            shown = axis.scatter(places[0], places[1], s=70, c=values, edgecolors="0.3", linewidths=0.5, **colours)
            _set_value_axis(axis, places[0])
            if _spans_orders(places[1]):
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
        figure.colorbar(shown, ax=axis, label=label)
        axis.set_xlabel(keys[0])
        axis.set_ylabel(keys[1])
    figure.suptitle(title, parse_math=False)
    return figure


def _set_value_axis(axis: Axes, values: Sequence[float]) -> None:
    """The values that were tried as ticks, as long as they can be read."""
    tried = sorted(set(values))
    if _spans_orders(values):
        axis.set_xscale("log")
        axis.set_xticks([], minor=True)
    if len(tried) <= 8:
        axis.set_xticks(tried, map(show, tried))


def _spans_orders(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= LOG_FACTOR * min(values)
