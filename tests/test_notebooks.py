"""The notebooks run from top to bottom, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.training import CLEAN, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_is_a_notebook() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_notebooks_are_stored_without_outputs(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_notebooks_run_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folders = {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    client = nbclient.NotebookClient(
        content, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute(env={**CLEAN, **folders, "PYTHONPATH": str(ROOT)})

    outputs = {cell.id: cell.outputs for cell in content.cells if cell.cell_type == "code"}
    text = "".join(output.get("text", "") for cell in outputs.values() for output in cell)
    assert "\r" not in text, "progress bars"
    assert any("image/png" in output.get("data", {}) for cell in outputs.values() for output in cell), "the curves"
    runs = [tmp_path / "output" / name for name in ("quickstart", "quickstart_own")]
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        assert max(line["val_top1"] for line in lines) > 0.8
