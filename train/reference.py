"""`python -m train reference`: the library's reference as a static site, from its docstrings.

    python -m train reference --out site      # then open site/index.html

One page per topic, one section per file: the file's docstring, which is where equations, units and differences from
papers stand, and below it the public names that live there. A public name that no topic lists is an error, and so is
every warning of the builder: a broken table, a heading that is none.
"""

import contextlib
import dataclasses
import importlib
import io
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import tyro

import optax_decay
from train.config.fields import UserError
from train.display import say

TOPICS: dict[str, tuple[str, ...]] = {
    "Decays": (
        "decay",
        "huber_decay",
        "spectral_alpha_decay",
        "width_scaled_decay",
        "cautious_decay",
        "corrected_decay",
        "awd_decay",
        "adadecay",
        "lp_decay",
        "elastic_net_decay",
        "target_norm_decay",
        "stable_decay",
        "cpr_decay",
        "rotational",
    ),
    "Optimizers": ("conda", "root", "sophia", "curvature", "exadam", "one_bit_adam"),
    "Parts of a product": ("pulls", "quantity", "couplings", "product", "metrics"),
    "Parameters": ("axes", "masks"),
    "Spectra": (
        "spectra",
        "tail_exponents",
        "chebyshev",
        "orthogonal",
        "top_singular_values",
        "spectral_gain_report",
        "spectral_memory",
        "spectral_refresh",
        "newton_fit",
        "newton_coefficients",
        "quantile",
    ),
    "Width": ("width_laws", "width_factors", "width_table"),
    "Diagnostics and applying updates": ("diagnostics", "apply_updates", "skip_on_spike"),
    "1-bit Adam, inside": ("sign_compression", "one_bit_state", "variance_freeze"),
}
SETTINGS = {
    "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon"],
    "html_theme": "alabaster",
    "html_theme_options": {"page_width": "1100px", "description": "weight decay for JAX"},
    "html_show_sourcelink": False,
    "autodoc_typehints": "none",
    "autodoc_member_order": "bysource",
    "autodoc_class_signature": "separated",
    "default_role": "code",
    "toc_object_entries": False,
    "napoleon_use_ivar": True,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Where to."""

    out: str = "site"
    """Folder for the pages; of an earlier reference, they are replaced."""


def public() -> dict[str, list[str]]:
    """Public names by the file that they come from; extras such as skipping have files of their own."""
    found: dict[str, list[str]] = {}
    for name in dir(optax_decay):
        home = getattr(getattr(optax_decay, name), "__module__", None)
        if name.startswith("_") or not home or not home.startswith("optax_decay."):
            continue
        found.setdefault(home.removeprefix("optax_decay."), []).append(name)
    return found


def pages() -> dict[str, str]:
    """Name to reStructuredText of every page.

    Raises:
        LookupError: a public name lives in a file that no topic lists.
    """
    names = public()
    listed = {file for files in TOPICS.values() for file in files}
    if missing := sorted(set(names) - listed):
        raise LookupError(f"TOPICS in train/reference.py does not list {', '.join(missing)}.")
    contents: dict[str, str] = {}
    for topic, files in TOPICS.items():
        parts = [topic, "=" * len(topic), ""]
        for file in files:
            parts += [file, "-" * len(file), "", f".. automodule:: optax_decay.{file}"]
            if file in names:
                members = ", ".join(sorted(names[file]))
                parts += [f"   :members: {members}"]
            else:
                parts += ["   :members:"]
            parts += [""]
        contents[topic.lower().replace(" ", "-").replace(",", "")] = "\n".join(parts)
    first = (importlib.import_module("optax_decay").__doc__ or "").strip()
    toc = ["", "", ".. toctree::", "   :maxdepth: 2", "", *(f"   {name}" for name in contents)]
    title = "optax_decay"
    return {"index": "\n".join([title, "=" * len(title), "", first, *toc, ""]), **contents}


def build(out: pathlib.Path) -> None:
    """Writes the site.

    Raises:
        UserError: the builder is not installed, the folder holds something else, or a docstring is malformed.
    """
    try:
        from sphinx.application import Sphinx
    except ImportError:
        raise UserError("The reference is built by Sphinx: pip install sphinx") from None
    if out.exists() and any(out.iterdir()) and not (out / "objects.inv").exists():
        raise UserError(f"--out {out} holds other files; name a new folder.")
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder)
        for name, text in pages().items():
            (source / f"{name}.rst").write_text(text)
        (source / "conf.py").write_text('project = "optax_decay"\n')
        shutil.rmtree(out, ignore_errors=True)
        told = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()):
            site = Sphinx(
                *(source, source, out, source / "doctrees", "html"),
                confoverrides=SETTINGS,
                status=None,
                warning=told,
            )
            site.connect("autodoc-skip-member", _says_nothing)
            site.build()
    if told.getvalue():
        raise UserError(f"Docstrings are not well-formed:\n{told.getvalue()}")


def _says_nothing(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> Any:
    """What Python adds to a NamedTuple, whose fields its docstring describes; None: as it would be."""
    words = getattr(member, "__doc__", None) or ""
    return True if name == "__new__" or words.startswith("Alias for field number") else None


def main(arguments: list[str]) -> int:
    options = tyro.cli(
        Options, args=arguments, prog="python -m train reference", description=__doc__
    )
    out = pathlib.Path(options.out)
    build(out)
    say(f"{out / 'index.html'}: {sum(1 for _ in out.glob('*.html'))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
