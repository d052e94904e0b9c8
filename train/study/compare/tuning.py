"""Which learning rate and decay an arm is run with: a search of a fixed number of trials, the same for every arm.

A trial is one short run at one point of a grid, with a seed that no result uses. First the arm's own grid; then, as
long as the best point lies at an edge, another row beyond that edge; with the best point inside, further seeds for
the best points. What has been tried so far decides what comes next, so that a search that was stopped goes on.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Point = tuple[float, float]  # learning rate, weight decay
FIRST_SEED = 1_000_000  # of tuning
BEST = 3  # points among which further seeds are shared


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Where a search ended.

    Attributes:
        learning_rate, weight_decay: the point of the lowest mean loss.
        loss: there [nats per token].
        trials: runs it took.
        edges: "η" and "λ", if that point has no neighbours on both sides in that direction.
    """

    learning_rate: float
    weight_decay: float
    loss: float
    trials: int
    edges: str


def means(trials: Sequence[Mapping[str, Any]]) -> dict[Point, tuple[float, int]]:
    """Mean loss and number of seeds of every point."""
    losses = collections.defaultdict(list)
    for trial in trials:
        losses[trial["learning_rate"], trial["weight_decay"]].append(trial["loss"])
    return {point: (float(np.mean(values)), len(values)) for point, values in losses.items()}


def tuned(trials: Sequence[Mapping[str, Any]]) -> Tuned:
    found = means(trials)
    best = min(found, key=lambda point: found[point][0])
    edges = "".join(letter for letter, side in zip("ηλ", _sides(found, best)) if side)
    return Tuned(*best, found[best][0], len(trials), edges)


def next_trials(
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    trials: Sequence[Mapping[str, Any]],
    budget: int,
) -> list[dict[str, Any]]:
    """Learning rate, weight decay and seed of the trials to run now; none once there are `budget` of them.

    Args:
        learning_rates, weight_decays: the grid to begin with, of `Arm`.
        trials: those that were run.
        budget: how many there may be.
    """
    left = budget - len(trials)
    found = means(trials)
    grid = [(rate, decay) for rate in learning_rates for decay in weight_decays]
    points = [point for point in grid if point not in found]
    if not points and left > 0:
        best = min(found, key=lambda point: found[point][0])
        points = _beyond(found, best, learning_rates, weight_decays)
        if not points:
            lowest = sorted(found, key=lambda point: found[point][0])[:BEST]
            points = [min(lowest, key=lambda point: found[point][1])]
    seeds = {point: FIRST_SEED + found.get(point, (0, 0))[1] for point in points}
    return [
        {"learning_rate": point[0], "weight_decay": point[1], "seed": seeds[point]}
        for point in points[: max(0, left)]
    ]


def _sides(found: Mapping[Point, Any], best: Point) -> tuple[int, int]:
    """-1 or 1 where the best point is the lowest or highest tried in a direction, 0 where it is inside or not tuned.

    No decay at all is inside: there is nothing below it.
    """
    sides = []
    for axis in (0, 1):
        values = {point[axis] for point in found}
        low, high = best[axis] == min(values), best[axis] == max(values)
        sides.append(0 if len(values) == 1 or best[axis] == 0 else int(high) - int(low))
    return sides[0], sides[1]


def _beyond(
    found: Mapping[Point, Any], best: Point, rates: Sequence[float], decays: Sequence[float]
) -> list[Point]:
    """The row beyond the edge that the best point lies at: next to it first, and on both sides of that."""
    for axis, series in enumerate((rates, decays)):
        side = _sides(found, best)[axis]
        if side:
            new = best[axis] * (series[-1] / series[-2]) ** side
            across = sorted(
                {point[1 - axis] for point in found},
                key=lambda value: abs(np.log(max(value, 1e-12) / max(best[1 - axis], 1e-12))),
            )[:3]
            return [(new, value) if axis == 0 else (value, new) for value in across]
    return []
