"""Every notebook runs from top to bottom at toy size, in a kernel of its own."""

import pathlib

import jupytext
import nbclient
import pytest

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"

# What the `parameters` cell of each is replaced by.
TOY = {
    "01_one_link_of_a_chain": "steps, width = 120, 64",
    "02_spectral_alpha": "rows, columns, draws = 64, 160, 2",
    "03_width_transfer": "steps, seeds, widths, rates, decays = 20, 1, (16, 32), (0.01, 0.02), (1.0,)",
    "04_what_decay_does": "steps, looks, width, layers, length, batch_size = 4, 2, 32, 1, 32, 4",
    "05_interrupt_and_resume": (
        'experiment, steps, stop_after = "toy", 40, 3\n'
        'flags = ["--run.eval_every", "40", "--model.layers", "1", "--data.length", "32"]'
    ),
    "06_in_your_own_code": "steps, width = 10, 16",
}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = jupytext.read(path)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1, "one cell is tagged parameters"
    cells[0].source += "\n" + TOY[path.stem]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(
        cwd=str(NOTEBOOKS)
    )
    printed = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    ]
    assert printed
