"""JSON files of a benchmark run. They are replaced whenever a table changes, so that a killed run keeps its rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from tools.benchmarks.engine import results
from tools.benchmarks.engine.results import Entry, Environment
from tools.common import tables


class Part(TypedDict):
    """How and when a part of a run was measured."""

    command: str
    date: str
    versions: dict[str, str]
    duration_s: float
    is_complete: bool


def command() -> str:
    return " ".join(["python", *sys.argv])


@dataclass(kw_only=True)
class Run:
    """Content of a JSON file."""

    format: str = results.FORMAT
    version: int = results.VERSION
    command: str = field(default_factory=command)
    duration_s: float = 0.0
    environment: Environment
    missing_peers: list[str]  # peers that are not installed
    parts: dict[str, Part] = field(default_factory=dict)
    groups: list[Entry] = field(default_factory=list)  # tables


def write_json(run: Run, path: Path) -> None:
    """Write a run to a JSON file atomically."""
    tables.write_json(path, vars(run), indent=1, ensure_ascii=False)


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
        if earlier is not None:
            run.parts, run.groups = dict(earlier.parts), list(earlier.groups)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Assign tables added in this context to the named part, and record the part's duration at the end.

        The part is incomplete unless `complete` is called in the context.
        """
        start, environment = time.monotonic(), self.run.environment
        self._part = name
        self.run.parts[name] = {
            "command": command(),
            "date": environment["date"],
            "versions": environment["versions"],
            "duration_s": 0.0,
            "is_complete": False,
        }
        yield
        self.run.parts[name]["duration_s"] = round(time.monotonic() - start, 1)
        self.run.duration_s = round(sum(part["duration_s"] for part in self.run.parts.values()), 1)
        self._write()

    def complete(self) -> None:
        """Mark the current part as complete.

        Tables of the part that come from an earlier run and were not added again are removed.
        """
        self.run.groups = [
            group for group in self.run.groups if group.get("part") != self._part or _key(group) in self._added
        ]
        self.run.parts[self._part]["is_complete"] = True

    def add(self, entry: Entry) -> None:
        """Add a table to the current part, or replace the part's table of the same title.

        A table from an earlier run is replaced only if the new table has a measured row.
        """
        entry = {"part": self._part, **entry}
        groups, key = self.run.groups, _key(entry)
        place = next((index for index, group in enumerate(groups) if _key(group) == key), len(groups))
        present = groups[place] if place < len(groups) else None
        if present is self._added.get(key) or any(map(results.is_measured, entry["rows"])):
            groups[place : place + 1] = [entry]
        self._added[key] = entry
        self._write()

    def added_tables(self) -> list[Entry]:
        """Return all tables added by this run, including those that did not replace one from an earlier run."""
        return list(self._added.values())

    def _write(self) -> None:
        for path in self._files:
            write_json(self.run, path)


def _key(entry: Entry) -> tuple[str, str]:
    return (entry.get("part", ""), entry["title"])
