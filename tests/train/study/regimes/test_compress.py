"""Compressed weights: exact shares and levels, files that are checked, and a known difference that is found."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.drawings import is_drawn
from train.config.fields import UserError
from train.study.regimes import compress, compress_report
from train.study.regimes import main as command
from train.study.regimes.compress import Compress
from train.study.regimes.repeated import Repeated


def test_pruning_takes_the_smallest_share_of_every_layer():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 10, 20)) * np.array([1, 10, 100])[:, None, None])
    found = compress.prune(w, 0.3)
    zero = np.asarray(found == 0).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(zero, 0.3, atol=0.006)
    for before, after in zip(np.asarray(w).reshape(3, -1), np.asarray(found).reshape(3, -1)):
        assert np.abs(before[after == 0]).max() < np.abs(after[after != 0]).min()
    flat = compress.prune(w[0], 0.9)
    assert float((flat == 0).mean()) == pytest.approx(0.9, abs=0.006)


def test_rounding_keeps_levels_and_ends_of_rows():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(7, 30)))
    for largest in compress.LEVELS.values():
        found = compress.rounded(w, largest)
        step = jnp.abs(w).max(axis=1, keepdims=True) / largest
        assert float(jnp.abs(found - w).max() / step.min()) < 0.51 * float(step.max() / step.min())
        units = np.asarray(found / step)
        np.testing.assert_allclose(units, np.round(units), atol=1e-4)
        assert np.abs(units).max() == pytest.approx(largest)
    assert (compress.rounded(jnp.zeros((2, 3)), 7) == 0).all()


def test_the_free_share_is_read_off_lines():
    record = {"loss": 2.0, "pruned": [2.01, 2.03, 2.5]}
    assert compress_report.free_share(record, (0.2, 0.4, 0.6)) == pytest.approx(0.3)
    assert compress_report.free_share(record | {"pruned": [2.0] * 3}, (0.2, 0.4, 0.6)) == 0.6
    assert compress_report.free_share(record | {"pruned": [np.inf] * 3}, (0.2, 0.4, 0.6)) == 0.0


@pytest.fixture
def source(finished):
    return finished.folder.parent


def test_weights_are_measured_without_training(source):
    made = ["compress", "smoke", "--source", str(source / "repeated"), "--processes", "1"]
    command.main([*made, "--folder", str(source / "compress")])
    lines = [
        json.loads(x) for x in (source / "compress" / "results.jsonl").read_text().splitlines()
    ]
    before = [
        json.loads(x) for x in (source / "repeated" / "results.jsonl").read_text().splitlines()
    ]
    trained = {(r["arm"], r["seed"]): r["loss"] for r in before if "weights" in r}
    assert len(lines) == len(trained) == 4 * 4
    for r in lines:
        assert r["loss"] == pytest.approx(trained[r["arm"], r["seed"]], rel=1e-5)
        assert abs(r["int8"] - r["loss"]) < 0.05 and 1 < r["bits"] < 9
    text = (source / "compress" / "report.md").read_text()
    assert ("AdamHD" in text and "not resolved" in text) or "pruned" in text
    assert is_drawn(source / "compress" / "compress.png")


def test_changed_or_missing_weights_are_refused(source, tmp_path):
    regime = Compress(str(source / "repeated"), folder=str(tmp_path))
    (jobs,) = regime.wanted("huber " + regime.units()[0].partition(" ")[2], [])
    path = source / "repeated" / "weights" / jobs[0]["weights"].split()[0]
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(UserError, match="checksum"):
        list(regime.train(jobs, tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(regime.train(jobs, tmp_path))
    path.write_bytes(content)
    assert len(list(regime.train(jobs, tmp_path))) == 4


def test_a_known_difference_is_found(source):
    regime = Compress(str(source / "repeated"))
    records = []
    for unit in regime.units():
        for (job,) in ([job] for jobs in regime.wanted(unit, []) for job in jobs):
            noise = 0.01 * np.random.default_rng([job["seed"], len(job["arm"])]).standard_normal()
            worse = 0.2 * (job["arm"] == "none")
            pruned = [2 + s * (1 + worse) + noise for s in regime.shares]
            records.append(
                job | {"loss": 2 + noise, "pruned": pruned, "int8": 2.0, "int4": 2.1, "bits": 6.0}
            )
    table = {row.arm: row for row in compress_report.rows(regime, records)}
    assert table["none"].verdict == "worse" and table["none"].pruned.interval.holds(0.1)
    assert table["huber"].verdict.startswith("differs by less than")
    assert compress_report.failed(regime, records) == []
    split = [r | {"pruned": [x + 0.3 * (r["seed"] > 1) for x in r["pruned"]]} for r in records]
    assert "halves" in compress_report.failed(regime, split)[0]
    assert jax.tree.leaves(table["none"].records)


def test_arms_are_compared_with_all_searches_of_l2_and_their_luck_is_in_the_intervals(tmp_path):
    before = Repeated(texts=("one",), arms=("huber",), tunings=3, seeds=6)
    fields = dataclasses.asdict(before)
    (tmp_path / "comparison.json").write_text(json.dumps(fields))
    levels = {"l2": 2.0, "l2_tuned_2": 2.1, "l2_tuned_3": 2.2, "huber": 2.1, "none": 3.0}
    rng = np.random.default_rng(0)
    records = [
        {"arm": arm, "text": "one", "seed": seed, "loss": 2.0, "int8": 2.0, "int4": 2.0}
        | {"bits": 6.0, "pruned": [level + 0.001 * float(rng.standard_normal())] * 3}
        for arm, level in levels.items()
        for seed in range(6)
    ]
    regime = Compress(str(tmp_path), shares=(0.25, 0.5, 0.75))
    table = {row.arm: row for row in compress_report.rows(regime, records)}
    assert set(table) == {"none", "l2", "huber"}, "further searches are no rows of their own"
    difference = table["huber"].pruned.interval
    assert difference.value == pytest.approx(0.0, abs=0.01)
    assert difference.high - difference.low > 0.4 and table["huber"].verdict.startswith("differs")
    summary = compress_report._summary(regime, list(table.values()), records)
    # 0.02 nats are reached at shares of 0.75, 0.05 and 0.025 after its three searches.
    assert any(line.startswith("| L2 | 2") and " 28 % " in f" {line} " for line in summary)
    alone = [r for r in records if "tuned" not in r["arm"]]
    table = {row.arm: row for row in compress_report.rows(regime, alone)}
    assert table["huber"].pruned.interval.low > 0.09 and table["huber"].verdict == "worse"
