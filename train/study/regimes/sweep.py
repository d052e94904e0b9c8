"""A sweep over λ with a few seeds: it goes on until the best λ is inside, and a loss of 0.02 nats is on both sides.

Points are a factor of two apart. The mean losses by λ are the curve of an arm; the bottom of its valley is the λ that
the runs that count are made with, and its width at 0.02 nats says how forgiving the arm is.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.study.compare.tuning import Point
from train.study.regimes.paired import CLOSE
from train.study.regimes.work import Record

WIDEST = 9  # values of λ


class Live(Sequence[Mapping[str, Any]]):
    """The records among growing results that have some fields and seeds."""

    def __init__(
        self, results: Sequence[Mapping[str, Any]], fields: Mapping[str, Any], seeds: set[int]
    ):
        self._results, self._fields, self._seeds = results, fields, seeds

    def _chosen(self) -> list[Mapping[str, Any]]:
        return [
            r
            for r in self._results
            if r["seed"] in self._seeds and all(r[k] == v for k, v in self._fields.items())
        ]

    def __len__(self) -> int:
        return len(self._chosen())

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._chosen())

    def __getitem__(self, i: Any) -> Any:
        return self._chosen()[i]


def profile(records: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[float, float]:
    """Mean loss of every λ that has all the seeds."""
    found: dict[float, dict[int, float]] = collections.defaultdict(dict)
    for r in records:
        found[r["weight_decay"]][r["seed"]] = r["loss"]
    return {
        decay: float(np.mean([losses[seed] for seed in seeds]))
        for decay, losses in sorted(found.items())
        if all(seed in losses for seed in seeds)
    }


def lowest(means: Mapping[float, float]) -> float:
    """The λ of the lowest mean loss."""
    return min(means, key=lambda decay: means[decay])


def values(
    centre: float, records: Sequence[Mapping[str, Any]], seeds: Sequence[int], first: int = 1
) -> Iterator[list[float]]:
    """Lists of λ to train, all seeds each; `records` has to hold their results when the next list is asked for.

    Args:
        centre: where to begin; 0: that alone.
        records: of this sweep, at one learning rate.
        seeds: of every λ.
        first: points on each side of the centre in the first list.
    """
    if centre == 0:
        yield [0.0]
        return
    yield [rounded(centre * 2.0**k) for k in range(-first, first + 1)]
    while len(means := profile([r for r in records if r["weight_decay"] > 0], seeds)) < WIDEST:
        best, low, high = lowest(means), min(means), max(means)
        below = best == low or not means[low] > means[best] + CLOSE
        above = best == high or not means[high] > means[best] + CLOSE
        wanted = [rounded(low / 2)] * below + [rounded(high * 2)] * above
        if not wanted:
            return
        yield wanted[: WIDEST - len(means)]


def rounded(decay: float) -> float:
    """Three significant digits, so that a λ is one number wherever it is computed."""
    return float(f"{decay:.3g}")


def wanted(
    base: Record, centre: Point, results: Sequence[Record], seeds: Sequence[int]
) -> Iterator[list[Record]]:
    """The jobs of a sweep, list by list, without those that are there; `results` has to grow by each.

    Args:
        base: fields of all its jobs.
        centre: learning rate, and the λ to begin with.
        results: lines of any kind.
        seeds: of every λ.
    """
    point = {**base, "learning_rate": centre[0]}
    records = Live(results, point, set(seeds))
    for decays in values(centre[1], records, seeds):
        there = {(r["weight_decay"], r["seed"]) for r in records}
        jobs = [
            point | {"weight_decay": decay, "seed": seed}
            for decay in decays
            for seed in seeds
            if (decay, seed) not in there
        ]
        if jobs:
            yield jobs
