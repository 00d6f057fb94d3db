"""Tables of measurements: candidates measured in turns, rows measured one by one, or a table made as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from tools.benchmarks.engine.candidate import Candidate
from tools.benchmarks.engine.interleaved import Measurement, measure
from tools.benchmarks.engine.results import Entry, Row, error_text, failed_row, measurement_row, skipped_row
from tools.benchmarks.engine.roofline import Limits

Keep = Callable[[Entry], None]


class TableSpec(Protocol):
    """What one table is measured by. `keep` is called with the entry as far as it is measured."""

    title: str
    stage: str

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry: ...


@dataclass
class RowTable:
    """Rows that are measured one by one; a row takes the place of an earlier one of its name.

    rows: called with the limits of the machine. columns: those that are shown.
    """

    title: str
    stage: str
    columns: tuple[str, ...]
    rows: Callable[[Limits], Iterator[Row]]
    details: dict[str, Any] = field(default_factory=dict)

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        rows: dict[str, Row] = {}

        def entry() -> Entry:
            return {
                "title": self.title,
                "stage": self.stage,
                "columns": self.columns,
                **self.details,
                "rows": [*rows.values()],
            }

        try:
            for each in self.rows(found):
                rows[each["name"]] = each
                keep(entry())
        except TimeoutError:
            rows[self.title] = skipped_row(self.title)
        except Exception as error:  # whatever it is, the rows that there are stay
            rows[self.title] = failed_row(self.title, error_text(error))
        return entry()


@dataclass
class WholeTable:
    """A table that is measured as a whole."""

    title: str  # where it cannot be measured
    stage: str
    measure: Callable[[], Entry]

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        return self.measure()


@dataclass
class InterleavedTable:
    """Contestants that take turns. `finish` completes the rows with bounds, once they are measured."""

    title: str
    stage: str  # reading, loading, training, limits
    candidates: list[Candidate]
    rows: list[dict[str, Any]]  # facts of each contestant's rows, `ours` among them
    details: dict[str, Any] = field(default_factory=dict)
    add_bounds: Callable[[list[Row], Limits], None] = lambda rows, found: None

    def run(
        self, found: Limits, seconds: float, rounds: int, deadline: float | None, keep: Keep = lambda entry: None
    ) -> Entry:
        def after_round(measurements: list[Measurement]) -> None:
            keep(self.entry(measurements, found))

        return self.entry(measure(self.candidates, seconds, rounds, deadline, after_round=after_round), found)

    def entry(self, measurements: list[Measurement], found: Limits) -> Entry:
        details = {c.name: f for c, f in zip(self.candidates, self.rows, strict=True)}
        rows = [measurement_row(measurement, **details[measurement.candidate]) for measurement in measurements]
        try:
            self.add_bounds(rows, found)
        except Exception as error:  # figures without their bounds are better than none
            rows.append(failed_row("bounds", f"{type(error).__name__}: {error}"))
        return {"title": self.title, "stage": self.stage, **self.details, "rows": rows}
