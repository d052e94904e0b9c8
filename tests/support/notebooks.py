"""Renews the notebooks that readers open from their sources: the same first cells everywhere, and fresh outputs.

    python -m tests.support.notebooks            # all of them; or name some: 01 06

The address behind the Colab button and in the set-up cell has one place, `project.urls.Repository` of pyproject.toml.
Without it the button opens Colab's own search of GitHub, and the set-up cell takes a checkout or uploaded wheels.
"""

import base64
import io
import os
import pathlib
import re
import sys
import tomllib
from typing import Any

import jupytext
import nbclient
import PIL.Image

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
    """Writes the .ipynb beside a source, with fresh outputs."""
    notebook = jupytext.read(path)
    os.environ |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "COLUMNS": "100"}
    client = nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", coalesce_streams=True
    )
    client.execute(cwd=str(NOTEBOOKS))
    tidy(notebook)
    jupytext.write(notebook, path.with_suffix(".ipynb"))


def tidy(notebook: Any) -> None:
    """Leaves out of a notebook what differs from run to run or machine to machine, and makes its pictures small."""
    notebook.metadata.pop("language_info", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
                output.data.pop("text/plain", None)


def small(picture: str) -> str:
    """A PNG in base64 with a palette of 64 colours, which diagrams do not exceed visibly."""
    image = PIL.Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    out = io.BytesIO()
    image.quantize(64, dither=PIL.Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode() + "\n"


def main(wanted: list[str]) -> None:
    for path in sorted(NOTEBOOKS.glob("*.py")):
        if wanted and not any(path.stem.startswith(name) for name in wanted):
            continue
        path.write_text(addressed(path.read_text("utf-8"), path.stem, address()))
        print(path.stem, flush=True)
        execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
