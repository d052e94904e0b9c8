"""What the losses of some runs allow to be said: intervals, and which of several differences are real.

Losses are nats per token at the end of a run; a run that diverged has +infinity, and so has the mean it is in.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

DRAWS = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate, and a two-sided interval of 95 % confidence around it."""

    value: float
    low: float
    high: float

    def holds(self, number: float) -> bool:
        return self.low <= number <= self.high


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean loss of one arm less that of another (Welch, unequal variances).

    Attributes:
        interval: of the difference.
        upper: end of the one-sided interval of 95 %: the difference is below it.
        p: of no difference, two-sided; nan where a run diverged.
    """

    interval: Interval
    upper: float
    p: float


def welch(arm: Sequence[float], reference: Sequence[float]) -> Difference:
    """The difference of two means; at least two losses each.

    Where a run of the arm diverged the difference is infinite.
    """
    a, b = np.asarray(arm, float), np.asarray(reference, float)
    for name, x in (("arm", a), ("reference", b)):
        if len(x) < 2:
            raise ValueError(f"{name} has {len(x)} losses; an interval needs 2 or more.")
    if not np.isfinite(np.concatenate([a, b])).all():
        sign = math.inf if np.isfinite(b).all() else math.nan
        return Difference(Interval(sign, -math.inf, math.inf), math.inf, math.nan)
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    error = math.sqrt(parts.sum())
    difference = float(a.mean() - b.mean())
    if error == 0:
        return Difference(Interval(difference, difference, difference), difference, math.nan)
    freedom = parts.sum() ** 2 / (parts**2 / (np.array([len(a), len(b)]) - 1)).sum()
    two, one = (error * float(special.stdtrit(freedom, q)) for q in ((1 + LEVEL) / 2, LEVEL))
    p = 2 * float(special.stdtr(freedom, -abs(difference) / error))
    return Difference(Interval(difference, difference - two, difference + two), difference + one, p)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p: those at most 0.05 hold together with 95 % confidence. nan counts as 1."""
    order = sorted(p, key=lambda name: _or_one(p[name]))
    adjusted, largest = {}, 0.0
    for i, name in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - i) * _or_one(p[name])))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def _or_one(p: float) -> float:
    return 1.0 if math.isnan(p) else p


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Loss of AdamW by budget: a parabola in the logarithm of the steps, between the smallest and the largest budget.

    Attributes:
        coefficients: of 1, x, x² with x = ln(steps / the geometric middle), [..., 3]; leading axes are resamples.
        ends: x of the smallest and the largest budget.
        middle: that geometric middle [steps].
    """

    coefficients: np.ndarray
    ends: tuple[float, float]
    middle: float

    def loss(self, steps: np.ndarray) -> np.ndarray:
        a, b, c = np.moveaxis(self.coefficients[..., None], -2, 0)
        x = np.log(np.asarray(steps) / self.middle)
        return a + b * x + c * x**2

    def falls(self) -> np.ndarray:
        """Whether more steps are better everywhere: without that it cannot be read backwards."""
        _, b, c = np.moveaxis(self.coefficients, -1, 0)
        return (b + 2 * c * self.ends[0] < 0) & (b + 2 * c * self.ends[1] < 0)

    def steps(self, loss: np.ndarray) -> np.ndarray:
        """Steps AdamW needs for a loss, 0 for an infinite one; nan where the ladder does not fall.

        Losses above or below those of the ladder are read as its ends: nothing is known beyond.
        """
        a, b, c = np.moveaxis(self.coefficients, -1, 0)
        highest, lowest = (a + b * x + c * x * x for x in self.ends)
        inside = np.minimum(np.maximum(loss, lowest), highest)
        with np.errstate(invalid="ignore", divide="ignore"):
            root = np.sqrt(np.maximum(b**2 - 4 * c * (a - inside), 0))
            x = 2 * (a - inside) / (-b + root)  # the stable form; exact for c = 0 too
        steps = np.where(np.isposinf(loss), 0.0, self.middle * np.exp(np.clip(x, *self.ends)))
        return np.where(self.falls(), steps, np.nan)


def ladder(budgets: Sequence[int], means: np.ndarray) -> Ladder:
    """Least squares through the mean losses [..., budgets] of three budgets or more."""
    if len(set(budgets)) < 3:
        raise ValueError(f"a parabola needs 3 budgets or more, not {sorted(set(budgets))}.")
    x = np.log(np.asarray(budgets, float))
    middle = float(np.exp((x.min() + x.max()) / 2))
    x = x - math.log(middle)
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    coefficients = np.asarray(means) @ np.linalg.pinv(design).T
    return Ladder(coefficients, (float(x.min()), float(x.max())), middle)


def speedup(
    losses: Mapping[int, Sequence[float]],
    arm: Sequence[float],
    steps: int,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """Steps AdamW needs for an arm's mean loss, over the arm's steps.

    The interval is a bootstrap over seeds, within every budget and the arm. Percentiles are taken further out, by
    sqrt(n/(n-1)) and Student's t over the normal quantile for the arm's n seeds, since few seeds scatter less than
    they should (Hesterberg, arXiv 1411.5279).

    Args:
        losses: AdamW's, by budget.
        arm: the arm's, all with a budget of `steps`.
        seed: of the resampling.
        draws: resamples.

    Returns:
        Between the smallest and the largest budget over `steps`, which then mean "at most" and "at least"; nan
        everywhere if a run of AdamW diverged or its losses do not fall; 0 where the arm diverged.
    """
    rng = np.random.default_rng(seed)
    budgets = sorted(losses)
    means = np.array([np.mean(losses[b]) for b in budgets])
    mine = np.asarray(arm, float)
    if not np.isfinite(means).all() or not ladder(budgets, means).falls():
        return Interval(math.nan, math.nan, math.nan)
    value = ladder(budgets, means).steps(np.array(mine.mean())).item() / steps

    def resampled(values: Sequence[float] | np.ndarray) -> np.ndarray:
        x = np.asarray(values, float)
        return x[rng.integers(len(x), size=(draws, len(x)))].mean(axis=1)

    again = ladder(budgets, np.stack([resampled(losses[b]) for b in budgets], axis=1))
    ratios = again.steps(resampled(mine)) / steps
    ratios = ratios[~np.isnan(ratios)]
    n = len(mine)
    reach = math.sqrt(n / (n - 1)) * float(special.stdtrit(n - 1, (1 + LEVEL) / 2))
    tail = float(special.ndtr(-reach))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
