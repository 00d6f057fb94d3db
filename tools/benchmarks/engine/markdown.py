"""Format the tables of a run as Markdown, for the console and docs/benchmarks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tools.benchmarks.engine.results import Entry, Row
from tools.benchmarks.engine.run_file import Run
from tools.common import tables
from tools.common.tables import aligned_table

# columns of the tables of a stage: the header, the field and its format
Columns = tuple[tuple[str, str, str], ...]
RATES: Columns = (
    ("name", "name", ""),
    ("device", "device", ""),
    ("placement", "placement", ""),
    ("batch", "batch_size", ""),
    ("workers", "workers", ""),
    ("images/s", "rate", ""),
    ("of resident", "of_resident", ".3f"),
    ("ours / this", "ratio", ".2f"),
    ("this / best peer", "of_best_peer", ".2f"),
    ("share", "share", ".0%"),
    ("of the bound", "bound", ""),
    ("tensors, GiB", "memory_gib", ".3g"),
    ("device, GiB", "device_memory_gib", ".3g"),
    ("loader, GiB", "loader_memory_gib", ".3g"),
    ("what binds", "remark", ""),
)
LEFT_ALIGNED = ("name", "device", "placement", "of the bound", "what binds")  # of RATES
AUGMENTATIONS: Columns = (
    ("augmentation", "kind", ""),
    ("ours, images/s", "ours", ""),
    ("of flip alone", "of_plain", ".2f"),
    ("torchvision v2 + DataLoader", "peer", ""),
    ("ours / this", "ratio", ".1f"),
)
COLUMNS: dict[str, Columns] = {  # of other stages
    "scale": (
        ("samples", "name", ""),
        ("µs/sample", "total_us", ".3g"),
        ("loader", "loader_us", ".3g"),
        ("order", "order_us", ".3g"),
        ("draws", "draws_us", ".3g"),
        ("open to first batch, s", "first_batch_s", ".3g"),
        ("memory, MiB", "memory_mib", ".3g"),
    ),
    "stages": (
        ("stage", "name", ""),
        ("images/s after a change", "after_change", ",.0f"),
        ("of the next epoch", "images_per_s", ",.0f"),
        ("ratio", "ratio", ".3f"),
        ("changes", "changes", ""),
    ),
}


def tables_markdown(entries: Sequence[Entry], run: Run) -> str:
    """Return `entries` as tables, followed by the names of peers that are not installed and the run's headline."""
    text = [table_markdown(entry) for entry in entries]
    if run.missing_peers:
        text.append(f"Left out, since not installed: {', '.join(run.missing_peers)}.")
    return "\n\n".join([*text, headline(run)])


def table_markdown(entry: Entry) -> str:
    """Return a table with its title and notes."""
    return "\n\n".join([f"### {entry['title']}", table(entry), *_notes(entry)])


def headline(run: Run) -> str:
    """Return a sentence with the machine, the versions and the date."""
    machine = run.environment
    cores = f"{machine['cores']} cores"
    if machine["device"] != machine["processor"]:
        cores += f" of {machine['processor']}"
    memory = f", {machine['gpu_memory_gib']} GiB" if "gpu_memory_gib" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}{memory}, {cores}, Python {machine['python']}, {versions}, {machine['date']}."


def parts_table(run: Run) -> str:
    """Return a table with the date, duration, completeness and command of each part of a run.

    Versions of a part are listed only if they differ from those in the headline.
    """
    common = run.environment["versions"].items()
    rows = []
    for name, part in run.parts.items():
        row: dict[str, object] = {"part": name, "date": part["date"], "minutes": round(part["duration_s"] / 60, 1)}
        row |= {"complete": part["is_complete"], "command": part["command"]}
        if others := [" ".join(version) for version in part["versions"].items() if version not in common]:
            row["versions that differ"] = ", ".join(others)
        rows.append(row)
    return tables.markdown(rows)


def table(entry: Entry) -> str:
    """Return the rows of an entry as a table. The columns are those listed in the entry, or else those of its stage."""
    rows = entry["rows"]
    if "columns" in entry:
        return _columns_table(rows, entry["columns"])
    if entry["stage"] in COLUMNS:
        return text_table(*_cells(COLUMNS[entry["stage"]], rows))
    if entry["stage"] == "limits":
        return text_table(("limit", "measured"), [(row["name"], _limit(row)) for row in rows])
    return _augmentations_table(rows) if entry["stage"] == "augment" else _rates_table(rows)


def _cells(columns: Columns, rows: Sequence[Mapping[str, object]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of a table. Cells of missing fields show the error of the row, if any."""

    def cell(row: Mapping[str, object], field: str, form: str) -> str:
        return str(row.get("error") or "") if row.get(field) is None else format(row[field], form)

    return [header for header, *_ in columns], [[cell(row, *column) for _, *column in columns] for row in rows]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of strings. All columns except the first are right-aligned."""
    return aligned_table(header, rows, right=range(1, len(header)))


def _columns_table(rows: list[Row], columns: Sequence[str]) -> str:
    """Return a table of the row names, the columns, and remarks. Empty columns are left out."""
    lines: list[dict[str, object]] = []
    for row in rows:
        remark = f"failed: {row['error']}" if row["error"] else row.get("note", "")
        lines.append({"": row["name"], **{name: row.get(name) for name in columns}, "remark": remark})
    used = ["", *(name for name in (*columns, "remark") if any(line[name] not in (None, "") for line in lines))]
    return tables.markdown([{shown(name): line[name] for name in used} for line in lines])


def shown(name: str) -> str:
    """Return the column header for a field, such as images/s for images_per_s and "time mean, s" for time_s_mean."""
    words = re.sub(r"^(.*)_(gib|s)(_mean|_std)?$", r"\1\3, \2", name.replace("_per_", "/"))
    return words.replace(", gib", ", GiB").replace("_", " ").replace("gb/", "GB/")


def _limit(row: Row) -> str:
    return f"{row['value']:,.3g} {row['unit']}" if "value" in row else row["error"] or row.get("note", "")


def _augmentations_table(rows: list[Row]) -> str:
    """Return a table that compares our rate to the peer's, with one line per kind of augmentation."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if "kind" in row):
        cells = {row["ours"]: row for row in rows if row.get("kind") == kind}
        ours, peer = cells.get(True, Row()), cells.get(False, Row())
        line = {"kind": kind, "of_plain": ours.get("of_plain"), "ratio": peer.get("ratio")}
        lines.append({**line, "ours": _rate(ours), "peer": _rate(peer)})
    return text_table(*_cells(AUGMENTATIONS, lines))


def _rate(row: Row) -> str:
    """Return images/s as text, "failed" for an error, or an empty string for a row that was not measured."""
    return f"{row['images_per_s']:,.0f}" if "images_per_s" in row else "failed" if row.get("error") else ""


def _rates_table(rows: list[Row]) -> str:
    """Return a table of images/s, bounds and ratios, without empty columns."""
    lines: list[dict[str, object]] = []
    for row in rows:
        bound = row.get("bound")
        shown_bound = f"{bound['images_per_s']:,.0f}: {bound['name']}" if bound else ""
        remark = row["error"] or row.get("note") or row.get("binds", "")
        lines.append({**row, "error": None, "rate": _rate(row), "bound": shown_bound, "remark": remark})
    used = tuple(column for column in RATES if any(line.get(column[1]) not in (None, "") for line in lines))
    header, cells = _cells(used, lines)
    return aligned_table(header, cells, right=[place for place, name in enumerate(header) if name not in LEFT_ALIGNED])


def _notes(entry: Entry) -> list[str]:
    notes = [entry["note"]] if "note" in entry else []
    shares = {row["name"]: row["of_resident"] for row in entry["rows"] if "of_resident" in row}
    if shares:
        listed = ", ".join(f"{name.split(', ', 1)[-1]} {share:.3f}" for name, share in shares.items())
        notes.append(f"Of the resident batch's rate: {listed}.")
    return notes
