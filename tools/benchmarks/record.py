"""The record of a run in JSON files that are replaced as a whole after every row, so that a kill loses none.

format, version, command, environment, duration_s, missing_peers
parts: {name: {command, date, versions, duration_s, is_complete}}
groups: tables with the name of their part; see results for rows
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.benchmarks import results
from tools.benchmarks.groups import Entry

Run = dict[str, Any]


def command() -> str:
    return " ".join(["python", *sys.argv])


def start(environment: dict[str, Any], missing: list[str]) -> Run:
    """A run without tables."""
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
    """Write the file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


class Record:
    """A run and the files that hold it. `earlier`: a run on the same device, whose other tables are kept."""

    def __init__(self, run: Run, files: Sequence[Path], earlier: Run | None = None) -> None:
        self.run, self._files = run, files
        self.measured: list[str] = []  # parts of this run
        if earlier is not None:
            run["parts"], run["groups"] = dict(earlier.get("parts", {})), list(earlier["groups"])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Assign the tables that are put inside to a part.

        Set `is_whole` inside once all of them are there: then those that an earlier run left of the part are removed.
        """
        begin = time.monotonic()
        environment = self.run["environment"]
        about = {"command": command(), "date": environment["date"], "versions": environment["versions"]}
        self.run["parts"][name] = about | {"duration_s": 0.0, "is_complete": False}
        self.measured.append(name)
        self._part, self.is_whole = name, False
        self._put, self._placed = set[str](), set[str]()  # titles: of all tables, and of those that are in the file
        yield
        if self.is_whole:
            groups = self.run["groups"]
            self.run["groups"] = [one for one in groups if one.get("part") != name or one["title"] in self._put]
        self.run["parts"][name] |= {"duration_s": round(time.monotonic() - begin, 1), "is_complete": self.is_whole}
        self.run["duration_s"] = round(sum(one["duration_s"] for one in self.run["parts"].values()), 1)
        self._write()

    def put(self, entry: Entry) -> None:
        """Add a table to the part or replace the one of its title.

        A table without a figure does not replace one of an earlier run.
        """
        self._put.add(entry["title"])
        groups = self.run["groups"]
        names = [(one.get("part"), one["title"]) for one in groups]
        key = (self._part, entry["title"])
        place = names.index(key) if key in names else len(groups)
        is_mine = place == len(groups) or entry["title"] in self._placed
        if is_mine or any(map(results.has_figure, entry["rows"])):
            self._placed.add(entry["title"])
            groups[place : place + 1] = [{"part": self._part, **entry}]
        self._write()

    def tables(self) -> list[Entry]:
        """Return the tables of the parts that this run measured."""
        return [one for one in self.run["groups"] if one.get("part") in self.measured]

    def _write(self) -> None:
        for path in self._files:
            write_json(self.run, path)
