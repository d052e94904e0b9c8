"""The map: gains with their signs, hollow cells, and columns whose controls fail are left out."""

import dataclasses
import json
import math

import pytest

from tests.support.drawings import is_drawn
from tests.train.study.regimes import test_ending, test_grokking, test_repeated
from train.study import results
from train.study.regimes import map as regime_map
from train.study.regimes.ending import Ending
from train.study.regimes.grokking import Grokking
from train.study.regimes.main import APART
from train.study.regimes.repeated import Repeated

MADE = {
    "repeated": (Repeated(texts=("one", "two"), arms=test_repeated.ARMS_HERE), test_repeated),
    "grokking": (Grokking(arms=("huber", "cautious", "stable")), test_grokking),
    "ending": (Ending(texts=("one", "two")), test_ending),
}


@pytest.fixture
def runs(tmp_path):
    for name, (regime, module) in MADE.items():
        folder = tmp_path / f"compare-{name}-cpu"
        folder.mkdir()
        fields = {k: v for k, v in dataclasses.asdict(regime).items() if k not in APART}
        (folder / "comparison.json").write_text(json.dumps(fields))
        results.append(folder / "results.jsonl", module.simulated(regime))
    return tmp_path


def test_what_was_put_in_is_on_the_map(runs, capsys):
    assert regime_map.main(["--runs", str(runs), "--folder", str(runs / "map")]) == 0
    options = regime_map.Map(runs=str(runs))
    columns, forgiving = regime_map.collect(options)
    repeated = columns["repeated text"]
    assert repeated["huber"].gain == pytest.approx(0.05, abs=0.02) and repeated["huber"].resolved
    assert repeated["none"].gain < -0.2 and not repeated["cautious"].resolved
    assert columns["repeated text,\nMuon"]["none"].gain < -0.3
    grokking = columns["grokking\n(ln steps)"]
    assert grokking["huber"].gain == pytest.approx(-math.log(2), abs=0.1)
    assert grokking["stable"].gain == -math.inf
    assert columns["rise at the end\n(ln ratio)"]["corrected"].gain > 0.3
    table = (runs / "map" / "map.md").read_text()
    assert ("| rarely |" in table and "(+" in table) or "(-" in table
    assert forgiving["huber"] and is_drawn(runs / "map" / "map.png")
    assert "one_pass" in capsys.readouterr().out  # is not there


def test_a_column_whose_control_fails_is_left_out(runs, capsys):
    path = runs / "compare-repeated-cpu" / "results.jsonl"
    lines = results.read(path)
    path.unlink()
    results.append(path, [r | {"loss": r["loss"] + (r["arm"] == "again")} for r in lines])
    columns, _ = regime_map.collect(regime_map.Map(runs=str(runs)))
    assert "repeated text" not in columns and "left out" in capsys.readouterr().out
    assert len(columns) == 2
