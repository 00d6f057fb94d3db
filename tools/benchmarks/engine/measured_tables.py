"""Tables of measurements: by candidates that take turns, row by row, or as a whole."""

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
    """Description of a table that can be measured.

    `run` takes the limits of the machine, the seconds per round, the rounds and the deadline. It calls `keep` with
    the measurements so far.
    """

    title: str
    stage: str

    def run(
        self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard
    ) -> Entry: ...


@dataclass
class RowTable:
    """Table whose rows are measured one by one. A row replaces an earlier one of the same name.

    Args:
        columns: Fields to show.
        rows: Called with the limits of the machine.
        details: Further fields of the entry.
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
    """Table that is measured as a whole."""

    title: str  # name of the row that is shown if the table cannot be measured
    stage: str
    measure: Callable[[], Entry]

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        return self.measure()


@dataclass
class InterleavedTable:
    """Table of candidates that take turns.

    Args:
        rows: Fields of each candidate's rows, `ours` among them.
        details: Further fields of the entry.
        add_bounds: Adds bounds and ratios to the measured rows, given the limits of the machine.
    """

    title: str
    stage: str  # reading, loading, training, limits
    candidates: list[Candidate]
    rows: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    add_bounds: Callable[[list[Row], Limits], None] = lambda rows, limits: None

    def run(self, limits: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = _discard) -> Entry:
        def after_round(measurements: list[Measurement]) -> None:
            keep(self.entry(measurements, limits))

        return self.entry(measure(self.candidates, seconds, rounds, deadline, after_round=after_round), limits)

    def entry(self, measurements: list[Measurement], limits: Limits) -> Entry:
        """Return the table of these measurements."""
        fields = {candidate.name: row for candidate, row in zip(self.candidates, self.rows, strict=True)}
        rows = [measurement_row(measurement, **fields[measurement.candidate]) for measurement in measurements]
        try:
            self.add_bounds(rows, limits)
        except Exception as error:  # figures without their bounds are better than none
            rows.append(failed_row("bounds", f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.details, "rows": rows}
