"""The reference holds every public name, and every docstring is well-formed."""

import re

import pytest

import optax_decay
from train import reference
from train.config.fields import UserError


def test_a_file_that_no_topic_lists_is_an_error(monkeypatch):
    topics = dict(reference.TOPICS)
    topics["Optimizers"] = tuple(file for file in topics["Optimizers"] if file != "conda")
    monkeypatch.setattr(reference, "TOPICS", topics)
    with pytest.raises(LookupError, match="conda"):
        reference.pages()


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
    described = set(re.findall(r'id="optax_decay\.[a-z_]+\.(\w+)"', text))
    names = {name for found in reference.public().values() for name in found}
    assert len(names) > 80
    assert names <= described, sorted(names - described)
    assert names <= set(dir(optax_decay))
    # Equations and the differences from the papers, not signatures alone.
    decays = (out / "decays.html").read_text()
    assert "Alias for field number" not in text and "__new__" not in text
    assert "arXiv 2511.14721" in decays and "Differs from the paper." in decays
