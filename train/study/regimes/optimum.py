"""Where a loss is lowest, between the points that were tried: a parabola over log λ, a paraboloid over log η and log λ.

Single runs are noisy and a grid is coarse, so the best point of a grid is luck to a part. A least-squares fit uses all
runs near it. Where the data do not determine a valley, the best point that was tried is taken.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.study.compare.tuning import Point, means, tuned
from train.study.regimes.sweep import rounded

NEAR = 0.25  # nats above the best point: what is farther up says little about the bottom
SLACK = 0.1  # doublings that a fit may lie outside of the points it rests on


def valley(curve: Mapping[float, float]) -> float:
    """λ at the bottom of a parabola over log λ through the lowest point and its neighbours; else that of the lowest."""
    lowest = min(curve, key=lambda x: curve[x])
    points = sorted((math.log2(x), y) for x, y in curve.items() if x > 0)
    i = min(range(len(points)), key=lambda k: points[k][1], default=0)
    if lowest == 0 or i in (0, len(points) - 1):
        return lowest
    (a, u), (b, v), (c, w) = points[i - 1 : i + 2]
    if not all(map(math.isfinite, (u, w))):
        return lowest
    top = (b - a) ** 2 * (v - w) - (b - c) ** 2 * (v - u)
    bottom = (b - a) * (v - w) - (b - c) * (v - u)
    return rounded(2.0 ** (b - 0.5 * top / bottom)) if bottom else lowest


def optimum(
    trials: Sequence[Mapping[str, Any]],
    near: float = NEAR,
    among: Sequence[Mapping[str, Any]] | None = None,
) -> Point:
    """Learning rate and λ of the lowest loss, from the runs of a search.

    With x = log2 η and y = log2 λ, loss = c_s + a·(x, y) + (x, y)ᵀ H (x, y) / 2 is fitted to all runs whose points are
    near the best; c_s is the effect of seed s. H has to be positive definite, and the bottom within the points; else
    the best point is the answer. Where no decay is best, the fit is over x alone.

    Args:
        trials: lines with "learning_rate", "weight_decay", "seed" and "loss".
        near: how far above the best point others may be [nats].
        among: the runs whose points may be the best one; None: all.
    """
    best = tuned(trials if among is None else among)
    here = (best.learning_rate, best.weight_decay)
    bare = best.weight_decay == 0
    if not math.isfinite(best.loss):
        return here
    close = {p for p, (loss, _) in means(trials).items() if loss < best.loss + near}
    runs = [
        r
        for r in trials
        if (r["learning_rate"], r["weight_decay"]) in close and (r["weight_decay"] == 0) == bare
    ]
    names = ("learning_rate",) if bare else ("learning_rate", "weight_decay")
    points = np.log2([[r[name] for name in names] for r in runs])
    if any(len(set(column)) < 3 for column in points.T):
        return here
    found = _bottom(points, [r["loss"] for r in runs], [r["seed"] for r in runs])
    if found is None:
        return here
    rate = rounded(2.0 ** found[0])
    return (rate, 0.0) if bare else (rate, rounded(2.0 ** found[1]))


def _bottom(points: np.ndarray, losses: Sequence[float], seeds: Sequence[int]) -> np.ndarray | None:
    """Of the paraboloid through points [n, d]; None where they do not determine one with a bottom among them."""
    centre = points.mean(axis=0)
    z = points - centre
    pairs = [(i, j) for i in range(z.shape[1]) for j in range(i, z.shape[1])]
    own = [np.equal(seeds, seed).astype(float) for seed in sorted(set(seeds))]
    a = np.stack([*own, *z.T, *(z[:, i] * z[:, j] for i, j in pairs)], 1)
    if len(a) <= a.shape[1]:
        return None
    solution, _, rank, _ = np.linalg.lstsq(a, np.asarray(losses), rcond=None)
    if rank < a.shape[1]:
        return None
    solution = solution[len(own) :]
    slope, curvature = solution[: z.shape[1]], np.zeros((z.shape[1],) * 2)
    for (i, j), value in zip(pairs, solution[z.shape[1] :]):
        curvature[i, j] += value
        curvature[j, i] += value
    if np.linalg.eigvalsh(curvature).min() <= 0:
        return None
    bottom = centre - np.linalg.solve(curvature, slope)
    inside = (bottom >= points.min(axis=0) - SLACK) & (bottom <= points.max(axis=0) + SLACK)
    return bottom if inside.all() else None
