"""Renews the notebooks that readers open from their sources: the same first cells everywhere, and fresh outputs.

    python -m tests.support.notebooks            # all of them; or name some: 01 06

The address behind the Colab button and in the set-up cell has one place, `project.urls.Repository` of pyproject.toml.
Without it the button opens Colab's own search of GitHub, and the set-up cell takes a checkout or uploaded wheels.
"""

import os
import pathlib
import re
import sys
import tempfile
import tomllib

import jupytext
import nbclient

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
COLAB = "https://colab.research.google.com"


def address(root: pathlib.Path = ROOT) -> str:
    """Of the repository; empty if pyproject.toml does not know it."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def badge(name: str, repository: str) -> str:
    """The Colab button of a notebook, in Markdown."""
    on_github = repository.startswith("https://github.com/")
    path = repository.removeprefix("https://github.com/") if on_github else ""
    link = f"{COLAB}/github/{path}/blob/main/notebooks/{name}.ipynb" if path else f"{COLAB}/github"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def addressed(source: str, name: str, repository: str) -> str:
    """The source of a notebook with this address in its button and in its set-up cell."""
    button = badge(name, repository)
    source, buttons = re.subn(r"\[!\[Open in Colab\]\(\S+\)\]\(\S+\)", lambda _: button, source)
    line = f'REPOSITORY = "{repository}"'
    source, lines = re.subn(r'^REPOSITORY = "\S*"', line, source, flags=re.M)
    if (buttons, lines) != (1, 1):
        raise ValueError(f"{name} has {buttons} Colab buttons and {lines} addresses, not one each")
    return source


def execute(path: pathlib.Path) -> None:
    """Writes the .ipynb beside a source, with outputs that say nothing about this machine."""
    notebook = jupytext.read(path)
    for cell in notebook.cells:
        cell["id"] = f"cell-{notebook.cells.index(cell):02d}"
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "COLUMNS": "100"}
    nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3").execute(
        cwd=str(NOTEBOOKS)
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = output["text"].replace(tempfile.gettempdir() + "/", "")
    notebook.metadata.pop("language_info", None)
    jupytext.write(notebook, path.with_suffix(".ipynb"))


def main(wanted: list[str]) -> None:
    for path in sorted(NOTEBOOKS.glob("*.py")):
        if wanted and not any(path.stem.startswith(name) for name in wanted):
            continue
        path.write_text(addressed(path.read_text("utf-8"), path.stem, address()))
        print(path.stem, flush=True)
        execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
