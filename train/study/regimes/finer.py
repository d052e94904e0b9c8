"""A finer grid around the point where a search has ended: factors of two, each point with the same few seeds.

It begins with three learning rates times three λ. As long as the best point lies at an edge, another row is added
beyond it, up to a number of points.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.study.compare.tuning import Point, next_trials
from train.study.regimes.sweep import rounded


class Grid(NamedTuple):
    """Points of a grid that have all their seeds, and those that are to be run next; none once the grid is done."""

    points: list[Point]
    wanted: list[Point]


def grid(
    rate: float,
    decay: float,
    records: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    budget: int,
) -> Grid:
    """What the results so far say about a grid.

    Args:
        rate, decay: its centre; no λ but 0 is tried around a λ of 0.
        records: lines of one arm; others than those of the grid are left out.
        seeds: of every point.
        budget: points that it may have.
    """
    losses = by_point(records, seeds)
    rates = tuple(rounded(rate * f) for f in (0.5, 1.0, 2.0))
    decays = tuple(rounded(decay * f) for f in (0.5, 1.0, 2.0)) if decay else (0.0,)
    points: list[Point] = []
    while True:
        known = [
            {"learning_rate": p[0], "weight_decay": p[1], "loss": np.mean(losses[p])}
            for p in points
        ]
        found = next_trials(rates, decays, known, budget)
        new = [(rounded(t["learning_rate"]), rounded(t["weight_decay"])) for t in found]
        new = [point for point in new if point not in points]
        missing = [point for point in new if point not in losses]
        if missing or not new:
            return Grid(points, missing)
        points += new


def by_point(
    records: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> dict[Point, list[float]]:
    """Losses of all points that have every seed, in the order of the seeds."""
    found: dict[Point, dict[int, float]] = {}
    for r in records:
        found.setdefault((r["learning_rate"], r["weight_decay"]), {})[r["seed"]] = r["loss"]
    return {
        point: [own[seed] for seed in seeds]
        for point, own in found.items()
        if all(seed in own for seed in seeds)
    }
