"""Every notebook runs from top to bottom at toy size, in a kernel of its own, which knows nothing of the checkout."""

import ast
import pathlib
import subprocess
import sys

import jupytext
import nbclient
import pytest

import optax_decay

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))

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


def cells(path):
    """Kind, tags and text of every cell."""
    return [
        (cell.cell_type, tuple(cell.metadata.get("tags", ())), cell.source)
        for cell in jupytext.read(path).cells
    ]


def tagged(path, tag):
    found = [source for _, tags, source in cells(path) if tag in tags]
    assert len(found) == 1, f"one cell is tagged {tag}"
    return found[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = jupytext.read(path.with_suffix(".ipynb"))
    parameters = tagged(path, "parameters")
    for cell in notebook.cells:
        if cell.source == parameters:
            cell.source += "\n" + TOY[path.stem]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute(
        cwd=str(NOTEBOOKS)
    )
    printed = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    ]
    assert printed


def test_what_readers_open_is_what_is_reviewed():
    """jupytext --to ipynb --update notebooks/*.py keeps them so."""
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES}
    assert {path.stem for path in SOURCES} == set(TOY)
    for path in SOURCES:
        assert cells(path) == cells(path.with_suffix(".ipynb")), path.stem
        for cell in jupytext.read(path.with_suffix(".ipynb")).cells:
            assert not cell.get("outputs")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_imports_public_names_only(path):
    """`import optax_decay`, names of it, and models; the training program through its command line."""
    public = {name for name in dir(optax_decay) if not name.startswith("_")}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert all(
                alias.name == "optax_decay" or ours(alias.name) is None for alias in node.names
            )
        if isinstance(node, ast.ImportFrom) and ours(node.module) is not None:
            names = {alias.name for alias in node.names}
            assert node.module == "models" or (node.module == "optax_decay" and names <= public)


def ours(module):
    """The package of this repository that a module belongs to, or None."""
    package = module.split(".")[0]
    return package if package in ("optax_decay", "models", "train", "tests") else None


def test_the_set_up_finds_the_checkout_and_asks_for_it(tmp_path):
    """As in Colab: the notebook lies elsewhere, and the checkout was cloned beside it, or it was not."""
    setups = {tagged(path, "setup") for path in SOURCES}
    assert len(setups) == 1
    program = setups.pop() + "\nimport optax_decay, train\nprint(optax_decay.__file__)"

    def run():
        # Without the environment, and -P: nothing but the set-up puts anything on the path.
        command = [sys.executable, "-P", "-c", program]
        return subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)

    alone = run()
    assert alone.returncode == 1 and "There is no checkout in" in alone.stderr
    (tmp_path / "optax_decay").symlink_to(NOTEBOOKS.parent)
    beside = run()
    assert beside.returncode == 0, beside.stderr
    assert beside.stdout.strip() == str(tmp_path / "optax_decay/optax_decay/__init__.py")
