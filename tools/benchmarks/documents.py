"""Write the documents of benchmark runs: DEVICE.md and .png, and the tables in docs/benchmarks/README.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.utils.errors import UserError
from tools.benchmarks.engine import results
from tools.benchmarks.engine.markdown import headline, parts_table, tables_markdown, text_table
from tools.benchmarks.engine.results import Entry, Row
from tools.benchmarks.engine.run_file import Run, write_json
from tools.common.tables import write_text

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
BEST = "ours / best peer"
HOW_TO_READ = """All rows of a table took turns in short rounds, each in a separate process; a figure is the median
round. *ours / this* is our figure divided by the row's, *of resident* the row's divided by ours on one resident batch,
*this / best peer* the row's divided by that of the fastest peer, and *share* the row's divided by the tightest bound,
which was measured in the same run. *workers* are processes or threads of a peer, the fastest number of several."""


def run(options: argparse.Namespace) -> int:
    """Write or check the documents as the arguments of `tools/report.py` say, and return the exit status."""
    with _file_errors():
        return _update(options)


def _update(options: argparse.Namespace) -> int:
    runs = load_runs(options.folder)
    text = with_block(options.readme, readme_block(runs, options.folder, options.readme))
    if options.check:
        if text == options.readme.read_text(encoding="utf-8"):
            return 0
        message = f"{options.readme}: the table differs from {options.folder}; run python tools/report.py"
        print(message, file=sys.stderr)
        return 1
    for run in runs.values():
        document(run, options.folder)
    write_text(options.readme, text)
    return 0


def write(run: Run, folder: Path) -> list[Path]:
    """Write DEVICE.json, DEVICE.md and, if the run has rates, DEVICE.png. Return the written paths.

    If the folder is docs/benchmarks, the tables in its README.md are updated too.

    Raises:
        UserError: A file cannot be written, or README.md or another run in docs/benchmarks is invalid.
    """
    path = folder / f"{slug(run)}.json"
    write_json(run, path)
    with _file_errors():
        written = [path, *document(run, folder)]
        readme = folder / "README.md"
        if folder.resolve() == ROOT / "docs" / "benchmarks" and readme.exists():
            write_text(readme, with_block(readme, readme_block(load_runs(folder), folder, readme)))
            written.append(readme)
    return written


@contextmanager
def _file_errors() -> Iterator[None]:
    """Raise a UserError if a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; check the path and its permissions") from None


def load_runs(folder: Path) -> dict[str, Run]:
    """Return the benchmark runs among the JSON files in a folder, by file name without suffix.

    Raises:
        UserError: A file is not JSON, or a run was written by a different version.
    """
    runs: dict[str, Run] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); delete it or measure again") from None
        if not isinstance(content, dict) or content.get("format") != results.FORMAT:
            continue
        version = content.get("version")
        if version != results.VERSION:
            raise UserError(f"{path} has version {version}, this program writes {results.VERSION}; measure again")
        runs[path.stem] = Run(**content)
    return runs


def slug(run: Run) -> str:
    """Return the name of the run's device for use in file names, with only letters, digits and hyphens."""
    name = re.sub(r"\((R|TM)\)| (CPU|Processor)\b", "", run.environment["device"])
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def document(run: Run, folder: Path) -> list[Path]:
    """Write DEVICE.md and, if the run has rates, DEVICE.png. Return the written paths."""
    from tools.benchmarks.engine import charts  # deferred, since matplotlib is slow to import

    name = slug(run)
    failed = results.failure_lines(run.groups)
    picture = charts.draw_chart(run, folder / f"{name}.png")
    commands = {part["command"] for part in run.parts.values()}
    how = parts_table(run) if len(commands) > 1 else f"    {run.command}"
    text = [
        f"# {run.environment['device']}",
        f"{headline(run)} The whole run took {run.duration_s / 60:.1f} minutes:",
        how,
        HOW_TO_READ,
        *([f"![images/s by candidate]({picture.name})"] if picture else []),
        *(["**Failed:**\n\n" + "\n".join(f"- {line}" for line in failed)] if failed else []),
        tables_markdown(run.groups, run),
    ]
    path = folder / f"{name}.md"
    write_text(path, "\n\n".join(text) + "\n")
    return [path, *([picture] if picture else [])]


def readme_block(runs: dict[str, Run], folder: Path, readme: Path) -> str:
    """Return the text between the markers of README.md.

    For each device, tables show this project's rates, their ratios to the peers' rates and their shares of the bounds.
    """
    text = []
    if not any("gpu_memory_gib" in run.environment for run in runs.values()):
        text.append("**No figure from a GPU yet**; `make gpu-bench` measures them.")
    for name, run in runs.items():
        link, base, facts = (folder / f"{name}.md").resolve(), readme.resolve().parent, run.environment
        link = link.relative_to(base) if link.is_relative_to(base) else link
        text.append(f"{facts['device']}, {facts['cores']} cores, {facts['date']} ([all figures]({link.as_posix()})):")
        text += [table for table in (_loading_summary(run), _training_summary(run)) if table]
    return "\n\n".join(text) if text else "Nothing measured yet."


def _loading_summary(run: Run) -> str:
    groups = [group for group in run.groups if group["stage"] in ("reading", "loading")]
    peers = _peers(groups)
    rows = []
    for group in groups:
        for row in _measured(group):
            share = f"{row['share']:.0%} of {row['bound']['name']}" if "share" in row else ""
            best = f"{row['of_best_peer']:.3g} ({row['best_peer']})" if "of_best_peer" in row else ""
            rows.append((_title(group, row), f"{row['images_per_s']:,.0f}", best, *_ratios(group, peers, row), share))
    header = ("loader alone", "ours, images/s", BEST, *(f"ours / {peer}" for peer in peers), "share of the bound")
    return _without_empty(header, rows, BEST) if rows else ""


def _without_empty(header: tuple[str, ...], rows: list[tuple[str, ...]], name: str) -> str:
    """Return a table of strings, without the column `name` if all its cells are empty, as in runs of older versions."""
    place = header.index(name)
    if any(row[place] for row in rows):
        return text_table(header, rows)
    return text_table(header[:place] + header[place + 1 :], [row[:place] + row[place + 1 :] for row in rows])


def _training_summary(run: Run) -> str:
    groups = [group for group in run.groups if group["stage"] == "training"]
    peers = _peers(groups)
    rows = []
    for group in groups:
        resident = [row for row in group["rows"] if row["ours"] and row["name"].endswith("resident batch")]
        share = next((f"{row['share']:.1%}" for row in resident if "share" in row), "")
        for row in (row for row in _measured(group) if "of_resident" in row):
            title = f"{_title(group, row)}, batch {row['batch_size']}"
            cells = (f"{row['images_per_s']:,.0f}", f"{row['of_resident']:.3f}", share)
            rows.append((title, *cells, *_ratios(group, peers, row)))
    header = (
        "training end to end",
        "ours, images/s",
        "of the resident batch",
        "resident, of the arithmetic peak",
        *(f"ours / {peer}" for peer in peers),
    )
    return text_table(header, rows) if rows else ""


def _measured(group: Entry) -> list[Row]:
    return [row for row in group["rows"] if row["ours"] and "images_per_s" in row]


def _peers(groups: list[Entry]) -> list[str]:
    return list(dict.fromkeys(row["name"] for group in groups for row in group["rows"] if "ratio" in row))


def _ratios(group: Entry, peers: list[str], ours: Row) -> list[str]:
    """Return one cell per peer with the ratio of our row's rate to the peer's. Cells of unmeasured peers are empty."""
    rates = {row["name"]: row["images_per_s"] for row in group["rows"] if "ratio" in row}
    return [f"{ours['images_per_s'] / rates[peer]:.3g}" if peer in rates else "" for peer in peers]


def _title(group: Entry, row: Row) -> str:
    """Return the title of the row's table, followed by the row's variant in parentheses if there is one.

    The variant is the row's name after its first comma, without "end to end".
    """
    which = [part for part in row["name"].split(", ")[1:] if part != "end to end"]
    return f"{group['title']} ({', '.join(which)})" if which else str(group["title"])


def with_block(readme: Path, block: str) -> str:
    """Return the text of the README, with the part between the BEGIN and END markers replaced by `block`.

    Raises UserError unless each marker occurs exactly once, BEGIN before END.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"{readme} must contain one line {BEGIN} and, after it, one line {END}; put them back around the table"
        )
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{block}\n\n{text[text.index(END) :]}"
