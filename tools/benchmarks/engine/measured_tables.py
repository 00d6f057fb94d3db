"""Tables measured from candidates that take turns, by a generator of rows, or by one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tools.benchmarks.engine.candidate import Candidate, error_text
from tools.benchmarks.engine.interleaved import Measurement, measure
from tools.benchmarks.engine.results import Entry, Row, failed_row, measurement_row, skipped_row
from tools.benchmarks.engine.roofline import Limits

Keep = Callable[[Entry], None]


def _discard(entry: Entry) -> None:
    pass


class TableSpec(Protocol):
    """A table that can be measured.

    `run` measures the table and returns it. An InterleavedTable runs `rounds` rounds of about `seconds` seconds each.
    Only the first may start after `deadline`, a time.monotonic() value. Other tables ignore these arguments.
    InterleavedTable calls `keep` with the unfinished table after each round, and RowTable after each row.
    """

    title: str
    stage: str

    def run(
        self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard
    ) -> Entry: ...


@dataclass
class RowTable:
    """Table whose rows are measured one by one. A row replaces an earlier row of the same name.

    Args:
        columns: Fields to show.
        rows: Called with the machine limits. Measures and yields the rows.
        details: Additional fields for the entry.
    """

    title: str
    stage: str
    columns: tuple[str, ...]
    rows: Callable[[Limits], Iterator[Row]]
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        rows: dict[str, Row] = {}

        def entry() -> Entry:
            head = {"title": self.title, "stage": self.stage, "columns": self.columns}
            return head | self.details | {"rows": [*rows.values()]}

        try:
            for row in self.rows(limits):
                rows[row["name"]] = row
                keep(entry())
        except TimeoutError:
            rows[self.title] = skipped_row(self.title)
        except Exception as error:  # keep the rows measured so far
            rows[self.title] = failed_row(self.title, error_text(error))
        return entry()


@dataclass
class WholeTable:
    """Table that is measured by one function. `keep` is not called."""

    title: str  # also the name of the row that is shown if there is no time to measure the table
    stage: str
    measure: Callable[[], Entry]

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        return self.measure()


@dataclass
class InterleavedTable:
    """Table of candidates that take turns.

    Args:
        candidates: Programs to measure.
        rows: For each candidate in `candidates`, the fields to set in its rows, such as `ours`.
        details: Additional fields for the entry.
        add_bounds: Called after each round with the measured rows and the machine limits. Adds bounds and ratios to the
            rows.
    """

    title: str
    stage: str  # reading, loading, decoding, training or augment
    candidates: list[Candidate]
    rows: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    add_bounds: Callable[[list[Row], Limits], None] = lambda rows, limits: None

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        def after_round(measurements: list[Measurement]) -> None:
            keep(self.entry(measurements, limits))

        return self.entry(measure(self.candidates, seconds, rounds, deadline, after_round=after_round), limits)

    def entry(self, measurements: list[Measurement], limits: Limits) -> Entry:
        """Return the table with a row for each measurement."""
        fields = {candidate.name: row for candidate, row in zip(self.candidates, self.rows, strict=True)}
        rows = [measurement_row(measurement, **fields[measurement.candidate]) for measurement in measurements]
        try:
            self.add_bounds(rows, limits)
        except Exception as error:  # keep the rates without their bounds
            rows.append(failed_row("bounds", f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.details, "rows": rows}
