"""Which runs come next: a grid that moves until its best point is inside, then more seeds of the best points.

Where the further seeds show that another point is the best, and that it lies at an edge, the grid moves on. All
decisions follow from the results so far.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.study.compare.tuning import FIRST_SEED, next_trials, tuned
from train.study.population import Member
from train.study.tune.surface import surface

BEST = 5  # points that get further seeds
Series = tuple[float, ...]


def next_members(
    rates: Series,
    decays: Series,
    results: Sequence[Mapping[str, Any]],
    trials: int,
    seeds: int,
    at_once: bool = False,
) -> list[Member]:
    """The runs to train now; none once the search is over and the best points have all their seeds.

    Args:
        rates, decays: the grid to begin with; geometric series, that of the decays with 0 before it.
        results: of all runs so far.
        trials: points that the search may try.
        seeds: runs of each of the best points.
        at_once: whether new points get all their seeds at once, which costs little where runs train side by side.
    """
    known = _known(results)
    tried = {(p["learning_rate"], p["weight_decay"]) for p in known}
    wanted = next_trials(rates, decays, known, trials)
    points = [(t["learning_rate"], t["weight_decay"]) for t in wanted]
    new = [point for point in points if point not in tried] or _finer(decays, known, trials)
    if new:
        first = range(seeds if at_once else 1)
        return [Member(*point, FIRST_SEED + i) for i in first for point in new]
    done = {(r["learning_rate"], r["weight_decay"], r["seed"]) for r in results}
    # Seed by seed, so that wherever the time runs out most points share their seeds.
    return [
        Member(*point, FIRST_SEED + i)
        for i in range(1, seeds)
        for point in best_points(known)
        if (*point, FIRST_SEED + i) not in done
    ]


def edges(results: Sequence[Mapping[str, Any]]) -> str:
    """ "η" and "λ" where the best point has no neighbours on both sides; empty where it is inside."""
    return tuned(_known(results)).edges


def _known(results: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One line per point, with its mean loss less the effects of its seeds."""
    return [dataclasses.asdict(p) for p in surface(results).points] if results else []


def _finer(
    decays: Series, known: Sequence[Mapping[str, Any]], trials: int
) -> list[tuple[float, float]]:
    """Halfway to the neighbours of the best decay, or between it and 0, where nothing was tried yet."""
    positive = [decay for decay in decays if decay > 0]
    rate, decay = best_points(known)[0]
    if len(positive) < 2:
        return []
    half = math.sqrt(positive[1] / positive[0])
    tried = [r["weight_decay"] for r in known if r["learning_rate"] == rate]
    near = (decay / half, decay * half) if decay else (positive[0] / half**2,)
    new = [x for x in near if not any(math.isclose(x, y, rel_tol=1e-6) for y in tried)]
    return [(rate, x) for x in new[: max(0, trials - len(known))]]


def best_points(known: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Points of the lowest losses, best first, and the best one without decay."""
    order = sorted(known, key=lambda r: r["loss"])
    points = [(r["learning_rate"], r["weight_decay"]) for r in order]
    chosen = points[:BEST]
    bare = [point for point in points if point[1] == 0]
    return chosen if not bare or bare[0] in chosen else [*chosen, bare[0]]
