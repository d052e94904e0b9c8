"""The page of grokking: median steps by decay and λ, with censored runs, and every decay against L2 at its best."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import special

from train.run.folder import write
from train.study.compare.statistics import Interval, holm
from train.study.compare.verdicts import interval
from train.study.facts import how_it_was_made
from train.study.regimes import figures
from train.study.regimes.arms import ARMS
from train.study.regimes.grokking import Grokking, open_end, speed
from train.study.regimes.paired import Paired, paired
from train.study.regimes.repeated import AGAIN
from train.study.regimes.work import Record

HIDDEN = 0.5  # factors of two in steps that a grid of λ, a factor of two apart, can hide
TEXT = "sums"  # there is one table
CENSORED = 1.25  # times the steps of a run, where medians of censored runs are drawn
SHOWN = 16.0  # between the best λ and the ends of the picture
TWICE = 2.0  # how much faster L2 decay must be at its best than at its smallest λ


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm at one λ.

    Attributes:
        arm, learning_rate, weight_decay: which.
        steps: until held-out answers are right, by seed; infinite if censored.
        fit: likewise for the training half.
    """

    arm: str
    learning_rate: float
    weight_decay: float
    steps: dict[int, float]
    fit: dict[int, float]

    @property
    def median(self) -> float:
        return float(np.median(list(self.steps.values())))

    @property
    def censored(self) -> int:
        return sum(math.isinf(x) for x in self.steps.values())

    @property
    def interval(self) -> Interval:
        """Of the median, from order statistics: at least 95 %, whatever the distribution is."""
        return median_interval(list(self.steps.values()))


def median_interval(values: Sequence[float]) -> Interval:
    """The median and the narrowest symmetric pair of order statistics that holds it in 95 %; with few values, all."""
    x = sorted(values)
    n, k = len(x), 0
    while k + 1 < (n + 1) // 2 and 2 * float(special.bdtr(k, n, 0.5)) <= 0.05:
        k += 1
    if k > 0:
        k -= 1
    return Interval(float(np.median(x)), x[k], x[n - 1 - k])


def points(regime: Grokking, records: Sequence[Record], again: bool = False) -> list[Point]:
    """Every arm and λ whose runs are all there; with `again` those of the A/A control."""
    found = []
    for arm in regime.names:
        for rate, decay in sorted(regime.points(arm, records)):
            mine = [
                r
                for r in records
                if (r["arm"], r["learning_rate"], r["weight_decay"]) == (arm, rate, decay)
                and (r["seed"] % 1000 >= AGAIN) == again
            ]
            if len(mine) == regime.seeds:
                steps = {r["seed"] - AGAIN * again: r["steps_to_generalise"] for r in mine}
                fit = {r["seed"]: r["steps_to_fit"] for r in mine}
                found.append(Point(arm, rate, decay, steps, fit))
    return found


def best(found: Sequence[Point], arm: str) -> Point | None:
    """The λ with the fewest steps."""
    mine = [point for point in found if point.arm == arm]
    return min(mine, key=lambda point: speed(list(point.steps.values())), default=None)


def log_ratio(arm: Point, reference: Point) -> Paired | None:
    """log2 of steps over those of a reference, seed by seed; with censored runs, the sign test alone."""
    seeds = sorted(set(arm.steps) & set(reference.steps))
    ours, theirs = ({s: math.log2(p.steps[s]) for s in seeds} for p in (arm, reference))
    if not any(math.isinf(x) for x in (*ours.values(), *theirs.values())):
        return paired(ours, theirs)
    slower = sum(ours[s] > theirs[s] for s in seeds)
    faster = sum(ours[s] < theirs[s] for s in seeds)
    n = slower + faster
    p = min(1.0, 2 * float(special.bdtr(min(slower, faster), n, 0.5))) if n else 1.0
    value = (
        arm.median / reference.median
        if math.isfinite(arm.median) and math.isfinite(reference.median)
        else math.nan
    )
    value = math.log2(value) if value > 0 else (math.inf if math.isinf(arm.median) else -math.inf)
    return Paired(Interval(value, -math.inf, math.inf), math.inf, p, len(seeds))


def failed(regime: Grokking, records: Sequence[Record]) -> list[str]:
    """Which controls do not hold."""
    found = points(regime, records)
    other = points(regime, records, again=True)
    l2 = [point for point in found if point.arm == "l2"]
    if len(l2) < len(regime.points("l2", records)) or not other:
        return ["the controls are not finished."]
    reasons = []
    same = [p for p in l2 if p.weight_decay == other[0].weight_decay]
    ratio = log_ratio(other[0], same[0])
    if ratio is None or not (ratio.interval.holds(0.0) and not ratio.p <= 0.05):
        reasons.append("L2 decay against itself, with other seeds, takes another number of steps.")
    fastest, slowest = best(found, "l2"), min(l2, key=lambda p: p.weight_decay)
    assert fastest is not None
    enough = slowest.interval.low >= TWICE * fastest.interval.high
    if math.isinf(fastest.interval.high) or not enough:
        reasons.append(
            f"this set-up does not test decay: L2 decay must be {TWICE:g} times as fast at its best as at its"
            f" smallest λ (medians {_number(fastest.median)} and {_number(slowest.median)} steps)."
        )
    others = set(regime.names) - {"none", "l2"}
    if others and _at_the_edge(fastest, found):
        reasons.append(
            f"L2 decay, with which others are compared, is not tuned: λ = {fastest.weight_decay:g} is at an end of its"
            " grid."
        )
    return reasons


def _number(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "censored"


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at its best λ, against L2 decay at its own.

    Attributes:
        point: at the best λ.
        edge: whether a better λ may lie beyond the largest or the smallest.
        ratio: log2 of steps over those of L2 decay.
        p: of the ratio, adjusted by Holm.
    """

    point: Point
    edge: bool
    ratio: Paired | None
    p: float

    @property
    def verdict(self) -> str:
        """Whether it needs fewer steps than L2 decay at its best."""
        if self.ratio is None:
            return ""
        if self.edge and self.ratio.interval.value > 0:
            return "not tuned: λ at the edge"
        if math.isinf(self.point.median):
            return "at most half of the runs generalise"
        if self.p <= 0.05 and abs(self.ratio.interval.value) > HIDDEN:
            return "faster" if self.ratio.interval.value < 0 else "slower"
        if math.isfinite(self.ratio.within):
            return f"differs by less than a factor of {2**self.ratio.within:.2f}"
        return "not resolved"


def rows(regime: Grokking, records: Sequence[Record]) -> list[Row]:
    """Arms in order, compared with L2 decay seed by seed; p is adjusted by Holm."""
    found = points(regime, records)
    reference = best(found, "l2")
    bests = [point for arm in regime.names if (point := best(found, arm)) is not None]
    edges = {p.arm: _at_the_edge(p, found) for p in bests}
    if reference is None:
        return [Row(p, edges[p.arm], None, math.nan) for p in bests]
    ratios = {p.arm: log_ratio(p, reference) for p in bests if p.arm != "l2"}
    adjusted = holm({arm: ratio.p for arm, ratio in ratios.items() if ratio is not None})
    return [Row(p, edges[p.arm], ratios.get(p.arm), adjusted.get(p.arm, math.nan)) for p in bests]


def _at_the_edge(point: Point, found: Sequence[Point]) -> bool:
    grid = {p.weight_decay: list(p.steps.values()) for p in found if p.arm == point.arm}
    return open_end(grid) is not None


def write_report(regime: Grokking, records: Sequence[Record], folder: pathlib.Path) -> list[str]:
    """Writes report.md and its picture; returns which controls failed."""
    reasons, found = failed(regime, records), points(regime, records)
    parts = [_head(reasons, regime), _best(regime, records), _table(found)]
    title = "Steps until 95 % of held-out sums are right"
    if draw(regime, found, folder / "grokking.png"):
        parts.insert(2, f"## {title}\n\n![{title}](grokking.png)\n")
    parts += [_claims(found, regime.steps), how_it_was_made(regime, records, folder)]
    write(folder / "report.md", "\n".join(part for part in parts if part))
    return reasons


def _head(reasons: Sequence[str], regime: Grokking) -> str:
    lines = [f"# Grokking: addition modulo {regime.task.modulus}", ""]
    if reasons:
        lines += ["**A control failed: nothing below may be claimed.**", ""]
        lines += [f"* {reason}" for reason in reasons]
    else:
        lines += ["All controls hold."]
    return "\n".join([*lines, ""])


def _best(regime: Grokking, records: Sequence[Record]) -> str:
    lines = [
        "| arm | best λ | median steps (95 %) | censored | log₂ of steps over L2's | p (Holm) | verdict |",
        "| --- |" + " --- |" * 6,
    ]
    for row in rows(regime, records):
        point = row.point
        ratio = ""
        if row.ratio is not None and math.isfinite(row.ratio.interval.low):
            ratio = interval(row.ratio.interval, 2)
        p = "" if math.isnan(row.p) else f"{row.p:.2g}"
        lines.append(
            f"| {ARMS[point.arm].title} | {point.weight_decay:g} | {_said(point.interval)} | {point.censored} of"
            f" {len(point.steps)} | {ratio} | {p} | {row.verdict} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Each arm at the λ of its lowest median, so all medians flatter a little. Compared seed by seed with L2"
            " decay at its best λ: Student's t of log₂ of the steps, or, where runs are censored, the sign test. A"
            f" verdict also needs a factor of {2**HIDDEN:.1f}, because neither best λ is known better than the grid."
            f" Held-out sums are looked at every {regime.task.every} steps, so steps are multiples of it.\n",
        ]
    )


def _said(x: Interval) -> str:
    return f"{_number(x.value)} ({_number(x.low)} to {_number(x.high)})"


def _table(found: Sequence[Point]) -> str:
    lines = [
        "## All points",
        "",
        "| arm | η | λ | median steps (95 %) | censored | median steps until the training half is right |",
        "| --- |" + " --- |" * 5,
    ]
    for point in found:
        fit = float(np.median(list(point.fit.values())))
        lines.append(
            f"| {ARMS[point.arm].title} | {point.learning_rate:g} | {point.weight_decay:g} | {_said(point.interval)} |"
            f" {point.censored} | {_number(fit)} |"
        )
    return "\n".join([*lines, ""])


def _claims(found: Sequence[Point], steps: int) -> str:
    l2 = [p for p in found if p.arm == "l2" and math.isfinite(p.median)]
    if len(l2) < 2:
        return ""
    slow, fast = min(l2, key=lambda p: p.weight_decay), best(l2, "l2")
    assert fast is not None
    ours = f"{slow.median / fast.median:.1f} times fewer between λ = {slow.weight_decay:g} and {fast.weight_decay:g}"
    bare = [p for p in found if p.arm == "none"]
    without = (
        f"{bare[0].censored} of {len(bare[0].steps)} runs without decay are censored, after {steps} steps"
        if bare
        else ""
    )
    return "\n".join(
        [
            "## The claims of the papers",
            "",
            "| claim | ours |",
            "| --- | --- |",
            f"| arXiv 2605.20441: about 13 times fewer epochs between λ = 0.1 and 2 | {ours} |",
            f"| the same: no generalisation below a boundary of λ | {without} |",
            "",
        ]
    )


def draw(regime: Grokking, found: Sequence[Point], path: pathlib.Path) -> bool:
    """A small panel per decay: median steps over λ in units of the best; above the dotted line most are censored."""
    lines = {}
    for arm in regime.names:
        mine, at = [p for p in found if p.arm == arm and p.weight_decay > 0], best(found, arm)
        if mine and at is not None:
            top = regime.steps * CENSORED
            lines[arm] = [(p.weight_decay / at.weight_decay, min(p.median, top)) for p in mine]
    if not lines:
        return False
    made = [
        figures.Panel(
            f"{ARMS[arm].title}\nbest λ: {at.weight_decay:.2g}",
            {TEXT: sorted(points)},
            {TEXT: sorted(lines.get("l2", [])) if arm != "l2" else []},
            (regime.steps,),
        )
        for arm, points in lines.items()
        if (at := best(found, arm)) is not None
    ]
    picture = figures.small_panels(
        made,
        "decay coefficient λ over the best λ of each decay",
        f"median steps until {100 * regime.enough:g} % are right",
        yscale="log",
    )
    figures.over_best(picture, SHOWN)
    return figures.save(picture, path)
