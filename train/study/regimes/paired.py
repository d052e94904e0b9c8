"""What losses of runs that share their seeds allow to be said.

Two arms with one seed start from the same weights and see the same text in the same order. With d the differences
seed by seed, m their mean and s their deviation over n seeds,

    m ± t s/√n          with Student's t of n - 1 degrees of freedom

is the interval, and max |m ± t₉₀ s/√n| with the interval of 90 % is the bound of equivalence: two one-sided tests of
5 % each say that the arms differ by less than that.

An arm stands at the point where its search has ended, and another search would have ended elsewhere. Arms that are
searched for k times show this luck: with v the variance of their means over the same seeds, less what the noise of
single runs adds to it,

    m ± t √(s²/n + v (1 + 1/k))     where the reference is the mean of k searches, and the arm has one

with the degrees of freedom of Welch and Satterthwaite.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from train.study.compare.statistics import LEVEL, Interval

CLOSE = 0.02  # nats: a loss that costs this much is close to the best one


@dataclasses.dataclass(frozen=True)
class Paired:
    """Loss of one arm less that of another, over the seeds of both.

    Attributes:
        interval: of the mean difference, 95 %.
        within: the bound of equivalence: the arms differ by less than this.
        p: of no difference, two-sided; nan where a run diverged or all differences are equal.
        seeds: number of pairs.
    """

    interval: Interval
    within: float
    p: float
    seeds: int


@dataclasses.dataclass(frozen=True)
class Luck:
    """What a search adds to the variance of a difference from the mean of some searches.

    Attributes:
        variance: v (1 + 1/k) [nats²].
        freedom: degrees of freedom of v.
    """

    variance: float
    freedom: float


NO_LUCK = Luck(0.0, math.inf)


def luck(groups: Sequence[Sequence[Mapping[int, float]]]) -> Luck:
    """From groups of k ≥ 2 searches for one arm each: the losses of every search, over the same seeds."""
    between, within, freedom = 0.0, 0.0, 0
    searches = [len(group) for group in groups]
    for group in groups:
        seeds = sorted(set.intersection(*(set(losses) for losses in group)))
        table = np.array([[losses[seed] for seed in seeds] for losses in group])
        k, n = table.shape
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        between += (k - 1) * float(table.mean(axis=1).var(ddof=1))
        within += float((rest**2).sum()) / (n - 1) / n
        freedom += k - 1
    if not freedom:
        return NO_LUCK
    variance = max(0.0, between - within) / freedom
    return Luck(variance * (1 + 1 / min(searches)), freedom)


def paired(
    arm: Mapping[int, float], reference: Mapping[int, float], chance: Luck = NO_LUCK
) -> Paired | None:
    """The difference over the seeds that both have; None below two of them.

    A run of the arm that diverged makes the difference infinite. `chance` belongs to arms that were searched for.
    """
    seeds = sorted(set(arm) & set(reference))
    if len(seeds) < 2:
        return None
    a, b = (np.array([losses[seed] for seed in seeds]) for losses in (arm, reference))
    if not np.isfinite([a, b]).all():
        value = math.inf if np.isfinite(b).all() else math.nan
        return Paired(Interval(value, -math.inf, math.inf), math.inf, math.nan, len(seeds))
    d = a - b
    mean, noise = float(d.mean()), float(d.var(ddof=1)) / len(d)
    error = math.sqrt(noise + chance.variance)
    if error == 0:
        return Paired(Interval(mean, mean, mean), abs(mean), math.nan, len(seeds))
    freedom = error**4 / (noise**2 / (len(d) - 1) + chance.variance**2 / chance.freedom)
    two, one = (error * float(special.stdtrit(freedom, q)) for q in ((1 + LEVEL) / 2, LEVEL))
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error))
    return Paired(Interval(mean, mean - two, mean + two), abs(mean) + one, p, len(seeds))


@dataclasses.dataclass(frozen=True)
class Forgiveness:
    """The range of λ around the best one whose loss is within `CLOSE` of the lowest, on straight lines over log λ.

    Attributes:
        low, high: its ends; 0 where no decay at all is in it.
        open_low, open_high: whether it goes on beyond what was tried.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def doublings(self) -> float:
        """How many factors of two fit in; infinite from 0 on."""
        return math.log2(self.high / self.low) if self.low > 0 else math.inf

    def __str__(self) -> str:
        least = "≥ " if self.open_low or self.open_high else ""
        return f"{least}{self.doublings:.1f}" if self.low > 0 else "no decay too"


def forgiveness(profile: Mapping[float, float]) -> Forgiveness | None:
    """From mean losses by λ > 0, at one learning rate and with the same seeds; None below three of them."""
    rows = sorted((x, y) for x, y in profile.items() if x > 0)
    if len(rows) < 3 or not any(math.isfinite(y) for _, y in rows):
        return None
    at = min(range(len(rows)), key=lambda i: rows[i][1])
    low, open_low = _end(rows[at::-1], rows[at][1] + CLOSE)
    high, open_high = _end(rows[at:], rows[at][1] + CLOSE)
    return Forgiveness(low, high, open_low, open_high)


def _end(rows: list[tuple[float, float]], level: float) -> tuple[float, bool]:
    """Where losses rise above a level, going outwards from the best; and whether they never do."""
    for (a, low), (b, high) in itertools.pairwise(rows):
        if high > level:
            share = (level - low) / (high - low) if math.isfinite(high) else 0.0
            return a * (b / a) ** share, False
    return rows[-1][0], True
