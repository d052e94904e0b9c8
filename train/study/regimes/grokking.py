"""Grokking: addition modulo 97, learned from half of its table. How many steps until held-out sums are right?

Without decay a transformer learns the training half at once, and the other half late or never. Every decay with a
λ that stays the same is run over a grid of λ that grows until its best lies inside, with one learning rate and the same
seeds; a seed decides the initial weights and which half is held out. A run that has not reached 95 % at its end is
censored: it counts as longer than all that have, so medians stay correct while at least half of the runs get there.

Controls: L2 decay against itself with other seeds must hold the same number of steps; L2 decay at its best must be at
least twice as fast as at the smallest λ, or the set-up does not test decay; and where others are compared with it, its
best λ must not be at an end of its grid.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from train.config.fields import UserError, nearest
from train.study.population import Member
from train.study.regimes.addition import AdditionProgram, AdditionTask, train
from train.study.regimes.arms import ARMS
from train.study.regimes.repeated import AGAIN
from train.study.regimes.shared import check_ranges, seeds_of
from train.study.regimes.work import Record

# Schedules of λ, and decays without a λ or with one per width.
NOT_HERE = ("width_scaled", "to_zero", "log_time", "hold_drop_ramp", "corrected", "soda")
USUAL = tuple(
    name
    for name, arm in ARMS.items()
    if (arm.kind == "decay" or name == "muon_l2") and name not in NOT_HERE
)
EARLY = 0.5  # of `steps` that a run takes until its sums are right, on average over arms, about
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclasses.dataclass(frozen=True)
class Grokking:
    """Addition modulo 97: steps until held-out answers are right, by kind of decay and λ."""

    task: AdditionTask = dataclasses.field(
        default_factory=lambda: AdditionTask(width=48, mlp_width=96, heads=3)
    )
    arms: tuple[str, ...] = USUAL
    """Names in train/study/regimes/arms.py; none and l2 are always there."""
    learning_rate: float = 0.01
    """Of every run; of arms whose own grid begins elsewhere, in the same proportion."""
    steps: int = 800
    """Updates after which a run is censored."""
    factors: tuple[float, ...] = FACTORS
    """λ of every arm to begin with, as multiples of the middle of its own grid; at least two, rising."""
    further: int = 3
    """λ that may be added to those of an arm, one after the other, while the best is the largest or the smallest."""
    enough: float = 0.95
    """Share of right held-out answers."""
    seeds: int = 12
    """Runs of each arm and λ."""
    fresh_seeds: int = 0
    """Another number repeats everything with other seeds, in a folder of its own."""
    minutes: float = float("inf")
    """Time for this start. The same command goes on where it stopped."""
    processes: int = 0
    """Processes that train; 0: one per core, and one alone on an accelerator."""
    folder: str = "runs/compare-grokking"
    """Where the results go."""

    @property
    def names(self) -> list[str]:
        """All arms, no decay and L2 first."""
        return list(dict.fromkeys(("none", "l2", *self.arms)))

    def check(self) -> None:
        """Raises UserError for the first field that is out of its range."""
        known = [n for n in ARMS if n not in NOT_HERE and ARMS[n].workers == 1]
        known = [n for n in known if not ARMS[n].curvature and ARMS[n].kind != "control"]
        for arm in self.arms:
            if arm not in known:
                raise UserError(
                    f"arms: {arm!r} is not one of {', '.join(known)}; nearest: {nearest(arm, known)}."
                )
        check_ranges(
            self,
            (
                ("seeds", 2, AGAIN),
                ("fresh_seeds", 0, 900),
                ("further", 0, 20),
                ("steps", self.task.every, 10**9),
                ("enough", 0.0, 1.0),
                ("learning_rate", 1e-9, 1.0),
            ),
        )
        rising = sorted(set(self.factors)) == list(self.factors) and len(self.factors) > 1
        if not rising or not 0 < self.factors[0] <= self.factors[-1] < math.inf:
            raise UserError(
                f"factors = {self.factors} must be two or more positive numbers that rise; nearest: those of the tier,"
                f" {' '.join(f'{x:g}' for x in FACTORS)}."
            )
        if self.steps % self.task.every:
            raise UserError(
                f"steps = {self.steps} are not a multiple of task.every = {self.task.every};"
                f" nearest: {round(self.steps / self.task.every) * self.task.every}."
            )

    def units(self) -> list[str]:
        return self.names

    def expected(self) -> float:
        """Runs, those of the A/A control among them, without further λ."""
        return self.seeds * (2 + (len(self.names) - 1) * len(self.factors))

    def points(self, arm: str, results: Sequence[Record]) -> list[tuple[float, float]]:
        """Learning rate and λ: the grid, rising, and behind it what has been added at its ends, or comes next."""
        row = ARMS[arm]
        rate = self.learning_rate * row.learning_rates[1] / ARMS["l2"].learning_rates[1]
        middle = row.weight_decays[len(row.weight_decays) // 2]
        if middle == 0:
            return [(rate, 0.0)]
        grid = [rounded(middle * factor) for factor in self.factors]
        for _ in range(self.further):
            steps = {decay: self.steps_at(arm, decay, results) for decay in grid}
            if any(len(found) < self.seeds for found in steps.values()):
                break
            end = open_end(steps)
            if end is None:
                break
            ends = sorted(grid)
            grid.append(rounded(end * end / (ends[-2] if end == ends[-1] else ends[1])))
        return [(rate, decay) for decay in grid]

    def steps_at(self, arm: str, decay: float, results: Sequence[Record]) -> list[float]:
        """Steps of the runs of an arm at one λ, those that are there, without the A/A control."""
        return [
            r["steps_to_generalise"]
            for r in results
            if (r["arm"], r["weight_decay"]) == (arm, decay) and r["seed"] % 1000 < AGAIN
        ]

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """The jobs of an arm: all seeds of a point, one point after the other."""
        seeds, i = seeds_of(self.fresh_seeds, self.seeds), 0
        while i < len(grid := self.points(unit, results)):
            rate, decay = grid[i]
            base = {"arm": unit, "learning_rate": rate, "weight_decay": decay}
            yield [base | {"seed": seed} for seed in seeds]
            if unit == "l2" and i == 1:
                yield [base | {"seed": seed + AGAIN} for seed in seeds]
            i += 1

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """Trains jobs of one arm."""
        small = program(self.task, jobs[0]["arm"], self.steps)
        members = [Member(j["learning_rate"], j["weight_decay"], j["seed"]) for j in jobs]
        for job, found in zip(jobs, train(small, members, self.enough)):
            yield job | {
                "steps_to_generalise": math.inf if found.steps is None else float(found.steps),
                "steps_to_fit": math.inf if found.train_steps is None else float(found.train_steps),
                "accuracy": found.accuracy,
                "seconds": round(found.seconds, 3),
            }


def rounded(decay: float) -> float:
    return float(f"{decay:.3g}")


def speed(steps: Sequence[float]) -> tuple[float, int, float]:
    """Orders λ, the best first: by median, then by the number of censored runs, then by the mean of the others."""
    finite = [x for x in steps if math.isfinite(x)]
    mean = float(np.mean(finite)) if finite else math.inf
    return float(np.median(steps)), len(steps) - len(finite), mean


def open_end(steps: Mapping[float, Sequence[float]]) -> float | None:
    """The λ at an end of a grid beyond which the best may lie: the best one, if it is better than its neighbour.

    Where no run at all gets there, it is the largest λ.
    """
    decays = sorted(steps)
    speeds = [speed(steps[decay]) for decay in decays]
    best = min(speeds)
    if len(decays) < 2:
        return None
    if math.isinf(best[-1]) or speeds[-1] == best < speeds[-2]:
        return decays[-1]
    return decays[0] if speeds[0] == best < speeds[1] else None


@functools.lru_cache(maxsize=4)
def program(task: AdditionTask, arm: str, steps: int) -> AdditionProgram:
    return AdditionProgram(task, ARMS[arm].build, steps)
