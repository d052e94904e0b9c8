"""The Markdown pages and the notebooks of a checkout, as sources of the site that `train.reference` builds."""

import base64
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping

# In the order of the table of contents; other pages of docs/ follow.
GUIDES = (
    "first_decay",
    "coming_from_pytorch",
    "which_decay_when",
    "formula",
    "how_decay_goes_wrong",
    "gpu_and_tpu",
)
LAST = "papers"
RESULTS = "notebooks/results"  # pages and pictures of comparisons
PROJECT = ("RESULTS", "CHANGELOG", "CONTRIBUTING")
_FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def write(root: pathlib.Path, out: pathlib.Path, objects: Mapping[str, str]) -> None:
    """Writes index.md, the guides, the notebooks and the project's pages.

    Args:
        root: the checkout.
        out: the folder for the sources of the site.
        objects: public names and the names under which the reference describes them; pages link to it.
    """
    guides = {path.stem: path for path in (root / "docs").glob("*.md")}
    for name, path in guides.items():
        (out / f"{name}.md").write_text(_page(path.read_text("utf-8"), objects))
    for name in PROJECT:
        (out / f"{name}.md").write_text(_page((root / f"{name}.md").read_text("utf-8"), {}))
    shutil.copytree(root / "notebooks/pictures", out / "notebooks/pictures")
    lines = shutil.ignore_patterns("*.json", "*.jsonl")
    shutil.copytree(root / RESULTS, out / RESULTS, ignore=lines)
    comparisons = sorted(path.relative_to(out) for path in (out / RESULTS).rglob("*.md"))
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        text = _notebook(json.loads(path.read_text("utf-8")), out / "notebooks", path.stem)
        (out / f"notebooks/{path.stem}.md").write_text(text)
    others = sorted(set(guides) - {"index", LAST, *GUIDES})
    with (out / "index.md").open("a") as index:
        index.write(_contents("Guides", [n for n in (*GUIDES, *others, LAST) if n in guides]))
        index.write(_contents("Notebooks", [f"notebooks/{path.stem}" for path in notebooks]))
        index.write(_contents("Reference", ["reference/index"]))
        index.write(_contents("Project", PROJECT))
        names = [path.with_suffix("").as_posix() for path in comparisons]
        index.write(_contents("Comparisons", names))


def _contents(caption: str, names: Iterable[str]) -> str:
    lines = "\n".join(names)
    return f"\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{lines}\n```\n"


def _page(text: str, objects: Mapping[str, str]) -> str:
    """A page with links as they are on the site; names of the library link to the reference."""

    def outside(part: str) -> str:
        part = re.sub(r"\]\((\.\./)*(notebooks/\w+)\.ipynb\)", r"](\2.md)", part)
        part = re.sub(r"\]\((\.\./)+", "](", part)
        return re.sub(r"(?<!\[)`(?:optax_decay\.)?(\w+)(\(\))?`", link, part)

    def link(found: re.Match[str]) -> str:
        shown = found.group(0).strip("`")
        target = objects.get(found.group(1))
        return f"{{py:obj}}`{shown} <{target}>`" if target else found.group(0)

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else outside(part) for part in parts)


def _notebook(notebook: Mapping, folder: pathlib.Path, name: str) -> str:
    """A notebook as Markdown: its text, its code but for the set-up, and what the code printed and drew."""
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_page(source, {}))
            continue
        if "setup" not in cell["metadata"].get("tags", ()):
            parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{number}.png"
                (folder / picture).write_bytes(base64.b64decode("".join(data["image/png"])))
                parts.append(f"![The picture that this code draws]({picture})")
            elif printed := "".join(output.get("text") or data.get("text/plain", ())).rstrip():
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"
