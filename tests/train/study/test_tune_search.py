"""The search of `python -m train tune` on losses that are known beforehand, and the surface that is fitted to them."""

import functools
import math

import numpy as np
import pytest

from train.study.compare.tuning import FIRST_SEED
from train.study.tune import figures
from train.study.tune.search import edges, next_members
from train.study.tune.surface import surface


def valley(member, eta=0.011, lam=1.4, noise=0.004, shift=0.3):
    """A loss with its minimum at a point, a large effect of the seed, and a small noise."""
    x = math.log2(member.learning_rate / eta)
    y = math.log2(max(member.weight_decay, 0.05) / lam)
    own = np.random.default_rng([member.seed, *(round(1e6 * v) for v in member[:2])])
    same = np.random.default_rng(member.seed)
    return (
        2
        + 0.06 * x * x
        + 0.02 * y * y
        + shift * same.standard_normal()
        + noise * own.standard_normal()
    )


def searched(loss, trials=30, seeds=4, rates=(0.004, 0.008, 0.016), decays=(0.0, 0.5, 2.0)):
    found = []
    while members := next_members(rates, decays, found, trials, seeds):
        assert len(set(members)) == len(members)
        found += [{**m._asdict(), "loss": loss(m)} for m in members]
        assert len(found) < 100
    return found


@pytest.mark.parametrize(("eta", "lam"), [(0.011, 1.4), (0.05, 6.0), (0.0015, 0.4)])
def test_the_search_ends_around_the_minimum(eta, lam):
    found = surface(searched(functools.partial(valley, eta=eta, lam=lam)))
    assert abs(math.log2(found.best.learning_rate / eta)) <= 0.7
    assert abs(math.log2(found.best.weight_decay / lam)) <= 1.1
    assert found.best.runs == 4
    for axis, truth in (("learning_rate", eta), ("weight_decay", lam)):
        close = found.forgiving(axis)
        assert close.low / 1.5 < truth < close.high * 1.5


def test_best_points_get_further_seeds_seed_by_seed():
    found = searched(functools.partial(valley, noise=0))
    first = [r for r in found if r["seed"] == FIRST_SEED]
    rest = found[len(first) :]
    assert [r["seed"] for r in rest] == sorted(r["seed"] for r in rest)
    assert {r["seed"] for r in rest} == {FIRST_SEED + i for i in (1, 2, 3)}
    assert any(r["weight_decay"] == 0 for r in rest)  # to say what the decay is worth


def test_the_grid_moves_on_where_further_seeds_show_another_edge():
    """The first seed is out of line: it puts the minimum inside of the grid."""

    def loss(member):
        return valley(member, eta=0.0058 if member.seed == FIRST_SEED else 0.0035, noise=0)

    found = searched(loss)
    order = [r["seed"] for r in found]
    assert order != sorted(order)
    assert surface(found).best.learning_rate == 0.004 and edges(found) == ""
    assert min(r["learning_rate"] for r in found) < 0.004


def test_a_search_stops_at_its_number_of_trials():
    first = [r for r in searched(valley, trials=11) if r["seed"] == FIRST_SEED]
    assert len(first) == 11
    alone = searched(valley, seeds=1)
    assert {r["seed"] for r in alone} == {FIRST_SEED}
    assert math.isnan(surface(alone).deviation)


def test_effects_of_seeds_are_no_noise():
    """Seeds differ by 0.3 nats, and points are still told apart at 0.01."""
    found = surface(searched(valley, seeds=6))
    # 95 % of estimates with 20 degrees of freedom lie within a factor of 0.7 to 1.35.
    assert 0.004 / 1.5 < found.deviation < 0.004 * 1.5
    assert found.freedom >= 20
    complete = [p for p in found.points if p.runs == 6 and p is not found.best]
    assert all(p.resolution < 0.01 for p in complete)


def planted(seeds=2):
    """A paraboloid without noise at the best λ, with two points on each side."""
    return [
        {"learning_rate": e, "weight_decay": k, "seed": s, "loss": 2 + s + cost}
        for e, k, cost in (
            (0.01, 1.0, 0.0),
            (0.005, 1.0, 0.01),
            (0.0025, 1.0, 0.04),
            (0.02, 1.0, 0.08),
            (0.01, 4.0, math.inf),
            (0.01, 0.0, 0.1),
        )
        for s in range(seeds)
    ]


def test_ranges_are_read_off_straight_lines():
    found = surface(planted())
    assert (found.best.learning_rate, found.best.weight_decay) == (0.01, 1.0)
    rate, decay = found.forgiving("learning_rate"), found.forgiving("weight_decay")
    # A third of the way from 0.01 to 0.04 nats, and a quarter of the way to 0.08.
    assert rate.low == pytest.approx(0.005 * 2 ** (-1 / 3))
    assert rate.high == pytest.approx(0.01 * 2**0.25)
    assert rate.doublings == pytest.approx(1 + 1 / 3 + 1 / 4)
    # A point that diverged is beyond; from 0 there is no logarithm: a fifth of the way down to no decay.
    assert decay.low == pytest.approx(0.8) and decay.high == 1.0
    assert found.deviation == pytest.approx(0, abs=1e-12)
    basin = found.basin("learning_rate")
    assert basin.low == pytest.approx(0.01) and basin.high == pytest.approx(0.01)
    inside = surface([r for r in planted() if r["learning_rate"] >= 0.01 and r["weight_decay"]])
    assert inside.forgiving("learning_rate").open_low
    assert "or less" in str(inside.forgiving("learning_rate"))


def test_a_picture_is_drawn_whatever_was_tried(tmp_path):
    for i, kept in enumerate((planted(), planted(1), planted()[:2], planted()[:6])):
        path = figures.draw(surface(kept), "title", tmp_path / f"{i}.png")
        assert path.stat().st_size > 5000
