"""Format the tables of a run as Markdown, for the console and docs/benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tools.benchmarks.engine.results import Entry, Row
from tools.common import tables
from tools.common.tables import aligned_table

COLUMNS = (
    "name",
    "device",
    "placement",
    "batch",
    "images/s",
    "of resident",
    "ours / this",
    "share",
    "of the bound",
    "tensors, GiB",
    "device, GiB",
    "loader, GiB",
    "what binds",
)
MEMORY_FIELDS = ("memory_gib", "device_memory_gib", "loader_memory_gib")  # of COLUMNS[9:12]
RIGHT_ALIGNED = ("batch", "images/s", "of resident", "ours / this", "share", *COLUMNS[9:12])
SCALE_HEADER = ("samples", "µs/sample", "loader", "order", "draws", "open to first batch, s", "memory, MiB")
SCALE_FIELDS = ("total_us", "loader_us", "order_us", "draws_us", "first_batch_s", "memory_mib")
AUGMENTATIONS_HEADER = (
    "augmentation",
    "ours, images/s",
    "of flip alone",
    "torchvision v2 + DataLoader",
    "ours / this",
)
STAGES_HEADER = ("stage", "images/s after a change", "of the next epoch", "ratio", "changes")


def run_markdown(run: dict[str, Any]) -> str:
    """Return all tables of a run, followed by the names of peers that are not installed and the headline."""
    return tables_markdown(run["groups"], run)


def tables_markdown(entries: Sequence[Entry], run: dict[str, Any]) -> str:
    """Return `entries` as tables, followed by the names of peers that are not installed and the run's headline."""
    text = [table_markdown(entry) for entry in entries]
    if run["missing_peers"]:
        text.append(f"Left out, since not installed: {', '.join(run['missing_peers'])}.")
    return "\n\n".join([*text, headline(run)])


def table_markdown(entry: Entry) -> str:
    """Return a table with its title and notes."""
    return "\n\n".join([f"### {entry['title']}", table(entry), *_notes(entry)])


def headline(run: dict[str, Any]) -> str:
    """Return a sentence with the machine, the versions and the date."""
    machine = run["environment"]
    cores = f"{machine['cores']} cores"
    if machine["device"] != machine["processor"]:
        cores += f" of {machine['processor']}"
    memory = f", {machine['gpu_memory_gib']} GiB" if "gpu_memory_gib" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['device']}{memory}, {cores}, Python {machine['python']}, {versions}, {machine['date']}."


def parts_table(run: dict[str, Any]) -> str:
    """Return a table with the date, duration, completeness and command of each part of a run.

    Versions of a part are listed only if they differ from those in the headline.
    """
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
    """Return the rows of an entry as a table. The columns are those listed in the entry, or else those of its stage."""
    rows = entry["rows"]
    if "columns" in entry:
        return _columns_table(entry)
    if entry["stage"] == "limits":
        return text_table(("limit", "measured"), [(row["name"], _limit(row)) for row in rows])
    if entry["stage"] == "stages":
        return text_table(STAGES_HEADER, [_stage_cells(row) for row in rows])
    if entry["stage"] == "augment":
        return _augmentations_table(rows)
    if entry["stage"] == "scale":
        return text_table(SCALE_HEADER, [_scale_cells(row) for row in rows])
    return _rates_table(rows)


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table of strings. All columns except the first are right-aligned."""
    return aligned_table(header, rows, right=range(1, len(header)))


def _columns_table(entry: Entry) -> str:
    """Return a table of the row names, the columns listed in the entry, and remarks. Empty columns are left out."""
    rows = []
    for row in entry["rows"]:
        remark = f"failed: {row['error']}" if row["error"] else row.get("note", "")
        rows.append({"": row["name"], **{name: row.get(name) for name in entry["columns"]}, "remark": remark})
    unused = {name for name in (*entry["columns"], "remark") if all(row[name] in (None, "") for row in rows)}
    return tables.markdown([{shown(key): value for key, value in row.items() if key not in unused} for row in rows])


def shown(name: str) -> str:
    """Return the column header for a field, such as images/s for images_per_s and "time mean, s" for time_s_mean."""
    words = re.sub(r"^(.*)_(gib|s)(_mean|_std)?$", r"\1\3, \2", name.replace("_per_", "/"))
    return words.replace(", gib", ", GiB").replace("_", " ").replace("gb/", "GB/")


def _limit(row: Row) -> str:
    return f"{row['value']:,.3g} {row['unit']}" if "value" in row else row["error"] or row.get("note", "")


def _stage_cells(row: Row) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['after_change']:,.0f}",
        f"{row['images_per_s']:,.0f}",
        f"{row['ratio']:.3f}",
        str(row["changes"]),
    )


def _scale_cells(row: Row) -> tuple[str, ...]:
    return (row["name"], *(f"{row[name]:.3g}" if name in row else (row["error"] or "") for name in SCALE_FIELDS))


def _augmentations_table(rows: list[Row]) -> str:
    """Return a table that compares our rate to the peer's, with one line per kind of augmentation."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows if "kind" in row):
        cells = {row["ours"]: row for row in rows if row.get("kind") == kind}
        ours, peer = cells.get(True, {}), cells.get(False, {})
        lines.append(
            (
                kind,
                _rate(ours),
                f"{ours['of_plain']:.2f}" if "of_plain" in ours else "",
                _rate(peer),
                f"{peer['ratio']:.1f}" if "ratio" in peer else "",
            )
        )
    return text_table(AUGMENTATIONS_HEADER, lines)


def _rate(row: Row) -> str:
    """Return images/s as text, "failed" for an error, or an empty string for a row that was not measured."""
    return f"{row['images_per_s']:,.0f}" if "images_per_s" in row else "failed" if row.get("error") else ""


def _rates_table(rows: list[Row]) -> str:
    """Return a table of images/s, bounds and ratios, without empty columns."""
    lines = [COLUMNS, *(_rate_cells(row) for row in rows)]
    used = [number for number in range(len(COLUMNS)) if any(line[number] for line in lines[1:])]
    header, *cells = [[line[number] for number in used] for line in lines]
    return aligned_table(header, cells, right=[header.index(name) for name in RIGHT_ALIGNED if name in header])


def _rate_cells(row: Row) -> tuple[str, ...]:
    bound = row.get("bound")
    error = row["error"]
    return (
        row["name"],
        row.get("device", ""),
        row.get("placement", ""),
        str(row.get("batch_size", "")),
        f"{row['images_per_s']:,.0f}" if "images_per_s" in row else ("failed" if error else ""),
        f"{row['of_resident']:.3f}" if "of_resident" in row else "",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{row['share']:.0%}" if "share" in row else "",
        f"{bound['images_per_s']:,.0f}: {bound['name']}" if bound else "",
        *(f"{row[name]:.3g}" if name in row else "" for name in MEMORY_FIELDS),
        error or row.get("note") or row.get("binds", ""),
    )


def _notes(entry: Entry) -> list[str]:
    notes = [entry["note"]] if "note" in entry else []
    shares = {row["name"]: row["of_resident"] for row in entry["rows"] if "of_resident" in row}
    if shares:
        listed = ", ".join(f"{name.split(', ', 1)[-1]} {share:.3f}" for name, share in shares.items())
        notes.append(f"Of the resident batch's rate: {listed}.")
    return notes
