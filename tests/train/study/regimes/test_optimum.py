"""The bottom between the points that were tried: exact where losses are a paraboloid, near it under noise."""

import itertools
import math

import numpy as np
import pytest

from train.study.compare.tuning import FIRST_SEED, next_trials, tuned
from train.study.regimes.optimum import optimum, valley
from train.study.regimes.repeated import Repeated

RATES, DECAYS = (0.004, 0.008, 0.016), (0.316, 1.0, 3.16)


def loss(rate, decay, best=(0.006, 0.7)):
    """A paraboloid that is not aligned with the axes."""
    x, y = math.log2(rate / best[0]), math.log2(decay / best[1])
    return 2.0 + 0.02 * x * x + 0.03 * y * y + 0.02 * x * y


def trial(rate, decay, value, seed=FIRST_SEED):
    return {"learning_rate": rate, "weight_decay": decay, "seed": seed, "loss": value}


def test_a_paraboloid_gives_its_bottom():
    trials = [trial(*point, loss(*point)) for point in itertools.product(RATES, DECAYS)]
    assert optimum(trials) == pytest.approx((0.006, 0.7), rel=0.006)
    # Three significant digits.
    assert all(float(f"{x:.3g}") == x for x in optimum(trials))


def test_the_bottom_costs_less_than_the_best_point_of_a_noisy_grid():
    rng, costs = np.random.default_rng(0), []
    for _ in range(200):
        best = (0.008 * 2 ** rng.uniform(-0.9, 0.9), 2 ** rng.uniform(-1.5, 1.5))
        trials = []
        while new := next_trials(RATES, DECAYS, trials, 15):
            for t in new:
                value = loss(t["learning_rate"], t["weight_decay"], best)
                common = 0.05 * np.random.default_rng(t["seed"]).standard_normal()
                trials.append(t | {"loss": value + common + 0.015 * rng.standard_normal()})
        grid = tuned(trials)
        points = (optimum(trials), (grid.learning_rate, grid.weight_decay))
        costs.append([loss(*point, best) - 2.0 for point in points])
    fitted, picked = np.mean(costs, axis=0)
    assert fitted < 0.6 * picked


@pytest.mark.parametrize(
    "change",
    [
        lambda rate, decay: 2.0 - 0.01 * math.log2(rate) ** 2,  # no bottom in η
        lambda rate, decay: loss(rate, decay, (0.006, 0.02)),  # it lies outside
        lambda rate, decay: loss(rate, decay) if decay < 2 else math.inf,  # two λ are too few
        lambda rate, decay: 2.0 if (rate, decay) == (0.008, 1.0) else math.inf,
        lambda rate, decay: math.inf,
    ],
)
def test_without_a_valley_the_best_point_is_taken(change):
    trials = [trial(*point, change(*point)) for point in itertools.product(RATES, DECAYS)]
    best = tuned(trials)
    assert optimum(trials) == (best.learning_rate, best.weight_decay)


def test_without_decay_only_the_learning_rate_is_fitted():
    trials = [trial(rate, 0.0, loss(rate, 0.7)) for rate in (0.002, *RATES)]
    assert optimum(trials) == pytest.approx((0.006, 0.0), rel=0.006)
    assert optimum(trials[:2]) == (0.004, 0.0)


def test_a_parabola_over_a_sweep():
    curve = {x: loss(0.006, x) for x in (0.25, 0.5, 1.0, 2.0)}
    assert valley(curve) == pytest.approx(0.7, rel=0.001)
    assert valley({1.0: 2.0, 2.0: 2.1}) == 1.0
    assert valley({0.5: 2.2, 1.0: 2.0, 2.0: math.inf}) == 1.0
    assert valley({0.0: 2.5}) == 0.0


def test_what_a_whole_tuning_costs():
    """Runs that count stand where the loss is at most 0.004 nats above the lowest, and on average 0.0015 at most.

    Valleys and noise are like those of the tier for CPUs: 0.015 nats of a run, and as much of what a seed does to all.
    """
    regime = Repeated(texts=("one",), arms=(), epochs=(), lengths=(), batches=(), tunings=1)
    costs = []
    for number in range(12):
        rng = np.random.default_rng(number)
        eta, lam = 0.008 * 2 ** rng.uniform(-1.7, 1.2), 2 ** rng.uniform(-1, 1)
        seeds = {}

        def cost(job, eta=eta, lam=lam):
            x, y = math.log2(job["learning_rate"] / eta), math.log2(job["weight_decay"] / lam)
            return 0.01 * x * x + 0.035 * y * y + 0.012 * x * y + 0.001 * x**3

        def run(job, cost=cost, seeds=seeds, rng=rng):
            common = seeds.setdefault(job["seed"], 0.015 * rng.standard_normal())
            noise = common + 0.015 * rng.standard_normal()
            return job | {"loss": 2.15 + cost(job) + noise, "training_loss": 1.0, "seconds": 0.0}

        results = []
        for jobs in regime.wanted("l2", results):
            results += map(run, jobs)
        rate, decay = regime.point("l2", "one", results)
        costs.append(cost({"learning_rate": rate, "weight_decay": decay}))
    assert np.mean(costs) < 0.0015 and max(costs) < 0.004
