"""Paired differences, bounds of equivalence and forgiveness: by hand, and in simulated comparisons."""

import math

import numpy as np
import pytest
from scipy import special

from train.study.compare.statistics import holm
from train.study.regimes.paired import NO_LUCK, forgiveness, luck, paired

# Student's t of 4 degrees of freedom: 97.5 % and 95 %.
T975, T95 = 2.7764, 2.1318


def test_a_difference_by_hand():
    reference = {3: 2.0, 5: 2.5, 8: 1.5, 9: 3.0, 11: 2.2, 40: 9.9}
    d = np.array([0.1, 0.3, -0.05, 0.2, 0.15])
    arm = {s: reference[s] + x for s, x in zip(reference, d)} | {77: 0.0}
    found = paired(arm, reference)
    error = d.std(ddof=1) / math.sqrt(5)
    assert found is not None and found.seeds == 5
    assert found.interval.value == pytest.approx(0.14)
    assert found.interval.high - 0.14 == pytest.approx(T975 * error, rel=1e-4)
    assert 0.14 - found.interval.low == pytest.approx(T975 * error, rel=1e-4)
    assert found.within == pytest.approx(0.14 + T95 * error, rel=1e-4)
    # p = 0.05 is where the interval ends at 0.
    shift = found.interval.low
    edge = paired({s: x - shift for s, x in arm.items()}, reference)
    assert edge is not None and edge.p == pytest.approx(0.05, rel=1e-6) and 0.05 < found.p < 0.1


def test_shared_seeds_take_out_what_they_have_in_common():
    rng = np.random.default_rng(0)
    seeds = {i: x for i, x in enumerate(rng.normal(2.0, 0.5, 12))}
    arm = {i: x - 0.05 + 0.01 * rng.standard_normal() for i, x in seeds.items()}
    found = paired(arm, seeds)
    assert found is not None and found.interval.high < 0
    shuffled = paired({i: arm[(i + 5) % 12] for i in arm}, seeds)
    assert shuffled is not None and shuffled.interval.holds(0.0)


def test_intervals_and_bounds_hold_in_simulated_comparisons():
    """95 % of intervals and of bounds hold the truth; reports in which nothing differs claim something in 5 %."""
    rng, truth, draws = np.random.default_rng(1), 0.004, 2000
    held = bounded = 0
    for _ in range(draws):
        common = rng.normal(0, 0.05, 12)
        pair = [dict(enumerate(common + rng.normal(m, 0.02, 12))) for m in (truth, 0.0)]
        found = paired(*pair)
        assert found is not None
        held += found.interval.holds(truth)
        bounded += truth < found.within
    # Three deviations of a count of 2000 with 0.95 are 0.0146.
    assert 0.935 < held / draws < 0.965
    assert bounded / draws > 0.935
    wrong = 0
    for _ in range(500):
        p = {}
        for arm in range(20):
            found = paired(*(dict(enumerate(rng.normal(0, 0.02, 12))) for _ in range(2)))
            assert found is not None
            p[str(arm)] = found.p
        wrong += min(holm(p).values()) <= 0.05
    assert wrong / 500 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


def test_the_luck_of_a_search_by_hand():
    first = {1: 2.0, 2: 2.4, 3: 2.2}
    second = {seed: loss + 0.03 for seed, loss in first.items()}
    found = luck([[first, second]])  # no noise of runs: all of it is luck
    assert found.variance == pytest.approx(0.03**2 / 2 * 1.5) and found.freedom == 1
    assert luck([]) == NO_LUCK
    same = luck([[first, first, first], [second, second, second]])
    assert same.variance == 0 and same.freedom == 4
    arm = {seed: loss + x for (seed, loss), x in zip(first.items(), (0.10, 0.12, 0.11))}
    plain, wide = paired(arm, first), paired(arm, first, found)
    assert plain is not None and wide is not None
    error = math.sqrt(1e-4 / 3 + found.variance)
    freedom = error**4 / ((1e-4 / 3) ** 2 / 2 + found.variance**2)
    assert wide.interval.value == plain.interval.value and wide.p > plain.p
    assert wide.interval.high - 0.11 == pytest.approx(
        error * special.stdtrit(freedom, 0.975), rel=1e-6
    )


@pytest.mark.parametrize("chance", [0.0, 0.004, 0.015])
def test_intervals_hold_with_the_luck_of_searches(chance):
    """Twelve seeds, three searches for two references on two texts, one for the arm; nothing differs."""
    rng, draws, held, false = np.random.default_rng(2), 1000, 0, 0

    def searched(common):
        return dict(enumerate(common + chance * rng.standard_normal() + rng.normal(0, 0.015, 12)))

    for _ in range(draws):
        groups = []
        for _ in range(4):
            common = rng.normal(0, 0.05, 12)
            groups.append([searched(common) for _ in range(3)])
        arm = searched(common)
        reference = {seed: float(np.mean([x[seed] for x in groups[-1]])) for seed in arm}
        found = paired(arm, reference, luck(groups))
        assert found is not None
        held += found.interval.holds(0.0)
        false += found.p <= 0.05
    assert 0.93 < held / draws < 0.985
    assert false == draws - held


def test_runs_that_diverge_and_too_few_seeds():
    assert paired({1: 2.0}, {1: 2.1}) is None
    assert paired({1: 2.0, 2: 3.0}, {3: 2.1, 4: 1.0}) is None
    found = paired({1: math.inf, 2: 3.0}, {1: 2.1, 2: 1.0})
    assert found is not None and math.isinf(found.interval.value) and math.isnan(found.p)
    equal = paired({1: 2.25, 2: 3.5}, {1: 2.0, 2: 3.25})
    assert equal is not None and equal.interval.value == 0.25 and equal.within == 0.25


def test_forgiveness_of_a_known_valley():
    """Lines through the points of 0.01·log2(λ)²: at ±1 it is 0.01, at ±2 it is 0.04; 0.02 is a third of the way."""
    found = forgiveness({2.0**k: 2 + 0.01 * k * k for k in range(-3, 4)} | {0.0: 9.0})
    assert found is not None and not found.open_low and not found.open_high
    assert found.doublings == pytest.approx(2 * (1 + 1 / 3))
    assert found.low == pytest.approx(2 ** -(4 / 3)) and str(found) == "2.7"


def test_forgiveness_that_goes_on_beyond_what_was_tried():
    found = forgiveness({1.0: 2.0, 2.0: 2.01, 4.0: 2.5})
    assert found is not None and found.open_low and not found.open_high and str(found)[0] == "≥"
    assert forgiveness({1.0: 2.0, 2.0: 2.01, 0.0: 2.5}) is None
    diverged = forgiveness({1.0: 2.5, 2.0: 2.0, 4.0: math.inf})
    assert diverged is not None and diverged.high == 2.0
