"""The reference describes every public name, and every docstring is well-formed."""

import re

import pytest

import optax_decay
from train import reference
from train.errors import UserError


def test_every_public_name_needs_a_heading():
    source = '"""A docstring.\n\n# no heading\n"""\n\nfrom a import b as b\n'
    more = "from c import d\n\n# Others.\nfrom e import f as g\n"
    names = reference.imported_names(source.replace("from a", "# Decays.\nfrom a") + more)
    assert names == {"b": "Decays", "d": "Decays", "g": "Others"}
    with pytest.raises(LookupError, match=r"optax_decay\.b has no heading"):
        reference.imported_names(source.replace("# no", "no"))


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(UserError, match="other files"):
        reference.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_the_site(tmp_path, capsys):
    """Built twice into one folder: malformed docstrings are errors, see `reference.build`."""
    out = tmp_path / "site"
    assert reference.main(["--out", str(out)]) == 0
    assert "index.html" in capsys.readouterr().out
    text = "".join(path.read_text() for path in out.glob("*.html"))
    described = set(re.findall(r'id="optax_decay\.[a-z_.]+\.(\w+)"', text))
    titles = reference.headings()
    names = {value.__name__ for values in titles.values() for value in values}
    assert len(names) > 80
    assert names <= described, sorted(names - described)
    top = {v.__name__ for title, values in titles.items() if "." not in title for v in values}
    assert top <= set(dir(optax_decay)) and len(top) > 40
    # Equations and the differences from the papers, not signatures alone.
    assert "Alias for field number" not in text and "__new__" not in text
    (decays,) = [p.read_text() for p in out.glob("decays*.html")]
    assert "arXiv 2511.14721" in decays and "Differs from the paper." in decays
