"""JSON files of a benchmark run. They are replaced whenever a table changes, so that a killed run keeps its rows.

Fields of a run:
    format, version, command, environment, duration_s, missing_peers
    parts: {name: {command, date, versions, duration_s, is_complete}}
    groups: tables, each with the name of its part; see `results` for the fields of a row
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.benchmarks.engine import results
from tools.benchmarks.engine.results import Entry
from tools.common import tables

Run = dict[str, Any]


def command() -> str:
    return " ".join(["python", *sys.argv])


def new_run(environment: dict[str, Any], missing: list[str]) -> Run:
    """Return a run without parts or tables."""
    return {
        "format": results.FORMAT,
        "version": results.VERSION,
        "command": command(),
        "duration_s": 0.0,
        "environment": environment,
        "missing_peers": missing,
        "parts": {},
        "groups": [],
    }


def write_json(run: Run, path: Path) -> None:
    """Write a run to a JSON file atomically."""
    tables.write_json(path, run, indent=1, ensure_ascii=False)


class RunFile:
    """A run and the JSON files to which it is written.

    Args:
        run: Run to which tables are added.
        files: JSON files, replaced whenever a table is added.
        earlier: Earlier run on the same device. Its tables are kept until new ones replace them.
    """

    def __init__(self, run: Run, files: Sequence[Path], earlier: Run | None = None) -> None:
        self.run, self._files = run, files
        self._added: dict[tuple[str, str], Entry] = {}  # tables added by this run, by part and title
        self._in_place: set[tuple[str, str]] = set()  # keys of added tables that are in `run`
        if earlier is not None:
            run["parts"], run["groups"] = dict(earlier.get("parts", {})), list(earlier["groups"])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Assign tables added in this context to the named part, and record the part's duration at the end.

        The part is incomplete unless `complete` is called in the context.
        """
        start = time.monotonic()
        environment = self.run["environment"]
        info = {"command": command(), "date": environment["date"], "versions": environment["versions"]}
        self.run["parts"][name] = info | {"duration_s": 0.0, "is_complete": False}
        self._part = name
        yield
        self.run["parts"][name]["duration_s"] = round(time.monotonic() - start, 1)
        self.run["duration_s"] = round(sum(part["duration_s"] for part in self.run["parts"].values()), 1)
        self._write()

    def complete(self) -> None:
        """Mark the current part as complete.

        Tables of the part that come from an earlier run and were not added again are removed.
        """
        groups = self.run["groups"]
        self.run["groups"] = [
            group for group in groups if group.get("part") != self._part or _key(group) in self._added
        ]
        self.run["parts"][self._part]["is_complete"] = True

    def add(self, entry: Entry) -> None:
        """Add a table to the current part, or replace the part's table of the same title.

        A table from an earlier run is replaced only if the new table has a measured row.
        """
        entry = {"part": self._part, **entry}
        groups, key = self.run["groups"], _key(entry)
        self._added[key] = entry
        place = next((index for index, group in enumerate(groups) if _key(group) == key), len(groups))
        if place == len(groups) or key in self._in_place or any(map(results.is_measured, entry["rows"])):
            groups[place : place + 1] = [entry]
            self._in_place.add(key)
        self._write()

    def added_tables(self) -> list[Entry]:
        """Return all tables added by this run, including those that did not replace one from an earlier run."""
        return list(self._added.values())

    def _write(self) -> None:
        for path in self._files:
            write_json(self.run, path)


def _key(entry: Entry) -> tuple[str, str]:
    return (entry.get("part", ""), entry["title"])
