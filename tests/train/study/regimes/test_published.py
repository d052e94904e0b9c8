"""The published results: every page follows from its lines, its controls hold, and RESULTS.md says what it says."""

import ast
import json
import re

import pytest

from tests.support import published
from train.study.regimes import map as regime_map
from train.study.results import RESULTS, read

WHERE = published.ROOT / published.PUBLISHED
NAMES = [name for name in published.NAMES if published.folder_of(name, WHERE).exists()]
SUMMARY = (published.ROOT / "RESULTS.md").read_text("utf-8")
TABLE = re.compile(r"^\|.*\n\| ---.*\n(?:\|.*\n)+", re.M)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(published.ROOT)


def page(name):
    return (published.folder_of(name, WHERE) / "report.md").read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_follows_from_its_lines(name, tmp_path):
    assert published.report(name, published.folder_of(name, WHERE), tmp_path) == []
    assert (tmp_path / "report.md").read_text("utf-8") == page(name)
    for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", page(name)):
        assert (published.folder_of(name, WHERE) / picture).exists(), picture
        assert (tmp_path / picture).exists(), picture


@pytest.mark.parametrize("name", NAMES)
def test_its_lines_are_all_runs_of_its_plan_and_no_others(name):
    folder = published.folder_of(name, WHERE)
    regime, records, missing = published.plan(name, folder)
    assert not missing and len(records) == len(read(folder / RESULTS))
    if name == "grokking_small":
        assert len(records) == regime.expected()
    else:
        assert len(records) > 100
    assert getattr(regime, "seeds", 12) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_results_quotes_the_page(name):
    """The section that links to a page holds whole tables of that page, and no others."""
    link = f"({published.PUBLISHED}/compare-{name}-{published.TIER}/report.md)"
    (section,) = [part for part in re.split(r"^## ", SUMMARY, flags=re.M) if link in part]
    tables = TABLE.findall(section)
    assert tables
    for table in tables:
        assert table in page(name)


def test_the_map_follows_from_the_lines(tmp_path):
    where = ["--runs", str(published.PUBLISHED), "--folder", str(tmp_path)]
    assert regime_map.main(where) == 0
    made = (tmp_path / "map.md").read_text("utf-8")
    assert made == (WHERE / "compare-map" / "map.md").read_text("utf-8")
    table = TABLE.search(made)
    assert table and table[0] in SUMMARY


def test_the_notebook_trains_at_the_published_points():
    source = (published.ROOT / "notebooks" / "07_where_decay_matters.py").read_text("utf-8")
    (cell,) = re.findall(r"^points = (\[.*?^\])", source, re.M | re.S)
    found = json.loads((published.folder_of("repeated", WHERE) / "points.json").read_text())
    for point in ast.literal_eval(cell):
        assert point in found


def test_nothing_published_is_large_or_names_a_machine():
    for path in WHERE.rglob("*"):
        if path.is_file():
            assert path.stat().st_size < 3_000_000, path
            if path.suffix != ".png":
                text = path.read_text("utf-8")
                assert not re.search(r"[\s\"'](/\w+/|[A-Z]:\\)", text), path
