"""Tables measured from candidates that take turns, or by a generator of rows.

The method `run` measures a table and returns it. An InterleavedTable runs `rounds` rounds of about `seconds` seconds
each. Only the first may start after `deadline`, a time.monotonic() value. A RowTable ignores these arguments.
InterleavedTable calls `keep` with the unfinished table after each round, and RowTable after each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tools.benchmarks.engine.candidate import Candidate, error_text
from tools.benchmarks.engine.interleaved import Measurement, measure
from tools.benchmarks.engine.results import Entry, Row, measurement_row, new_row, skipped_row
from tools.benchmarks.engine.roofline import Limits

Keep = Callable[[Entry], object]


def _discard(entry: Entry) -> None:
    pass


@dataclass
class RowTable:
    """Table whose rows are measured one by one. A row replaces an earlier row of the same name.

    Args:
        columns: Fields to show, or None to show the columns of the stage.
        rows: Called with the machine limits. Measures and yields the rows.
        details: Additional fields for the entry.
    """

    title: str
    stage: str
    columns: tuple[str, ...] | None
    rows: Callable[[Limits], Iterator[Row]]
    details: Entry = field(default_factory=Entry)

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        head: Entry = {"title": self.title, "stage": self.stage, **self.details}
        if self.columns is not None:
            head["columns"] = self.columns
        rows: dict[str, Row] = {}
        try:
            for row in self.rows(limits):
                rows[row["name"]] = row
                keep({**head, "rows": [*rows.values()]})
        except TimeoutError:
            rows[self.title] = skipped_row(self.title)
        except Exception as error:  # keep the rows measured so far
            rows[self.title] = new_row(self.title, error=error_text(error))
        return {**head, "rows": [*rows.values()]}


@dataclass(frozen=True)
class Case:
    """A candidate, and the fields to set in its rows, such as `ours`."""

    candidate: Candidate
    fields: Row


@dataclass
class InterleavedTable:
    """Table of candidates that take turns.

    Args:
        details: Additional fields for the entry.
        absent: Rows of candidates that cannot be measured, such as peers that are not installed.
        add_bounds: Called after each round with the measured rows and the machine limits. Adds bounds and ratios to the
            rows.
    """

    title: str
    stage: str  # reading, loading, decoding, training or augment
    cases: list[Case]
    details: Entry = field(default_factory=Entry)
    add_bounds: Callable[[list[Row], Limits], None] = lambda rows, limits: None
    absent: list[Row] = field(default_factory=list)

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        def after_round(measurements: list[Measurement]) -> None:
            keep(self.entry(measurements, limits))

        candidates = [case.candidate for case in self.cases]
        return self.entry(measure(candidates, seconds, rounds, deadline, after_round=after_round), limits)

    def entry(self, measurements: list[Measurement], limits: Limits) -> Entry:
        """Return the table with a row for each measurement."""
        fields = {case.candidate.name: case.fields for case in self.cases}
        rows = [measurement_row(measurement, **fields[measurement.candidate]) for measurement in measurements]
        try:
            self.add_bounds(rows, limits)
        except Exception as error:  # keep the rates without their bounds
            rows.append(new_row("bounds", error=f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.details, "rows": [*rows, *self.absent]}


TableSpec = RowTable | InterleavedTable
