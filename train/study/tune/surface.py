"""The surface of losses over learning rate and decay: its lowest point, its noise, and how wide its basin is.

Points share their seeds. What a seed does to all points alike is taken out: its effect is the mean over the points that
have all seeds. What is left is the noise of one run,

    r = loss - mean of the point - effect of the seed        with (points - 1)(seeds - 1) degrees of freedom

and two points differ if their means do by more than Student's t times the noise of their difference (95 %).
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

LEVEL = 0.95
CLOSE = 0.02  # nats: a loss that costs this much is close to the best one


@dataclasses.dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        learning_rate, weight_decay: where it is.
        loss: mean over its seeds, less their effects [nats per token].
        runs: its number of seeds.
        resolution: half of the 95 % interval of its difference from the best point; nan where it is not known.
    """

    learning_rate: float
    weight_decay: float
    loss: float
    runs: int
    resolution: float = math.nan


@dataclasses.dataclass(frozen=True)
class Range:
    """Values around the best one; an open end lies at the last value that was tried, or beyond."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def doublings(self) -> float:
        """How many factors of two fit in; infinite from 0 on."""
        return math.log2(self.high / self.low) if self.low > 0 else math.inf

    def __str__(self) -> str:
        low, high = f"{self.low:.2g}", f"{self.high:.2g}"
        return f"{low}{' or less' if self.open_low else ''} to {high}{' or more' if self.open_high else ''}"


@dataclasses.dataclass(frozen=True)
class Surface:
    """All points. The best one is the lowest of those with the most seeds.

    Attributes:
        points: sorted by loss.
        best: the recommended point.
        deviation: of one run, with the effect of its seed taken out; nan with one seed.
        freedom: degrees of freedom of that.
    """

    points: tuple[Point, ...]
    best: Point
    deviation: float
    freedom: int

    def basin(self, axis: str) -> Range | None:
        """Values that cannot be told apart from the best one; None where the noise is not known.

        Args:
            axis: "learning_rate" or "weight_decay"; the other one is the best for each value.
        """
        if math.isnan(self.deviation):
            return None
        return self._range(axis, lambda point: point.resolution)

    def forgiving(self, axis: str) -> Range:
        """Values that cost at most `CLOSE` nats."""
        return self._range(axis, lambda point: CLOSE)

    def profile(self, axis: str) -> list[Point]:
        """For each value of an axis its point of the lowest loss, by increasing value."""
        lowest: dict[float, Point] = {}
        for point in reversed(self.points):
            lowest[getattr(point, axis)] = point
        lowest[getattr(self.best, axis)] = self.best
        return [lowest[value] for value in sorted(lowest)]

    def _range(self, axis: str, level: Callable[[Point], float]) -> Range:
        """Values around the best one whose cost is at most their point's level."""
        profile = self.profile(axis)
        at = profile.index(self.best)
        rows = [(getattr(p, axis), p.loss - self.best.loss, level(p)) for p in profile]
        (low, open_low), (high, open_high) = _crossing(rows[at::-1]), _crossing(rows[at:])
        return Range(low, high, open_low and low > 0, open_high)


def _crossing(rows: Sequence[tuple[float, float, float]]) -> tuple[float, bool]:
    """Where costs rise above their levels, on straight lines over log2 of the values; and whether they never do.

    Args:
        rows: (value, cost, level), from the best point outwards.
    """
    for (a, cost, _), (b, next_cost, level) in itertools.pairwise(rows):
        if next_cost > level:
            share = min(1.0, max(0.0, (level - cost) / (next_cost - cost)))
            if min(a, b) == 0:  # no logarithm: a straight line over the values
                return a + share * (b - a), False
            return a * (b / a) ** share, False
    return rows[-1][0], True


def surface(results: Sequence[Mapping[str, Any]]) -> Surface:
    """The surface of some runs, at least one.

    Args:
        results: lines with "learning_rate", "weight_decay", "seed" and "loss".
    """
    losses: dict[tuple[float, float], dict[int, float]] = collections.defaultdict(dict)
    for r in results:
        losses[r["learning_rate"], r["weight_decay"]][r["seed"]] = r["loss"]
    effects, deviation, freedom = _noise(losses)
    points = [
        Point(*where, float(np.mean([x - effects.get(s, 0.0) for s, x in own.items()])), len(own))
        for where, own in losses.items()
    ]
    most = max(point.runs for point in points)
    best = min((p for p in points if p.runs == most), key=lambda p: p.loss)

    def resolved(point: Point) -> Point:
        if math.isnan(deviation) or point is best:
            return point
        t = float(special.stdtrit(freedom, (1 + LEVEL) / 2))
        half = t * deviation * math.sqrt(1 / point.runs + 1 / best.runs)
        return dataclasses.replace(point, resolution=half)

    order = sorted((resolved(point) for point in points), key=lambda p: p.loss)
    return Surface(tuple(order), best, deviation, freedom)


def _noise(
    losses: Mapping[tuple[float, float], Mapping[int, float]],
) -> tuple[dict[int, float], float, int]:
    """Effect of each seed, deviation of one run, and its degrees of freedom.

    They come from the points that have so many seeds or more, for the number of seeds that leaves the most degrees of
    freedom: the time may have run out between two seeds.
    """
    finite = [own for own in losses.values() if all(map(math.isfinite, own.values()))]
    tables: list[tuple[list[int], np.ndarray]] = []
    for count in range(2, max((len(own) for own in finite), default=0) + 1):
        chosen = [own for own in finite if len(own) >= count]
        seeds = sorted(set.intersection(*(set(own) for own in chosen)))
        tables.append((seeds, np.array([[own[seed] for seed in seeds] for own in chosen])))
    seeds, table = max(tables, key=lambda t: _freedom(t[1]), default=([], np.zeros((0, 0))))
    freedom = _freedom(table)
    if freedom < 1:
        return {}, math.nan, 0
    effects = table.mean(axis=0) - table.mean()
    rest = table - table.mean(axis=1, keepdims=True) - effects
    return dict(zip(seeds, effects.tolist())), math.sqrt(float((rest**2).sum()) / freedom), freedom


def _freedom(table: np.ndarray) -> int:
    points, seeds = table.shape
    return max(0, points - 1) * max(0, seeds - 1)
