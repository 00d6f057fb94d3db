"""Run the parts of the whole benchmark in order, each with its deadline. The parts for a GPU are in `gpu`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

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
    if limits_from_rows(rows) and is_current and about["is_complete"]:
        return limits_from_rows(rows)
    with record.part(LIMITS):
        candidate = Candidate("limits", roofline.limit_workloads, (settings.device, settings.data))
        measurements = measure([candidate], settings.seconds, min(3, settings.rounds), settings.deadline)
        rows = limit_rows(measurements)
        record.add({"title": "Limits of the machine", "stage": "limits", "rows": rows})
        if all(row.get("note") != OUT_OF_TIME for row in rows):
            record.complete()
    return limits_from_rows(rows)


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
            tqdm.write(f"\n{markdown.table_markdown(entry)}")
            sys.stdout.flush()
    except TimeoutError:
        put(one_row_table(f"{part.name}, what remains", results.skipped_row(part.name)))
        return False
    except Exception as error:  # whatever it is, the other parts go on
        put(one_row_table(part.name, results.failed_row(part.name, error_text(error))))
        return False
    return is_complete


def one_row_table(title: str, row: results.Row) -> Entry:
    """Return a table without figures, of one row."""
    return {"title": title, "stage": "failed", "rows": [row]}
