"""The end of the schedule: ratios by hand, and a rise that was put in is found."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.runs import write_text
from train.study.population import Member, population
from train.study.regimes import ending, ending_report, texts
from train.study.regimes.ending import Ending
from train.study.regimes.repeated import AGAIN
from train.study.regimes.tenths import PARTS, means, record_tenths
from train.study.regimes.work import known
from train.study.small_runs import SmallTask

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=5
)


def test_ratios_by_hand():
    axes = [("w", "L | D -> F"), ("head", "D -> V"), ("norm", "D")]
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 3, 4)), "head": rng.normal(size=(3, 5)), "norm": np.ones(3)}
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.chain(optax.scale(2.0), record_tenths(20, axes))
    state, expected = tx.init(params), []
    for _ in range(20):
        g = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), params)
        out, state = tx.update(g, state, params, gradients=g)
        np.testing.assert_allclose(out["w"], 2 * g["w"])
        norms = [np.linalg.norm(g["w"][i]) / np.linalg.norm(params["w"][i]) for i in range(2)]
        expected.append(np.mean(np.log(norms)))
    pairs = np.array(expected).reshape(PARTS, 2).mean(axis=1)
    np.testing.assert_allclose(means(state), pairs, rtol=1e-5)


def test_runs_keep_their_ratios_side_by_side(tmp_path):
    data = texts.read(TINY, str(write_text(tmp_path)), 2000)
    small = ending.program(TINY, "corrected", data.vocab_size, 20)
    members = [Member(0.02, 1.0, 3), Member(0.01, 0.3, 4)]
    look = ending.ratios_of(small)
    alone, together = (
        [x.seen for x in population(small, members, data, 20, together=t, look=look)]
        for t in (False, True)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-3)
    assert alone[0].shape == (PARTS,) and np.isfinite(alone).all()
    assert np.abs(alone[0] - alone[1]).max() > 0.05


def simulated(regime):
    lines = []
    for unit in regime.units():
        for jobs in regime.wanted(unit, []):
            for job in jobs:
                rng = np.random.default_rng([job["seed"], len(job["arm"]), len(job["text"]), 7])
                rise = 0.0 if job["arm"] == "corrected" else 1.0
                ratios = np.linspace(0, rise, PARTS) * math.log(2) + rng.normal(0, 0.02, PARTS)
                loss = 2.0 + 0.05 * (job["arm"] == "none") + rng.normal(0, 0.01)
                lines.append(job | {"loss": loss, "log_ratios": ratios.tolist(), "seconds": 0.1})
    return lines


def test_a_rise_that_was_put_in_is_found():
    regime = Ending(texts=("one", "two"))
    regime.check()
    lines = simulated(regime)
    records = known(regime, lines).records
    assert len(records) == len(lines) == regime.expected()
    assert ending_report.failed(regime, records) == []
    table = {(r.point.arm, r.point.text): r for r in ending_report.rows(regime, records)}
    corrected = table["corrected", "two"]
    assert corrected.verdict.endswith("rises less") and corrected.less.interval.holds(-5 / 9)
    assert table["none", "one"].verdict.startswith("rise differs by less than 0.0")
    assert table["l2", "one"].rise.interval.holds(5 / 9) and not table["l2", "one"].verdict
    text = "\n".join(ending_report._claims(regime, list(table.values())))
    assert "| reproduced |" in text
    broken = [r | {"loss": r["loss"] + 0.1 * (r["seed"] >= AGAIN)} for r in records]
    assert len(ending_report.failed(regime, broken)) == 2
    half = [r for r in records if r["text"] == "one"]
    assert ending_report.failed(regime, half) == ["two: the control is not finished."]


def test_learning_rates_keep_their_proportion():
    regime = dataclasses.replace(Ending(), learning_rate=0.004, arms=("nadamw", "muon_l2"))
    assert regime.points("l2")[0][0] == 0.004
    assert regime.points("muon_l2")[0][0] == pytest.approx(0.008)
