"""The reference describes every public name, and every docstring is well-formed."""

import html.parser
import re
import urllib.parse

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


# The parser of Markdown uses an attribute that a later Sphinx will lack.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated. Check CHANGES for Sphinx")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The site. Malformed pages and docstrings are errors, see `reference.build`."""
    pytest.importorskip("myst_parser")
    return tmp_path_factory.mktemp("built") / "site"


class Links(html.parser.HTMLParser):
    """Where a page leads, and the places in it that can be led to."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.places = [], set()
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        self.targets += [values[name] for name in ("href", "src") if values.get(name)]


def test_the_site(out, capsys):
    assert reference.main(["--out", str(out)]) == 0
    assert "index.html" in capsys.readouterr().out
    text = "".join(path.read_text() for path in out.rglob("*.html"))
    described = set(re.findall(r'id="optax_decay\.[a-z_.]+\.(\w+)"', text))
    titles = reference.headings()
    names = {value.__name__ for values in titles.values() for value in values}
    assert len(names) > 80
    assert names <= described, sorted(names - described)
    top = {v.__name__ for title, values in titles.items() if "." not in title for v in values}
    assert top <= set(dir(optax_decay)) and len(top) > 40
    # Equations and the differences from the papers, not signatures alone.
    assert "Alias for field number" not in text and "__new__" not in text
    (decays,) = [p.read_text() for p in out.glob("reference/decays*.html")]
    assert "arXiv 2511.14721" in decays and "Differs from the paper." in decays
    # Defaults are shown as calls, not as what Python prints of functions.
    assert "&lt;function" not in text and "&lt;locals" not in text and " at 0x" not in text
    assert "mean_size()" in decays and "l2()" in decays
    # Every page leads to every other through the contents, and to places that exist.
    pages = {page.resolve(): Links(page) for page in out.rglob("*.html")}
    assert len(pages) > 30
    inside = 0
    for page, links in pages.items():
        for link in links.targets:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / urllib.parse.unquote(parts.path)).resolve()
            target = page if not parts.path else target
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target in pages and page.name != "search.html":
                inside += 1
                place = urllib.parse.unquote(parts.fragment)
                assert place in pages[target].places, f"{page.name}: {link}"
    assert inside > 500
    first = Links(out / "index.html").targets
    for name in ("first_decay", "coming_from_pytorch", "which_decay_when", "gpu_and_tpu", "papers"):
        assert f"{name}.html" in first
    # Names of the library lead to the reference, and the search knows the pages.
    assert "#optax_decay.decays.huber.huber_decay" in (out / "which_decay_when.html").read_text()
    assert "first_decay" in (out / "searchindex.js").read_text()


def test_a_malformed_page_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("myst_parser")
    monkeypatch.setattr(reference, "pages", lambda: {"index": "Reference\n=========\n"})

    def write(root, source, objects):
        text = "# Title\n\n[nowhere](nowhere.md)\n\n```{toctree}\nreference/index\n```\n"
        (source / "index.md").write_text(text)

    monkeypatch.setattr(reference, "write", write)
    with pytest.raises(UserError, match=r"not well-formed(?s:.*)nowhere"):
        reference.build(tmp_path / "site")
