"""The tables of a run as markdown, for the console and for docs/benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tools.benchmarks.engine import results
from tools.benchmarks.suites import augmentations, progressive
from tools.benchmarks.suites.groups import Entry
from tools.common import tables
from tools.common.tables import aligned_table

SCALE = ("samples", "µs/sample", "loader", "order", "draws", "open to first batch, s", "memory, MiB")
SCALE_FIELDS = ("total_us", "loader_us", "order_us", "draws_us", "first_batch_s", "memory_mib")


def run_markdown(run: dict[str, Any]) -> str:
    """Return all tables of a run and the headline."""
    return tables_markdown(run["groups"], run)


def tables_markdown(entries: Sequence[Entry], run: dict[str, Any]) -> str:
    """Return some of a run's tables and the headline."""
    text = [table_markdown(entry) for entry in entries]
    if run["missing_peers"]:
        text.append(f"Left out, since not installed: {', '.join(run['missing_peers'])}.")
    return "\n\n".join([*text, headline(run)])


def table_markdown(entry: Entry) -> str:
    """Return a table under its title, with its notes."""
    return "\n\n".join([f"### {entry['title']}", table(entry), *_notes(entry)])


def headline(run: dict[str, Any]) -> str:
    """Return the machine, the versions and the date as a sentence."""
    facts = run["environment"]
    cores = f"{facts['cores']} cores" + ("" if facts["device"] == facts["processor"] else f" of {facts['processor']}")
    memory = f", {facts['gpu_memory_gib']} GiB" if "gpu_memory_gib" in facts else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['device']}{memory}, {cores}, Python {facts['python']}, {versions}, {facts['date']}."


def parts(run: dict[str, Any]) -> str:
    """Return a table of the date and command of each part, and of the versions that differ from the headline's."""
    common = run["environment"]["versions"].items()
    rows = []
    for name, part in run["parts"].items():
        row = {"part": name, "date": part["date"], "minutes": round(part["duration_s"] / 60, 1)}
        row |= {"complete": part["is_complete"], "command": part["command"]}
        if others := [" ".join(version) for version in part["versions"].items() if version not in common]:
            row["versions that differ"] = ", ".join(others)
        rows.append(row)
    return tables.markdown(rows)


def table(entry: Entry) -> str:
    """Return the rows as a table with the columns of the entry's stage."""
    rows = entry["rows"]
    if "columns" in entry:
        return _plain(entry)
    if entry["stage"] == "limits":
        cells = [
            (r["name"], f"{r['value']:,.3g} {r['unit']}" if "value" in r else r["error"] or r.get("note", ""))
            for r in rows
        ]
        return markdown(("limit", "measured"), cells)
    if entry["stage"] == "stages":
        return markdown(progressive.HEADER, [progressive.cells(row) for row in rows])
    if entry["stage"] == "augment":
        return augmentations.table(rows)
    if entry["stage"] == "scale":
        cells = [(r["name"], *(f"{r[n]:.3g}" if n in r else (r["error"] or "") for n in SCALE_FIELDS)) for r in rows]
        return markdown(SCALE, cells)
    return results.table(rows)


def _plain(entry: Entry) -> str:
    """Return a table of the entry's columns and a remark."""
    rows = []
    for row in entry["rows"]:
        remark = f"failed: {row['error']}" if row["error"] else row.get("note", "")
        rows.append({"": row["name"], **{name: row.get(name) for name in entry["columns"]}, "remark": remark})
    unused = {name for name in (*entry["columns"], "remark") if all(row[name] in (None, "") for row in rows)}
    return tables.markdown([{shown(key): value for key, value in row.items() if key not in unused} for row in rows])


def shown(name: str) -> str:
    """Return the column header of a field: images/s for images_per_s, "time mean, s" for time_s_mean."""
    words = re.sub(r"^(.*)_(gib|s)(_mean|_std)?$", r"\1\3, \2", name.replace("_per_", "/"))
    return words.replace(", gib", ", GiB").replace("_", " ").replace("gb/", "GB/")


def _notes(entry: Entry) -> list[str]:
    notes = [entry["note"]] if "note" in entry else []
    shares = {r["name"]: r["of_resident"] for r in entry["rows"] if "of_resident" in r}
    if shares:
        told = ", ".join(f"{name.split(', ', 1)[-1]} {share:.3f}" for name, share in shares.items())
        notes.append(f"Of the resident batch's rate: {told}.")
    return notes


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return aligned_table(header, rows, right=range(1, len(header)))
