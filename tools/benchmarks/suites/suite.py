"""Run the parts of `tools/benchmark.py all` in order. Parts are defined in `cpu` and `gpu`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from configs.utils.console import above_bars, progress_bar
from configs.utils.errors import UserError
from tools.benchmarks.engine import markdown, results, roofline
from tools.benchmarks.engine.candidate import Candidate, error_text
from tools.benchmarks.engine.interleaved import OUT_OF_TIME, measure
from tools.benchmarks.engine.measured_tables import TableSpec
from tools.benchmarks.engine.results import Entry
from tools.benchmarks.engine.roofline import Limits, limit_rows, limits_from_rows
from tools.benchmarks.engine.run_file import RunFile
from tools.benchmarks.suites.settings import Settings, check_time, is_out_of_time
from train.engine.metrics import RunTimer

LIMITS = "limits"


@dataclass(frozen=True)
class Part:
    """Tables that share a time limit, most important first."""

    name: str
    stages: tuple[str, ...]  # of the tables
    tables: Callable[[Settings], Iterator[TableSpec]]
    needs_limits: bool = True  # whether the tables need the machine limits


def choose(parts: Sequence[Part], names: Sequence[str], only: Sequence[str]) -> list[Part]:
    """Return the selected parts, in the order of `parts`.

    Args:
        parts: All parts.
        names: Names of the parts to keep, or empty for all parts.
        only: Stages, or empty for all stages. Parts with none of these stages are left out.

    Raises:
        UserError: A name is unknown or no part is left.
    """
    known = [part.name for part in parts]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--part {' '.join(unknown)} is not one of {', '.join(known)}")
    named = [part for part in parts if not names or part.name in names]
    chosen = [part for part in named if not only or any(stage in only for stage in part.stages)]
    if not chosen:
        stages = sorted({stage for part in named for stage in part.stages})
        raise UserError(f"--only {' '.join(only)} leaves no part to measure; choose from {', '.join(stages)}")
    return chosen


def run_parts(parts: Sequence[Part], settings: Settings, file: RunFile) -> None:
    """Measure the parts in order and add their tables to the run file.

    Each part has its own deadline. If a part fails, a row with the error is added and the next part runs.
    """
    start = time.monotonic() - RunTimer().command_s  # start-up counts towards the first part
    for part in progress_bar(parts, desc="parts", unit="part"):
        deadlines = [settings.deadline, settings.part_s and start + settings.part_s]
        deadline = min((time_s for time_s in deadlines if time_s is not None), default=None)
        part_settings = replace(settings, deadline=deadline)
        limits = machine_limits(part_settings, file) if part.needs_limits else {}
        with file.part(part.name):
            if run_part(part, limits, part_settings, file.add):
                file.complete()
        start = time.monotonic()


def machine_limits(settings: Settings, file: RunFile) -> Limits:
    """Return the machine limits from the run file, or measure them and add them to the file.

    Limits in the file are used if they are complete and were measured on the same day with the same versions.
    """
    part, today = file.run.parts.get(LIMITS), file.run.environment
    if part and part["is_complete"] and (part["date"], part["versions"]) == (today["date"], today["versions"]):
        rows = [row for entry in file.run.groups if entry.get("part") == LIMITS for row in entry["rows"]]
        if limits := limits_from_rows(rows):
            return limits
    with file.part(LIMITS):
        entry = measure_limits(settings)
        file.add(entry)
        if all(row.get("note") != OUT_OF_TIME for row in entry["rows"]):
            file.complete()
    return limits_from_rows(entry["rows"])


def measure_limits(settings: Settings) -> Entry:
    """Measure the machine limits, and return their table. The disk is that of `settings.data`."""
    candidate = Candidate("limits", roofline.limit_workloads, (settings.device, settings.data))
    measurements = measure([candidate], settings.seconds, min(3, settings.rounds), settings.deadline)
    return {"title": "Limits of the machine", "stage": "limits", "rows": limit_rows(measurements)}


def run_part(part: Part, limits: Limits, settings: Settings, add: Callable[[Entry], None]) -> bool:
    """Measure and print the tables of a part, and pass them to `add`.

    If a table cannot be built, a one-row table with the error is added and the part ends. If there is no time for a
    table, a one-row table that says so is added.

    Returns:
        True if all tables of the part were measured in time and without a failure, and `settings.only` excluded none.
    """
    is_complete = True
    try:
        check_time(settings)
        for table in part.tables(settings):
            if settings.only and table.stage not in settings.only:
                is_complete = False
                continue
            if is_out_of_time(settings):
                is_complete = False
                add(one_row_table(table.title, results.skipped_row(table.title)))
                continue
            entry = table.run(limits, settings.seconds, settings.rounds, settings.deadline, add)
            add(entry)
            is_complete &= all(map(results.is_complete, entry["rows"]))
            with above_bars():
                print(f"\n{markdown.table_markdown(entry)}", flush=True)
    except TimeoutError:
        add(one_row_table(f"{part.name}, what remains", results.skipped_row(part.name)))
        return False
    except Exception as error:  # continue with the other parts
        add(one_row_table(part.name, results.new_row(part.name, error=error_text(error))))
        return False
    return is_complete


def one_row_table(title: str, row: results.Row) -> Entry:
    """Return a table that holds only `row`, for a table or part that failed or was skipped."""
    return {"title": title, "stage": "failed", "rows": [row]}
