"""JSON files of a run, which are replaced after every row, so that rows measured before a kill are kept.

Fields of a run:
    format, version, command, environment, duration_s, missing_peers
    parts: {name: {command, date, versions, duration_s, is_complete}}
    groups: tables with the name of their part; see `results` for their rows
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.benchmarks.engine import results
from tools.benchmarks.engine.results import Entry
from tools.common.tables import write_text

Run = dict[str, Any]


def command() -> str:
    return " ".join(["python", *sys.argv])


def new_run(environment: dict[str, Any], missing: list[str]) -> Run:
    """Return a run without tables."""
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
    write_text(path, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


class RunFile:
    """A run and its JSON files.

    Args:
        run: The run, to which tables are added.
        files: Written after every table.
        earlier: Run on the same device, whose tables of other parts are kept.
    """

    def __init__(self, run: Run, files: Sequence[Path], earlier: Run | None = None) -> None:
        self.run, self._files = run, files
        self._added: dict[tuple[str, str], Entry] = {}  # tables added by this run, by part and title
        self._in_place: set[tuple[str, str]] = set()  # keys of added tables that are in `run`
        if earlier is not None:
            run["parts"], run["groups"] = dict(earlier.get("parts", {})), list(earlier["groups"])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Assign the tables added in this context to a part, and record its duration at the end.

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
        """Mark the part as complete, and remove its tables of earlier runs that this run has not added."""
        groups = self.run["groups"]
        self.run["groups"] = [
            group for group in groups if group.get("part") != self._part or _key(group) in self._added
        ]
        self.run["parts"][self._part]["is_complete"] = True

    def add(self, entry: Entry) -> None:
        """Add a table to the part, or replace the table of the same title.

        A table of an earlier run is replaced only by one that has a measured row.
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
        """Return the tables added by this run, including those that did not replace an earlier one."""
        return list(self._added.values())

    def _write(self) -> None:
        for path in self._files:
            write_json(self.run, path)


def _key(entry: Entry) -> tuple[str, str]:
    return (entry.get("part", ""), entry["title"])
