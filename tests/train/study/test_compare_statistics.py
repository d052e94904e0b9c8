"""Intervals and corrections against known cases, and how often they are right in simulated comparisons."""

import math

import numpy as np
import pytest
from scipy import stats

from train.study.compare import statistics

BUDGETS = (200, 300, 400, 600, 800)
# Losses by budget and their deviations over seeds, as measured for a byte model on two texts: no parabolas.
POWER = {"stdlib": (0.896, 1.0274, 0.383), "zipf": (3.4637, 0.0438, 1.132)}
SIGMA = {
    "stdlib": (0.026, 0.028, 0.025, 0.013, 0.012),
    "zipf": (0.0055, 0.0045, 0.0029, 0.0048, 0.0038),
}
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
    assert (ratio.value, ratio.low, ratio.high) == (0, 0, 2)
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


def test_a_ladder_that_turns_is_read_on_its_falling_side():
    """As single draws of noisy budgets are: by the first budget with the loss, the largest where there is none."""
    x = np.linspace(*statistics.ladder(BUDGETS, np.zeros(5)).ends, 2001)
    shapes = {  # coefficients of 1, x, x², with ends at ±ln 2
        "turns up": (2.4, -0.1, 0.2),
        "turns down": (2.4, 0.05, -0.2),
        "only rises": (2.4, 0.2, 0.1),
        "only rises, more and more slowly": (2.4, 0.2, -0.1),
    }
    for name, shape in shapes.items():
        found = statistics.Ladder(np.array(shape), (x[0], x[-1]), 400.0)
        losses = shape[0] + shape[1] * x + shape[2] * x * x
        for loss in np.linspace(losses.min() - 0.05, losses.max() + 0.05, 40):
            reached = np.flatnonzero(losses <= loss)
            first = x[reached[0]] if reached.size else x[-1]
            # Within the spacing of x, 7e-4; crossings near a vertex are no less exact, since `first` is one of x.
            assert np.log(found.steps(loss) / 400) == pytest.approx(first, abs=8e-4), (name, loss)
    # A hair below the loss of the smallest budget is the smallest budget, however it is rounded.
    fell = statistics.ladder(BUDGETS, np.array(list(MEANS.values())))
    for below in np.geomspace(1e-17, 1e-12, 50):
        assert fell.steps(fell.loss(np.array(200)) - below) == pytest.approx(200)


def simulate(rng, text, seeds, per_budget, deviation, speed):
    floor, height, power = POWER[text]
    loss = lambda steps: floor + height * (steps / 400) ** -power
    losses = {
        b: loss(b) + sigma * rng.standard_normal(per_budget)
        for b, sigma in zip(BUDGETS, SIGMA[text])
    }
    arm = loss(speed * 400) + deviation * rng.standard_normal(seeds)
    return statistics.speedup(losses, arm, 400, seed=int(rng.integers(1 << 30)), draws=1500)


@pytest.mark.parametrize(
    ("text", "seeds", "per_budget", "deviation", "speed"),
    [
        ("stdlib", 6, 6, 0.02, 1.0),
        ("stdlib", 6, 6, 0.045, 1.4),
        ("zipf", 6, 6, 0.003, 1.0),
        ("zipf", 6, 6, 0.018, 1.3),
        ("stdlib", 3, 6, 0.02, 1.0),
        ("stdlib", 3, 3, 0.02, 1.4),
        ("stdlib", 12, 2, 0.005, 1.0),
        ("stdlib", 2, 2, 0.02, 1.0),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(text, seeds, per_budget, deviation, speed):
    """With few seeds, with arms that scatter more or less than AdamW, and with ladders that are no parabolas."""
    rng = np.random.default_rng(seeds)
    found = [simulate(rng, text, seeds, per_budget, deviation, speed) for _ in range(300)]
    coverage = np.mean([interval.holds(speed) for interval in found])
    # 95 % less three binomial deviations, sqrt(0.95 · 0.05 / 300) = 0.0126.
    assert coverage > 0.95 - 3 * 0.0126
    if (text, seeds, deviation) == ("stdlib", 6, 0.02):
        # They are not merely wide: the size of Muon's effect is told from 1 nearly always.
        muon = [simulate(rng, text, seeds, per_budget, deviation, 1.4) for _ in range(100)]
        assert np.mean([interval.low > 1 for interval in muon]) > 0.95


def test_reports_seldom_claim_what_is_not_there():
    """Fifteen arms on two texts that are all AdamW: the share of reports with any claim is that of Holm's promise."""
    rng = np.random.default_rng(0)
    reports, claims, controls = 200, 0, 0
    for seed in range(reports):
        p, away = {}, {}
        for text in POWER:
            floor, height, power = POWER[text]
            means = [floor + height * (b / 400) ** -power for b in BUDGETS]
            losses = {
                b: mean + sigma * rng.standard_normal(6)
                for b, mean, sigma in zip(BUDGETS, means, SIGMA[text])
            }
            runs = {k: means[2] + SIGMA[text][2] * rng.standard_normal(6) for k in range(16)}
            for k, arm in runs.items():
                p[f"{k} {text}"] = statistics.welch(arm, losses[400]).p
                if k == 15 or p[f"{k} {text}"] < 0.01:
                    found = statistics.speedup(losses, arm, 400, seed=seed, draws=1000)
                    away[f"{k} {text}"] = not found.holds(1.0)
            controls += away[f"15 {text}"]
            del p[f"15 {text}"]
        adjusted = statistics.holm(p)
        claims += any(adjusted[name] <= 0.05 and away[name] for name in adjusted)
    # At most 5 % and three binomial deviations of 200 or 400; a control fails now and then, or it would be no control.
    assert claims / reports < 0.05 + 3 * 0.0154
    assert 0 < controls / (2 * reports) < 0.05 + 3 * 0.0109
