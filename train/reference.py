"""`python -m train reference`: builds the documentation as a static site, with a search field.

    python -m train reference --out site      # then open site/index.html

The site holds the pages of docs/, the notebooks, the results, and the reference, which is made of docstrings. In the
reference there is one page for each heading in `optax_decay/__init__.py`, and one for each namespace, such as
`optax_decay.width`. A page has one section for each file: the docstring of the file, which holds equations, units and
differences from papers, and its public names. A public name without a heading is an error, and so is every warning of
Sphinx, such as for a malformed table.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import pathlib
import re
import shutil
import sys
import tempfile
import types
from typing import Any

import tyro

import optax_decay
from train.display import say
from train.errors import UserError
from train.pages import write
from train.run.folder import ROOT

SETTINGS = {
    "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"],
    "myst_heading_anchors": 3,
    "html_theme": "alabaster",
    "html_theme_options": {
        "page_width": "1200px",
        "sidebar_width": "250px",
        "description": "Weight decay for JAX",
        "code_font_size": "0.82em",
        "font_family": "system-ui, sans-serif",
        "head_font_family": "system-ui, sans-serif",
    },
    "html_title": "optax_decay",
    "html_show_sourcelink": False,
    "autodoc_typehints": "none",
    "add_module_names": False,
    "autodoc_member_order": "bysource",
    "autodoc_class_signature": "separated",
    "default_role": "code",
    "toc_object_entries": False,
    "napoleon_use_ivar": True,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the site is written."""

    out: str = "site"
    """Folder for the pages. An earlier site in it is replaced."""


def imported_names(source: str) -> dict[str, str]:
    """The names that a module imports, in order, each with the heading above it: a comment on its own line.

    Raises:
        LookupError: there is no heading above a name.
    """
    lines, names, body = source.splitlines(), {}, ast.parse(source).body
    start = body[0].end_lineno or 0  # of the docstring
    for node in body[1:]:
        if isinstance(node, ast.ImportFrom):
            above = [line[2:] for line in lines[start : node.lineno] if line.startswith("# ")]
            for alias in node.names:
                if not above:
                    raise LookupError(f"optax_decay.{alias.name} has no heading above it.")
                names[alias.asname or alias.name] = above[-1].rstrip(".")
    return names


def headings() -> dict[str, list[Any]]:
    """Public classes and functions of the library by title: of the headings, then of the namespaces."""
    found: dict[str, list[Any]] = {}
    namespaces: dict[str, list[Any]] = {}
    for name, heading in imported_names(inspect.getsource(optax_decay)).items():
        value = getattr(optax_decay, name)
        if isinstance(value, types.ModuleType):
            namespaces[f"optax_decay.{name}"] = list(members(value))
        elif _is_documented(value):
            found.setdefault(heading, []).append(value)
    return found | namespaces


def members(namespace: types.ModuleType) -> list[Any]:
    """Public classes and functions of a namespace: those that its file defines, or else those that it imports."""
    values = [value for name, value in vars(namespace).items() if not name.startswith("_")]
    values = [value for value in values if _is_documented(value)]
    own = [value for value in values if value.__module__ == namespace.__name__]
    return own or values


def _is_documented(value: Any) -> bool:
    home = getattr(value, "__module__", None) or ""
    return home.startswith("optax_decay.") and (inspect.isclass(value) or inspect.isfunction(value))


def pages() -> dict[str, str]:
    """File name to reStructuredText, for every page.

    Raises:
        LookupError: there is no heading above a public name.
    """
    contents: dict[str, str] = {}
    shown: set[Any] = set()  # files and names that have a place on an earlier page
    for title, values in headings().items():
        parts = [title, "=" * len(title), ""]
        if title.startswith("optax_decay."):
            namespace = getattr(optax_decay, title.removeprefix("optax_decay."))
            if namespace.__name__ not in {value.__module__ for value in values}:
                parts += [inspect.getdoc(namespace) or "", ""]
        by_file: dict[str, list[Any]] = {}
        for value in values:
            if value not in shown:
                by_file.setdefault(value.__module__, []).append(value)
        for file, own in by_file.items():
            parts += _section(file, own, with_docstring=file not in shown)
        shown |= {*values, *by_file}
        contents[title.lower().replace(" ", "-").replace(",", "")] = "\n".join(parts)
    first = inspect.getdoc(optax_decay) or ""
    toc = ["", "", ".. toctree::", "   :maxdepth: 2", "", *(f"   {name}" for name in contents)]
    title = "Reference"
    return {"index": "\n".join([title, "=" * len(title), "", first, *toc, ""]), **contents}


def objects() -> dict[str, str]:
    """Public names, and the names under which the reference describes them."""
    values = [value for title, found in headings().items() if "." not in title for value in found]
    return {value.__name__: f"{value.__module__}.{value.__name__}" for value in values}


def _section(file: str, values: list[Any], with_docstring: bool) -> list[str]:
    title = file.removeprefix("optax_decay.")
    lines = [title, "-" * len(title), ""]
    names = [value.__name__ for value in values]
    if with_docstring:
        return [*lines, f".. automodule:: {file}", f"   :members: {', '.join(names)}", ""]
    lines += [f".. currentmodule:: {file}", ""]
    for value in values:
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        lines += [f".. {kind}:: {value.__name__}", ""]
    return lines


def build(out: pathlib.Path) -> None:
    """Writes the site.

    Raises:
        UserError: this is no checkout, Sphinx is not installed, the folder holds other files, or a page or docstring
            is malformed.
    """
    try:
        import myst_parser  # noqa: F401
        from sphinx.application import Sphinx
    except ImportError as missing:
        raise UserError(
            f"The site needs the package {missing.name}; install it with pip install sphinx myst-parser."
        ) from None
    if not (ROOT / "docs").is_dir():
        raise UserError("The site is made in a checkout: the installed program has no docs folder.")
    if out.exists() and any(out.iterdir()) and not (out / "objects.inv").exists():
        raise UserError(f"--out {out} holds other files; name a new folder.")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "source"
        (source / "reference").mkdir(parents=True)
        for name, text in pages().items():
            (source / f"reference/{name}.rst").write_text(text)
        write(ROOT, source, objects())
        (source / "conf.py").write_text('project = "optax_decay"\n')
        shutil.rmtree(out, ignore_errors=True)
        warnings = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            site = Sphinx(
                *(source, source, out, pathlib.Path(folder) / "doctrees", "html"),
                confoverrides=SETTINGS,
                status=None,
                warning=warnings,
            )
            site.connect("autodoc-skip-member", _is_uninformative)
            site.connect("autodoc-process-signature", _signature)
            site.build()
    if warnings.getvalue():
        raise UserError(f"Pages or docstrings are not well-formed:\n{warnings.getvalue()}")


def _is_uninformative(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """True for members that Python adds to a NamedTuple, whose docstring describes the fields; None for others."""
    words = getattr(member, "__doc__", None) or ""
    return True if name == "__new__" or words.startswith("Alias for field number") else None


def _signature(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, result: Any
) -> tuple[str, None] | None:
    """The arguments of a function as a reader would write them."""
    if what != "function":
        return None
    parameters = [
        parameter.replace(annotation=parameter.empty)
        if parameter.default is parameter.empty
        else parameter.replace(annotation=parameter.empty, default=_Shown(parameter.default))
        for parameter in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(parameters)), None


class _Shown:
    """A default whose repr is the call that makes it: ``l2()``, not a tuple of functions."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        text = repr(self.value)
        if hasattr(self.value, "__name__"):
            return self.value.__name__
        if "<function" not in text and not hasattr(self.value, "name"):
            return text
        maker = re.search(r"<function (\w+)\.<locals>", text)
        found = getattr(self.value, "name", None) or (maker[1] if maker else None)
        return f"{found}()" if found else text


def main(arguments: list[str]) -> int:
    options = tyro.cli(
        Options, args=arguments, prog="python -m train reference", description=__doc__
    )
    out = pathlib.Path(options.out)
    build(out)
    say(f"{out / 'index.html'}: {sum(1 for _ in out.rglob('*.html'))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
