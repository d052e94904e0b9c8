"""Weights in bfloat16: float32 is the plain program, rounding loses small decay, and the two remedies do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.runs import write_text
from train.study.population import Member, population
from train.study.regimes import bfloat16, bfloat16_report, texts
from train.study.regimes.bfloat16 import Bfloat16
from train.study.regimes.repeated import AGAIN
from train.study.regimes.repeated import program as plain
from train.study.regimes.rounding import FORMS
from train.study.regimes.work import known
from train.study.small_runs import SmallTask, numbers

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=4
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return texts.read(TINY, str(write_text(tmp_path_factory.mktemp("texts"))), 2000)


def runs(data, form, decay, rate=0.02):
    small = bfloat16.program(TINY, form, data.vocab_size, 8)
    members = [Member(rate, decay, 3)]
    (found,) = population(small, members, data, 8, look=bfloat16.hidden_size(small))
    return found


def test_float32_is_the_plain_program(data):
    (alone,) = population(plain(TINY, "l2", data.vocab_size, 8), [Member(0.02, 1.0, 3)], data, 8)
    found = runs(data, "float32", 1.0)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
    assert len({runs(data, form, 1.0).loss for form in FORMS}) == 4


def test_a_small_shrink_is_lost_without_a_remedy(data):
    """With a zero gradient only decay moves a weight: by ηλ = 0.001 a step, which is below half a unit."""
    sizes = {}
    for form in FORMS:
        small = bfloat16.program(TINY, form, data.vocab_size, 10**6)
        own = numbers(1e-3, 1.0, 10**6, 0)
        state = small.init(own)
        first = bfloat16.hidden_size(small)(state)
        change = jax.tree.map(lambda w: -0.001 * w.astype(jnp.float32), state["params"])
        for step in range(60):
            state = state | {"step": jnp.asarray(step)}
            change = jax.tree.map(lambda w: -0.001 * w, small.params(state))
            params, lost = small._added(state, change, 0)
            state = state | {"params": params, "lost": lost}
        sizes[form] = float(bfloat16.hidden_size(small)(state) / first)
    assert sizes["bfloat16"] == 1.0
    for form in ("float32", "stochastic", "kahan"):
        assert sizes[form] == pytest.approx(0.999**60, abs=2e-3)


def test_members_side_by_side_are_members_alone(data):
    small = bfloat16.program(TINY, "stochastic", data.vocab_size, 8)
    members = [Member(0.02, 1.0, 3), Member(0.01, 0.0, 4)]
    alone, together = (list(population(small, members, data, 8, together=t)) for t in (False, True))
    for one, other in zip(alone, together):
        # One weight that is rounded the other way is a difference of 2⁻⁸ of it.
        assert one.loss == pytest.approx(other.loss, abs=0.02)


def test_the_report_finds_a_loss_that_was_put_in():
    regime = Bfloat16(texts=("one",), seeds=12)
    regime.check()
    lines = []
    for unit in regime.units():
        for jobs in regime.wanted(unit, []):
            for job in jobs:
                noise = np.random.default_rng([job["seed"], FORMS.index(job["arm"])]).normal(
                    0, 0.01
                )
                decay = job["weight_decay"] * job["learning_rate"]
                gain = 0.3 if decay > 0.004 else 0.0
                worse = 0.05 * (job["arm"] == "bfloat16" and 0 < decay < 0.002)
                lines.append(job | {"loss": 2.5 - gain + worse + noise, "rms": 0.1, "seconds": 0.1})
    records = known(regime, lines).records
    assert len(records) == len(lines) == regime.expected()
    assert bfloat16_report.failed(regime, records) == []
    found = bfloat16_report.points(regime, records)
    said = {(p.form, p.learning_rate, p.shrink): p.verdict for p in found}
    assert said["bfloat16", 0.001, 0.0008] == said["bfloat16", 0.008, 0.0008] == "worse"
    assert said["kahan", 0.008, 0.0008].startswith("differs by less than 0.0")
    broken = [r | {"loss": r["loss"] + 0.1 * (r["seed"] >= AGAIN)} for r in records]
    assert any("themselves" in reason for reason in bfloat16_report.failed(regime, broken))
    flat = [r | {"loss": 2.0 + 0.001 * r["seed"]} for r in records]
    assert any("does not test" in reason for reason in bfloat16_report.failed(regime, flat))


def test_units_and_ranges():
    regime = dataclasses.replace(Bfloat16(), texts=("a b", "c"))
    jobs = next(regime.wanted(regime.units()[0], []))
    assert jobs[0]["text"] == "a b" and jobs[0]["arm"] == "float32" and len(jobs) == 12
    assert bfloat16.decay_of(0.0024, 0.001) == 2.4
