"""Every notebook runs from top to bottom at toy size, in a kernel of its own, which knows nothing of the checkout."""

import ast
import pathlib
import re
import subprocess
import sys

import jupytext
import nbclient
import pytest

import optax_decay
from tests.support import notebooks

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))

# What the `parameters` cell of each is replaced by.
TOY = {
    "01_one_link_of_a_chain": "steps, seeds, width = 120, 1, 56",
    "02_spectral_alpha": "rows, columns, draws = 64, 160, 2",
    "03_width_transfer": "steps, seeds, widths, rates, decays = 20, 1, (16, 32), (0.01, 0.02), (1.0,)",
    "04_what_decay_does": "steps, looks, width, layers, length, batch_size = 4, 2, 32, 1, 32, 4",
    "05_interrupt_and_resume": (
        'experiment, steps, stop_after = "toy", 40, 3\n'
        'flags = ["--run.eval_every", "40", "--model.layers", "1", "--data.length", "32"]'
    ),
    "06_in_your_own_code": "steps, width = 10, 52",
    "07_where_decay_matters": (
        'seeds, flags = 3, ["--task.width", "16", "--task.heads", "2", "--task.mlp_width", "24", "--steps", "50"]'
        '\nflags += ["--unique", "1200", "--task.eval_batches", "2"]'
    ),
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
    """python -m tests.support.notebooks keeps them so."""
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES}
    assert {path.stem for path in SOURCES} == set(TOY)
    for path in SOURCES:
        assert cells(path) == cells(path.with_suffix(".ipynb")), path.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_readers_see_outputs_that_are_whole_small_and_of_no_machine(path):
    file = path.with_suffix(".ipynb")
    assert file.stat().st_size < 200_000
    code = [cell for cell in jupytext.read(file).cells if cell.cell_type == "code" and cell.source]
    # Every cell ran, in order, on a fresh kernel.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {output.output_type for output in outputs}
    assert "error" not in kinds and "stream" in kinds
    if path.stem != "06_in_your_own_code":
        assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert output.get("name") != "stderr", text
        assert not re.search(r"(^|[\s\"'=(])(/\w+/|[A-Z]:\\)", text), text


def test_spectral_multipliers_of_the_notebooks_do_something():
    """A matrix that is too small to be measured has the multiplier 1."""
    for name in ("01_one_link_of_a_chain", "06_in_your_own_code"):
        notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
        printed = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
        found = [float(x) for x in re.findall(r"multiplier/\S+ +(\d\S*)", printed.replace(":", ""))]
        assert len(found) >= 4 and min(found) < 0.7 and max(found) > 2.9, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_address_of_the_repository_has_one_place(path):
    """python -m tests.support.notebooks writes it."""
    source = path.read_text("utf-8")
    assert notebooks.addressed(source, path.stem, notebooks.address()) == source
    known = notebooks.addressed(source, path.stem, "https://github.com/someone/decay")
    button = f"colab.research.google.com/github/someone/decay/blob/main/notebooks/{path.stem}.ipynb"
    assert button in known and 'REPOSITORY = "https://github.com/someone/decay"' in known
    elsewhere = notebooks.addressed(known, path.stem, "https://git.example/decay")
    assert "(https://colab.research.google.com/github)" in elsewhere
    assert 'REPOSITORY = "https://git.example/decay"' in elsewhere


def test_the_address_is_that_of_the_project(tmp_path):
    text = '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/a/b.git/"\n'
    (tmp_path / "pyproject.toml").write_text(text)
    assert notebooks.address(tmp_path) == "https://github.com/a/b"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert notebooks.address(tmp_path) == ""


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
    setups = set()
    for path in SOURCES:
        setups.add(tagged(path, "setup"))
    assert len(setups) == 1
    # The environment of a checkout knows the checkout: here nothing may but the set-up itself.
    forget = f"import sys; sys.path = [p for p in sys.path if p != {str(NOTEBOOKS.parent)!r}]\n"
    program = forget + setups.pop()

    def run(more=""):
        # Without the environment, and -P: nothing but the set-up puts anything on the path.
        command = [sys.executable, "-P", "-c", program + more]
        return subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)

    alone = run()
    assert alone.returncode == 1 and "There is no checkout in" in alone.stderr
    assert "no wheel optax_decay*.whl" in alone.stderr and "REPOSITORY" in alone.stderr
    shown = "\nimport optax_decay, train\nprint(optax_decay.__file__)"
    (tmp_path / "optax_decay").symlink_to(NOTEBOOKS.parent)
    beside = run(shown)
    assert beside.returncode == 0, beside.stderr
    assert beside.stdout.strip() == str(tmp_path / "optax_decay/optax_decay/__init__.py")


@pytest.mark.parametrize("kind", ["wheels", "address"])
def test_the_set_up_installs_uploaded_wheels_or_from_an_address(tmp_path, kind):
    """With a pip that only prints what it is asked for."""
    setup = tagged(SOURCES[0], "setup")
    if kind == "wheels":
        names = ["optax_decay-0.1.0-py3-none-any.whl", "optax_decay_train-0.1.0-py3-none-any.whl"]
        for name in names:
            (tmp_path / name).write_text("")
        wanted = {str(tmp_path / name) for name in names}
    else:
        setup = notebooks.addressed(
            SOURCES[0].read_text("utf-8"), "01", "https://git.example/decay"
        ).split('tags=["setup"]\n')[1]
        setup = setup.split("# %%")[0]
        wanted = {
            "git+https://git.example/decay",
            "git+https://git.example/decay#subdirectory=train",
        }
    forget = f"import sys; sys.path = [p for p in sys.path if p != {str(NOTEBOOKS.parent)!r}]\n"
    fake = "import subprocess; subprocess.run = lambda command, check: print(*command[5:], sep='\\n')\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", forget + fake + setup],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")) - {""} == wanted
