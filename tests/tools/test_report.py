"""tools/report.py: documents and tables of docs/benchmarks/README.md match the JSON files."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.utils.errors import UserError
from helpers.benchmarks import a_run
from tools import report
from tools.benchmarks import documents
from tools.benchmarks.engine import markdown
from tools.benchmarks.engine.results import add_ratios, new_row

RATES = [
    ("Model Zhu, exact", True, 300.0),
    ("Model Zhu, fast", True, 600.0),
    ("FFCV", False, 400.0),
    ("SPDL", False, 100.0),
]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{documents.BEGIN}\nold\n{documents.END}\n\nrest\n")
    return path


def call(folder: Path, readme: Path, *flags: str) -> int:
    return report.main(["--folder", str(folder), "--readme", str(readme), *flags])


def test_readme_table_matches_the_json_files() -> None:
    assert report.main(["--check"]) == 0


def test_documents_contain_figures_failures_and_versions(tmp_path: Path) -> None:
    run = a_run()
    json_file, document, picture = documents.write(run, tmp_path)
    assert documents.load_runs(tmp_path) == {"Test": run}
    assert json_file.name == "Test.json"
    text = document.read_text()
    for part in (
        "2,000,000",
        "OSError: no / space",
        "torch 2.15",
        "python tools/benchmark.py all",
        "2 cores",
        "0.983",
        picture.name,
    ):
        assert part in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_check_fails_until_the_table_is_rewritten(
    tmp_path: Path, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    documents.write(a_run(), folder)
    assert call(folder, readme, "--check") == 1
    assert "run python tools/report.py" in capsys.readouterr().err
    assert call(folder, readme) == 0
    assert call(folder, readme, "--check") == 0
    text = readme.read_text()
    assert text.startswith("# Title")
    assert text.endswith("rest\n")
    assert "| 32x32 raw, reading alone | 2,000,000 | 2 | 50% of one copy of the bytes |" in " ".join(text.split())
    assert "No figure from a GPU yet" in text
    documents.write(a_run("NVIDIA H200", gpu_memory_gib=140), folder)
    assert call(folder, readme, "--check") == 1
    assert call(folder, readme) == 0
    assert "No figure from a GPU yet" not in readme.read_text()


def test_readme_shows_the_ratio_of_each_of_our_rows_to_the_best_peer(tmp_path: Path, readme: Path) -> None:
    run = a_run()
    rows = [new_row(name, ours=ours, images_per_s=rate, lowest=rate, highest=rate) for name, ours, rate in RATES]
    add_ratios(rows)
    run.groups = [{"title": "32x32 JPEG", "stage": "loading", "rows": rows}]
    documents.write(run, tmp_path)
    assert call(tmp_path, readme) == 0
    lines = [" ".join(line.split()) for line in readme.read_text().splitlines()]
    assert (
        "| loader alone | ours, images/s | ours / best peer | ours / FFCV | ours / SPDL | share of the bound |" in lines
    )
    assert "| 32x32 JPEG (exact) | 300 | 0.75 (FFCV) | 0.75 | 3 | |" in lines
    assert "| 32x32 JPEG (fast) | 600 | 1.5 (FFCV) | 1.5 | 6 | |" in lines
    table = markdown.table_markdown(run.groups[0])
    assert "this / best peer" in table


def test_readme_without_markers_is_a_user_error(tmp_path: Path, readme: Path) -> None:
    readme.write_text("# Title\n")
    with pytest.raises(UserError, match="put them back"):
        call(tmp_path, readme)


def test_missing_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.md: No such file or directory; check the path"):
        call(tmp_path, tmp_path / "missing.md")


def test_other_formats_are_ignored_and_broken_files_named(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("[]")
    assert documents.load_runs(tmp_path) == {}
    (tmp_path / "broken.json").write_text('{"format": "model-zhu-benchmarks"}')
    with pytest.raises(UserError, match=r"broken\.json has version None, this program writes 1"):
        documents.load_runs(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json is not JSON"):
        documents.load_runs(tmp_path)
