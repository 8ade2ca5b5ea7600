"""The notebook runs from top to bottom, and prints what it shows where that doesn't depend on the machine."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    shown = [kinds(cell) for cell in notebook.cells]
    assert any(shown), "the notebook should be committed with its outputs"
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
    assert [kinds(cell) for cell in notebook.cells] == shown


def kinds(cell):
    """What a cell shows, but for what is written to stderr and the pieces that its prints come in."""
    outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    return {(output.output_type, *sorted(output.get("data", {}))) for output in outputs}
