"""The search for the point of one arm: a coarse grid, a finer one, and the bottom of what is fitted to both.

The coarse grid has single trials; it moves until its best point is inside. The bottom of a paraboloid through them is
the centre of the finer grid: three learning rates times three λ, factors of two apart, each with a few seeds of its
own. As long as its best point lies at an edge, another row is added beyond it, up to a number of points. The bottom of
a paraboloid through both is the point of the arm. A sweep over λ at the learning rate next to it gives its curve.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.study.compare.tuning import FIRST_SEED, Point, next_trials
from train.study.regimes import sweep
from train.study.regimes.arms import ARMS
from train.study.regimes.optimum import optimum
from train.study.regimes.sweep import rounded
from train.study.regimes.work import Record

FINER = 50  # from the seeds of a search to those of its finer grid
NEAR = 0.1  # nats above the best point, for points that decide where the runs that count stand


@dataclasses.dataclass(frozen=True)
class ArmTuning:
    """One arm on one text. All that it decides follows from the results so far.

    Attributes:
        base: fields of all its jobs.
        first_seed: of the trials.
        trials: runs of the coarse grid.
        finer_points: that the finer grid may have.
        finer_seeds: runs of each of these, and of every λ of the sweep.
    """

    base: Record
    first_seed: int
    trials: int
    finer_points: int
    finer_seeds: int

    @property
    def seeds(self) -> list[int]:
        """Of the finer grid and the sweep."""
        return [self.first_seed + FINER + i for i in range(self.finer_seeds)]

    def wanted(self, results: Sequence[Record]) -> Iterator[list[Record]]:
        """Its jobs, list by list; `results` has to grow by each."""
        row = ARMS[self.base["arm"]]
        shift = self.first_seed - FIRST_SEED
        while True:
            plain = [t | {"seed": t["seed"] - shift} for t in self.trials_in(results)]
            new = next_trials(row.learning_rates, row.weight_decays, plain, self.trials)
            if not new:
                break
            yield [self.base | t | {"seed": t["seed"] + shift} for t in new]
        while points := self._grid(results).wanted:
            yield [
                self.base | {"learning_rate": rate, "weight_decay": decay, "seed": seed}
                for rate, decay in points
                for seed in self.seeds
            ]
        centre = (self._rate_of_curve(results), self._start(results)[1])
        yield from sweep.wanted(self.base, centre, results, self.seeds)

    def trials_in(self, results: Sequence[Record]) -> list[Record]:
        """The runs of the coarse grid: the first of all tuning."""
        mine = [
            r
            for r in results
            if r["seed"] >= FIRST_SEED and all(r[k] == v for k, v in self.base.items())
        ]
        return mine[: self.trials]

    def point(self, results: Sequence[Record]) -> Point:
        """Learning rate and λ that the search ends at."""
        mine = self._finer_in(results)
        return optimum([*self.trials_in(results), *mine], NEAR, mine)

    def edges(self, results: Sequence[Record]) -> str:
        """ "η" and "λ" where the point is not between values that were tried; no decay at all is inside."""
        tried, found = [*self.trials_in(results), *self._finer_in(results)], ""
        names = ("learning_rate", "weight_decay")
        for letter, name, value in zip("ηλ", names, self.point(results)):
            values = {r[name] for r in tried}
            if value and len(values) > 1 and not min(values) < value < max(values):
                found += letter
        return found

    def _finer_in(self, results: Sequence[Record]) -> list[Mapping[str, Any]]:
        """The runs of the finer grid, without those of the sweep."""
        on_grid = set(self._grid(results).points)
        return [
            r
            for r in sweep.Live(results, self.base, set(self.seeds))
            if (r["learning_rate"], r["weight_decay"]) in on_grid
        ]

    def curve(self, results: Sequence[Record]) -> dict[float, float]:
        """Mean losses by λ, at the learning rate of the finer grid that is nearest to the point."""
        at = self.base | {"learning_rate": self._rate_of_curve(results)}
        return sweep.profile(sweep.Live(results, at, set(self.seeds)), self.seeds)

    def _start(self, results: Sequence[Record]) -> Point:
        """The centre of the finer grid."""
        return optimum(self.trials_in(results))

    def _rate_of_curve(self, results: Sequence[Record]) -> float:
        rate, rates = self.point(results)[0], {r for r, _ in self._grid(results).points}
        return min(rates, key=lambda r: abs(math.log(r / rate)))

    def _grid(self, results: Sequence[Record]) -> "Grid":
        records = sweep.Live(results, self.base, set(self.seeds))
        return grid(*self._start(results), records, self.seeds, self.finer_points)


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
