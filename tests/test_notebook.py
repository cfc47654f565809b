"""The notebook, executed as a user would."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.harness.fake_results import write_study


@pytest.mark.slow
def test_the_notebook_runs_and_shows_the_verdict_tables_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RESULTS", str(write_study(tmp_path, ("off", "on", "zero"), range(7))))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "scripts" / "report.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # results are not committed
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "tuples pass all five criteria" in printed
    assert kinds.count("image/png") >= 10
    assert kinds.count("text/html") >= 10
