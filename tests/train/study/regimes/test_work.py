"""The runs of a regime: what is there is not trained again, what is strange is left out, processes share the work."""

import dataclasses
import importlib
import json
import os
import pathlib

import pytest

from train.config.fields import UserError
from train.study import results
from train.study.regimes import main as command
from train.study.regimes.compress import Compress
from train.study.regimes.work import known, run_all


@dataclasses.dataclass(frozen=True)
class Doubling:
    """Units whose second list depends on the first."""

    seeds: int = 3
    broken: str = ""

    def units(self):
        return ["a", "b", "c"]

    def wanted(self, unit, results):
        base = {"arm": unit, "text": "t"}
        yield [base | {"weight_decay": 1.0, "seed": seed} for seed in range(self.seeds)]
        best = min(results, key=lambda r: r["loss"])["seed"]
        yield [base | {"weight_decay": 2.0, "seed": 100 + best}]

    def train(self, jobs, folder):
        for job in jobs:
            if job["arm"] == self.broken:
                os._exit(7)
            yield job | {"loss": 1.0 + ((job["seed"] + 1) % 3), "seconds": 0.0, "who": os.getpid()}


def trained(regime, folder, stop=lambda: False, processes=1):
    path = folder / "results.jsonl"
    run_all(regime, results.read(path), path, stop, processes=processes, expected=12)
    return known(regime, results.read(path))


def test_all_runs_in_order_and_none_twice(tmp_path):
    found = trained(Doubling(), tmp_path)
    assert [r["arm"] for r in found.records] == [x for x in "abc" for _ in range(4)]
    assert [r["seed"] for r in found.records[:4]] == [0, 1, 2, 102] and not found.missing
    before = (tmp_path / "results.jsonl").read_text()
    trained(Doubling(), tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == before


def test_a_stop_after_any_run_loses_none(tmp_path):
    seen = []
    for count in range(1, 13):
        found = trained(Doubling(), tmp_path, lambda: True)
        assert len(found.records) == count and found.missing == (count < 12)
        seen.append(found.records)
    assert all(r in seen[-1] for some in seen for r in some)


def test_lines_of_other_runs_are_left_out(tmp_path):
    whole = trained(Doubling(), tmp_path)
    path = tmp_path / "results.jsonl"
    results.append(
        path,
        [{"arm": "a", "text": "t", "weight_decay": 3.0, "seed": 0, "loss": 0.0, "seconds": 1.0}],
    )
    lines = path.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["loss"] = 0.5  # its check does not fit any more
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    found = known(Doubling(), results.read(path))
    # Without the first run the second list of its unit is not known either.
    assert found.missing and found.strange == 2
    assert [r for r in found.records if r["arm"] != "a"] == whole.records[4:]
    assert trained(Doubling(), tmp_path).records[1:4] == whole.records[1:4]


def test_processes_share_the_units(tmp_path):
    alone = trained(Doubling(), tmp_path / "one") if (tmp_path / "one").mkdir() is None else None
    (tmp_path / "two").mkdir()
    both = trained(Doubling(), tmp_path / "two", processes=2)
    assert alone is not None and not both.missing
    drop = lambda records: [{k: v for k, v in r.items() if k != "who"} for r in records]
    assert drop(both.records) == drop(alone.records)
    assert os.getpid() not in {r["who"] for r in both.records}
    assert {r["who"] for r in alone.records} == {os.getpid()}


def test_a_process_that_dies_is_reported_and_nothing_is_lost(tmp_path):
    with pytest.raises(UserError, match=r"ended with 7.*--processes 1"):
        trained(Doubling(broken="b"), tmp_path, processes=2)
    found = trained(Doubling(), pathlib.Path(tmp_path))
    assert not found.missing


@pytest.mark.parametrize("name", command.REGIMES)
def test_a_comparison_without_flags_is_in_the_folder_of_its_tier(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Compress, "check", lambda self: None)  # there are no weights
    module = importlib.import_module(command.REGIMES[name])
    for tier, make in module.TIERS.items():
        assert command.parse(name, module, [tier]).folder == make().folder
        assert command.parse(name, module, [tier, "--fresh_seeds", "3"]).folder == (
            f"{make().folder}-seeds-3"
        )
