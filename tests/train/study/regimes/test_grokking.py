"""Addition: the table, runs alone and side by side, censored medians, and controls that can fail."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.drawings import is_drawn
from train.config.fields import UserError
from train.study.population import Member
from train.study.regimes import grokking_report as report
from train.study.regimes.addition import AdditionProgram, AdditionTask, tables, train
from train.study.regimes.arms import ARMS
from train.study.regimes.grokking import Grokking, open_end
from train.study.regimes.repeated import AGAIN
from train.study.regimes.work import known
from train.study.small_runs import numbers

TINY = AdditionTask(modulus=5, width=16, mlp_width=24, heads=2, every=5)


def test_every_sum_is_in_one_half():
    task = AdditionTask(modulus=11, train_share=0.3)
    first, second = tables(task, 4)
    assert len(first.sums) == 36 and len(second.sums) == 85
    pairs = {tuple(pair) for half in (first, second) for pair in half.pairs.tolist()}
    assert len(pairs) == 121
    for half in (first, second):
        assert (half.sums == (half.pairs[:, 0] + half.pairs[:, 1]) % 11).all()
    assert (tables(task, 5)[0].pairs != first.pairs).any()


def test_members_side_by_side_are_members_alone():
    members = [Member(0.01, 0.3, 1), Member(0.03, 1.0, 2), Member(0.02, 0.0, 1)]
    program = AdditionProgram(TINY, ARMS["huber"].build, 30)
    alone, together = (list(train(program, members, 0.9, together=t)) for t in (False, True))
    for one, other in zip(alone, together, strict=True):
        assert one.member == other.member and one.train_steps == other.train_steps
    assert len({x.train_steps for x in alone}) > 1
    end = list(train(program, members, 1.1, together=True))  # all run to the end
    last = list(train(program, members, 1.1, together=False))
    np.testing.assert_allclose([x.accuracy for x in end], [x.accuracy for x in last], atol=0.15)
    assert all(x.steps is None for x in last)


def test_a_step_is_adamw_on_the_whole_half():
    program = AdditionProgram(dataclasses.replace(TINY, every=3), ARMS["l2"].build, 30)
    own, halves = numbers(0.02, 1.5, 30, 3), tables(TINY, 3)
    state, shares = program.advance(program.init(own), own, halves)
    params = program.init(own)["params"]
    mask = jax.tree.map(lambda s: s.role in ("hidden", "head"), program.axes)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(lambda c: 0.02 * (c + 1) / 10, 0.9, 0.95, weight_decay=1.5, mask=mask),
    )
    memory = tx.init(params)

    def loss(params):
        logp = jax.nn.log_softmax(program.logits(params, halves[0]))
        return -jnp.mean(logp[jnp.arange(len(halves[0].sums)), halves[0].sums])

    for _ in range(3):
        change, memory = tx.update(jax.grad(loss)(params), memory, params)
        params = optax.apply_updates(params, change)
    for ours, theirs in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(params)):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    right = np.asarray(jnp.argmax(program.logits(params, halves[1]), -1)) == halves[1].sums
    assert float(shares[1]) == pytest.approx(float(right.mean()), abs=0.1)


def test_intervals_of_medians_hold_it():
    rng = np.random.default_rng(0)
    held = [
        report.median_interval(rng.exponential(1.0, 12)).holds(math.log(2)) for _ in range(2000)
    ]
    assert 0.95 < np.mean(held) < 0.995  # 0.961 by the binomial distribution
    censored = report.median_interval([3.0, 1.0, 2.0, *[math.inf] * 3])
    assert censored.value == math.inf and censored.low == 1.0


# Steps at λ = 1 over those of L2; stable never gets there.
SLOWER = {"none": math.inf, "l2": 1.0, "huber": 2.0, "cautious": 1.0, "stable": math.inf}


def simulated(regime, change=lambda job, steps: steps, best=4.0):
    """Lines whose fewest steps are at `best` times the middle λ."""
    lines = []
    for unit in regime.units():
        results = []
        for jobs in regime.wanted(unit, results):
            for job in jobs:
                noise = np.random.default_rng([job["seed"], len(job["arm"])]).normal(0, 0.1)
                middle = ARMS[job["arm"]].weight_decays[len(ARMS[job["arm"]].weight_decays) // 2]
                strength = job["weight_decay"] / middle if middle else 0.0
                shape = 1 / max(strength, 1e-9) + (strength / best) ** 3 / (3 * best)
                steps = 200 * SLOWER[job["arm"]] * shape * 2**noise
                steps = change(job, steps if steps < regime.steps else math.inf)
                lines.append(
                    job
                    | {
                        "steps_to_generalise": steps,
                        "steps_to_fit": 40.0,
                        "accuracy": 0.5,
                        "seconds": 1.0,
                    }
                )
            results += lines[-len(jobs) :]
    return lines


@pytest.fixture
def regime():
    made = Grokking(arms=("huber", "cautious", "stable"), seeds=12)
    made.check()
    return made


def test_known_differences_and_censored_runs(regime, tmp_path):
    lines = simulated(regime)
    records = known(regime, lines).records
    assert len(records) == len(lines) and report.failed(regime, records) == []
    table = {row.point.arm: row for row in report.rows(regime, records)}
    assert table["huber"].verdict == "slower"
    assert table["huber"].ratio.interval.holds(1.0)
    assert table["cautious"].verdict.startswith("differs by less than a factor of 1.")
    assert table["stable"].verdict == "not tuned: λ at the edge" and table["stable"].p < 0.01
    assert table["none"].point.censored == 12
    starts = [
        {"command": "c", "commit": "a", "uncommitted_changes": True, "python": "3", "versions": {}}
    ]
    starts[0] |= {"devices": {"kind": "cpu"}, "cores": 2, "system": "s", "texts": {}}
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    assert report.write_report(regime, records, tmp_path) == []
    text = (tmp_path / "report.md").read_text()
    assert "12 of 12 runs without decay are censored" in text and "uncommitted" in text
    assert is_drawn(tmp_path / "grokking.png")


def test_an_arm_of_which_few_runs_get_there_is_said_so(regime):
    middle = ARMS["stable"].weight_decays[1]

    def some(job, steps):
        there = job["arm"] == "stable" and job["weight_decay"] == middle and job["seed"] % 3 == 0
        return 700.0 if there else steps

    records = known(regime, simulated(regime, some)).records
    (row,) = [row for row in report.rows(regime, records) if row.point.arm == "stable"]
    assert row.point.censored == 8 and row.point.weight_decay == middle and not row.edge
    assert row.verdict == "at most half of the runs generalise"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job, x: 2 * x if job["seed"] >= AGAIN else x, "against itself"),
        (lambda job, x: 100.0 if job["arm"] == "l2" else x, "does not test decay"),
        (lambda job, x: math.inf, "does not test decay"),
    ],
)
def test_a_broken_control_is_reported(regime, change, words):
    reasons = report.failed(regime, known(regime, simulated(regime, change)).records)
    assert any(words in reason for reason in reasons)
    assert report.failed(regime, []) == ["the controls are not finished."]


def test_factors_set_the_decays_of_every_arm():
    made = Grokking(arms=("huber",), factors=(0.125, 0.25, 1.0))
    made.check()
    for arm in ("l2", "huber"):
        middle = ARMS[arm].weight_decays[1]
        decays = [decay for _, decay in made.points(arm, [])]
        np.testing.assert_allclose(decays, [middle / 8, middle / 4, middle], rtol=0.01)
    jobs = [job for unit in made.units() for jobs in made.wanted(unit, []) for job in jobs]
    assert len(jobs) == made.expected()
    for wrong in ((1.0,), (2.0, 1.0), (1.0, 1.0, 2.0), (0.0, 1.0), (1.0, math.inf)):
        with pytest.raises(UserError, match=r"nearest: those of the tier, 0\.5 1 2 4 8"):
            dataclasses.replace(made, factors=wrong).check()


@pytest.mark.parametrize(("best", "added"), [(4.0, 0), (8.0, 1), (16.0, 2), (0.25, 2), (1e4, 3)])
def test_a_grid_grows_until_its_best_decay_lies_inside(best, added):
    made = Grokking(arms=("huber",), seeds=4, steps=10**6)
    records = simulated(made, best=best)
    assert not known(made, records).missing
    for row in report.rows(made, records)[1:]:
        decays = [decay for _, decay in made.points(row.point.arm, records)]
        assert len(decays) == len(made.factors) + added
        assert row.edge == (best > 1e3)
        at = row.point.weight_decay / ARMS[row.point.arm].weight_decays[1]
        assert row.edge or at == pytest.approx(best, rel=0.01)


def test_an_arm_whose_best_decay_is_at_the_edge_is_not_called_slower(regime):
    regime = dataclasses.replace(regime, further=0)
    records = simulated(regime, best=1e4)
    table = {row.point.arm: row for row in report.rows(regime, records)}
    assert table["huber"].edge and table["huber"].ratio.interval.low > 0.5
    assert table["huber"].verdict == "not tuned: λ at the edge"
    assert any("L2 decay, with which" in reason for reason in report.failed(regime, records))


def test_a_best_decay_that_ties_with_its_neighbour_is_at_no_edge():
    steps = {1.0: [5.0, 6.0], 2.0: [3.0, 4.0], 4.0: [3.0, 4.0]}
    assert open_end(steps) is None and open_end({1.0: [2.0, 2.0]}) is None
    assert open_end(steps | {4.0: [3.0, 3.5]}) == 4.0
    assert open_end(steps | {1.0: [1.0, 1.0]}) == 1.0
    assert open_end({x: [math.inf] * 2 for x in steps}) == 4.0
