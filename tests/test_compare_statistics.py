"""Intervals and corrections against known cases, and how often they are right in simulated comparisons."""

import math

import numpy as np
import pytest
from scipy import stats

from train import compare_statistics as statistics

BUDGETS = (200, 300, 400, 600, 800)
SIGMA = 0.0155  # deviation of final losses over seeds, and losses by budget, as measured for a byte model
MEANS = dict(zip(BUDGETS, (2.546, 2.453, 2.401, 2.334, 2.280)))


def test_welch_is_the_known_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.4, 0.03, 5), rng.normal(2.35, 0.01, 9)
    found, known = statistics.welch(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(known.pvalue, rel=1e-9)
    both = known.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((both.low, both.high))
    # The end of a one-sided interval of 95 % is that of a two-sided one of 90 %.
    assert found.upper == pytest.approx(known.confidence_interval(0.90).high)
    assert found.interval.value == pytest.approx(a.mean() - b.mean())
    assert statistics.welch(b, a).interval.value == -found.interval.value


def test_a_diverged_run_is_infinitely_worse():
    found = statistics.welch([2.0, math.inf, 2.1], [2.3, 2.4])
    assert found.interval.value == math.inf and found.upper == math.inf and math.isnan(found.p)
    ratio = statistics.speedup({b: [m, m + 0.01] for b, m in MEANS.items()}, [2.4, math.inf], 400)
    assert ratio.value == 0 and ratio.low == 0
    with pytest.raises(ValueError, match="arm has 1 losses"):
        statistics.welch([2.0], [2.3, 2.4])


def test_holm_on_a_known_table():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan}
    # 5 x 0.005, 4 x 0.01, 3 x 0.03, then 2 x 0.04 = 0.08 which may not fall below 0.09, then 1.
    expected = {"d": 0.025, "a": 0.04, "c": 0.09, "b": 0.09, "e": 1.0}
    found = statistics.holm(p)
    assert list(found) == list(p)
    assert {name: pytest.approx(value) for name, value in expected.items()} == found
    assert statistics.holm({}) == {}


@pytest.mark.parametrize("curvature", [0.03, 0.0])
def test_a_ladder_is_read_backwards(curvature):
    middle = math.sqrt(200 * 800)

    def loss(steps):
        x = np.log(np.asarray(steps) / middle)
        return 2.4 - 0.19 * x + curvature * x * x

    found = statistics.ladder(BUDGETS, loss(BUDGETS))
    assert found.falls()
    for steps in (200, 333, 400, 799):
        assert found.loss(np.array(steps)) == pytest.approx(loss(steps))
        assert found.steps(loss(steps)) == pytest.approx(steps)
    # Nothing is known beyond its ends.
    assert found.steps(loss(800) - 0.1) == pytest.approx(800)
    assert found.steps(loss(200) + 0.1) == pytest.approx(200)
    assert found.steps(np.array(math.inf)) == 0
    assert not statistics.ladder(BUDGETS, -loss(BUDGETS)).falls()
    with pytest.raises(ValueError, match="3 budgets"):
        statistics.ladder((200, 400), np.zeros(2))


def test_a_planted_speedup_is_found():
    means = np.array(list(MEANS.values()))
    ladder = statistics.ladder(BUDGETS, means)
    # Losses of the fit itself, so that it fits; seeds that scatter symmetrically leave the means alone.
    losses = {b: ladder.loss(np.array(b)).item() + 0.004 * np.array([-1, 0, 1]) for b in BUDGETS}
    arm = ladder.loss(np.array(1.37 * 400)).item() + 0.004 * np.array([-1, 1, -1, 1])
    found = statistics.speedup(losses, arm, 400)
    assert found.value == pytest.approx(1.37, rel=1e-9)
    assert 1.2 < found.low < 1.37 < found.high < 1.6
    nothing = statistics.speedup({b: -np.asarray(l) for b, l in losses.items()}, arm, 400)
    assert math.isnan(nothing.value) and not nothing.holds(1.0)


def simulate(rng, seeds, equivalent):
    ladder = statistics.ladder(BUDGETS, np.array(list(MEANS.values())))
    losses = {b: ladder.loss(np.array(b)) + SIGMA * rng.standard_normal(6) for b in BUDGETS}
    arm = ladder.loss(np.array(equivalent * 400)) + SIGMA * rng.standard_normal(seeds)
    return statistics.speedup(losses, arm, 400, seed=int(rng.integers(1 << 30)), draws=1500)


@pytest.mark.parametrize(("seeds", "equivalent"), [(6, 1.0), (3, 1.0), (6, 1.4)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, equivalent):
    rng = np.random.default_rng(seeds)
    found = [simulate(rng, seeds, equivalent) for _ in range(300)]
    coverage = np.mean([interval.holds(equivalent) for interval in found])
    # 95 % less three binomial deviations, sqrt(0.95 · 0.05 / 300) = 0.0126.
    assert coverage > 0.95 - 3 * 0.0126
    if equivalent > 1:
        # They are not merely wide: the size of Muon's effect is told from 1 nearly always.
        assert np.mean([interval.low > 1 for interval in found]) > 0.95
