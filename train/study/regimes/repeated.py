"""Repeated text: U unique tokens, seen E times. Here weight decay decides the loss on held-out text.

Every arm is tuned over learning rate and λ together (`arm_tuning.py`), with runs of full length on seeds that no result
uses. Runs that count share their seeds with those of all other arms.

A search that is repeated with other seeds ends at another point. L2 decay is therefore tuned several times; the spread
of its losses is the luck of a search, and belongs to every interval.

Muon is a control in one pass over the whole text, where it is known to beat AdamW; on repeated text it need not.

Further units vary the number of epochs at equal steps, the length, and the batch, for no decay, L2 and Huber decay.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from train.config.fields import UserError, nearest
from train.study.compare.tuning import FIRST_SEED, Point
from train.study.population import Member, population
from train.study.regimes import kept_weights, points, sweep, texts
from train.study.regimes.arm_tuning import FINER, ArmTuning
from train.study.regimes.arms import ARMS, TUNINGS, tuned_again
from train.study.regimes.work import Record
from train.study.small_runs import SmallProgram, SmallTask

APART = 1000  # between the seeds of two repetitions
AGAIN = 500  # from the seeds of an arm to those of the A/A control
BETWEEN = 100  # between the tuning seeds of two searches for one arm
CONTROLS = ("none", "l2", "muon_l2")
SETTING = ("arm", "text", "unique", "steps", "batch_size")
AXIS = ("none", "l2", "huber")
ONE_PASS = "one pass"
ONE_PASS_DECAY = 0.5  # where compare one_pass has found the best λ of both


@dataclasses.dataclass(frozen=True)
class Repeated:
    """Repeated text: every decay on Adam, some on Muon, and optimizers with L2 decay."""

    task: SmallTask = dataclasses.field(
        default_factory=lambda: SmallTask(
            width=48, mlp_width=144, heads=3, batch_size=4, eval_batches=64
        )
    )
    texts: tuple[str, ...] = ("stdlib", "reference")
    """Texts as in --data.text of a run, or reference: the English reference of Python. A claim needs all."""
    arms: tuple[str, ...] = tuple(
        n for n in ARMS if n not in CONTROLS and ARMS[n].kind != "control"
    )
    """Names in train/study/regimes/arms.py; no decay, L2 and Muon with L2 are always there."""
    unique: int = 19_200
    """Unique training tokens."""
    steps: int = 1200
    """Updates of every run; steps × batch_size × length / unique is the number of epochs."""
    trials: int = 15
    """Runs of the coarse grid of each arm on each text."""
    finer_points: int = 15
    """Points that a finer grid may have, at least 9."""
    finer_seeds: int = 2
    """Runs of each of these points, and of every λ in the sweep of an arm."""
    sweep_seeds: int = 3
    """Runs of every λ in a sweep over epochs, length and batch."""
    tunings: int = 3
    """Searches for the point of L2 decay, on Adam and on Muon; their spread is the luck of a search."""
    seeds: int = 12
    """Runs that count, of each arm on each text."""
    epochs: tuple[int, ...] = (1, 4, 64)
    """Further numbers of epochs, at equal steps, on the first text."""
    lengths: tuple[float, ...] = (0.5, 2.0)
    """Further lengths on the first text, as multiples of the steps; the number of epochs stays."""
    batches: tuple[int, ...] = (2,)
    """Further batches on the first text, as multiples of the batch; steps become fewer, the tokens stay the same."""
    points: str = ""
    """A points.json that a finished comparison has left: learning rates and λ are taken from it, and not tuned."""
    fresh_seeds: int = 0
    """Another number repeats everything with other seeds, in a folder of its own."""
    minutes: float = float("inf")
    """Time for this start. The same command goes on where it stopped."""
    processes: int = 0
    """Processes that train; 0: one per core, and one alone on an accelerator."""
    folder: str = "runs/compare-repeated"
    """Where the results go."""

    @property
    def names(self) -> list[str]:
        """All arms, controls first."""
        return [*CONTROLS, *dict.fromkeys(self.arms)]

    def check(self) -> None:
        """Raises UserError for the first field that is out of its range."""
        for arm in self.arms:
            others = [name for name in ARMS if ARMS[name].kind != "control"]
            if arm not in others:
                raise UserError(
                    f"arms: {arm!r} is not one of {', '.join(others)}; nearest: {nearest(arm, others)}."
                )
        if self.trials < 9:
            raise UserError(f"trials = {self.trials} do not fill a grid of 9 points; nearest: 9.")
        for name, low, high in (
            ("seeds", 2, AGAIN),
            ("finer_points", 9, 10**6),
            ("finer_seeds", 1, FINER),
            ("sweep_seeds", 2, FINER),
            ("tunings", 1, TUNINGS),
            ("fresh_seeds", 0, 900),
            ("steps", 2, 10**9),
        ):
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"{name} = {getattr(self, name)} must be {low} to {high};"
                    f" nearest: {min(max(getattr(self, name), low), high)}."
                )
        self._check_further()
        if self.points:
            points.check(self.points, self.names, self.texts)
        if not self.texts or len(set(self.texts)) < len(self.texts):
            raise UserError(f"texts = {self.texts}: name at least one, and each once.")
        workers = max(ARMS[name].workers for name in self.names)
        if self.task.batch_size % workers:
            raise UserError(
                f"task.batch_size = {self.task.batch_size} cannot be split over the {workers} workers of one_bit_adam;"
                f" nearest: {max(1, round(self.task.batch_size / workers)) * workers}."
            )

    def _check_further(self) -> None:
        """Raises UserError for further settings that are out of range, or those of the arms themselves."""
        batch = self.task.batch_size
        for name, least in (("epochs", 1), ("lengths", 2 / self.steps), ("batches", 1)):
            for value in getattr(self, name):
                if value < least:
                    raise UserError(
                        f"{name} = {value:g} must be {least:g} or more; nearest: {least:g}."
                    )
        for unit in self.units():
            unique, steps, rows = self.settings(unit)
            same = (unique, steps, rows) == (self.unique, self.steps, batch)
            if unit not in ARMS and (same or steps < 2):
                raise UserError(
                    f"{unit}: {unique} unique tokens, {steps} steps of {rows} sequences are those of all arms, or too"
                    " few steps; leave it out."
                )

    def check_texts(self) -> None:
        """Raises UserError where a text has fewer tokens than a unit wants, before anything is trained."""
        for unit in self.units():
            unique = self.settings(unit)[0]
            for text in self.texts if unit in ARMS else self.texts[:1]:
                try:
                    texts.read(self.task, text, unique)
                except UserError as error:
                    raise UserError(f"{unit}: {error}") from None

    @property
    def repeats(self) -> list[str]:
        """L2 decay at the points of further searches."""
        if self.points:
            return []
        return [
            tuned_again(arm, k) for k in range(2, self.tunings + 1) for arm in ("l2", "muon_l2")
        ]

    def first_seed(self, arm: str) -> int:
        """Of the search and the sweep of an arm."""
        which = int(arm.rpartition("_tuned_")[2]) - 1 if arm in self.repeats else 0
        return FIRST_SEED + APART * self.fresh_seeds + BETWEEN * which

    def seeds_of_sweep(self, arm: str) -> list[int]:
        return [self.first_seed(arm) + i for i in range(self.sweep_seeds)]

    @property
    def counted_seeds(self) -> list[int]:
        return [APART * self.fresh_seeds + i for i in range(self.seeds)]

    def units(self) -> list[str]:
        """Arms in order, and after the controls the further settings."""
        if self.points:
            return [*self.names[: len(CONTROLS)], ONE_PASS, *self.names[len(CONTROLS) :]]
        further = [f"epochs {e}" for e in self.epochs]
        further += [f"steps × {x:g}" for x in self.lengths] + [f"batch × {x}" for x in self.batches]
        controls, others = self.names[: len(CONTROLS)], self.names[len(CONTROLS) :]
        return list(dict.fromkeys([*controls, ONE_PASS, *self.repeats, *further, *others]))

    def expected(self) -> float:
        """Runs, about; in units of one of `steps`."""
        tuning = 0 if self.points else self.trials + 13 * self.finer_seeds
        names = len(self.names) + len(self.repeats)
        arms = names * len(self.texts) * tuning + (names + 3) * len(self.texts) * self.seeds
        if self.points:
            return arms
        further = len(self.epochs) + sum(self.lengths) + len(self.batches)
        return arms + 15 * self.sweep_seeds * further

    def settings(self, unit: str) -> tuple[int, int, int]:
        """Unique tokens (0: the whole text), steps and batch of a unit."""
        kind, _, number = unit.rpartition(" ")
        batch = self.task.batch_size
        if unit == ONE_PASS:
            return 0, self.steps, batch
        if kind == "epochs":
            tokens = self.steps * batch * self.task.length
            return max(1, tokens // int(number)), self.steps, batch
        if kind == "steps ×":
            factor = float(number)
            return round(self.unique * factor), round(self.steps * factor), batch
        if kind == "batch ×":
            return self.unique, max(1, self.steps // int(number)), batch * int(number)
        return self.unique, self.steps, batch

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """The jobs of a unit, list by list; `results` has to grow by each."""
        unique, steps, batch = self.settings(unit)
        if unit == ONE_PASS:
            for text in self.texts:
                for arm in ("l2", "muon_l2"):
                    base = dict(zip(SETTING, (arm, text, unique, steps, batch)))
                    point = {"learning_rate": middle(arm)[0], "weight_decay": ONE_PASS_DECAY}
                    yield [base | point | {"seed": seed} for seed in self.counted_seeds]
            return
        if unit not in ARMS:
            for arm in AXIS:
                base = dict(zip(SETTING, (arm, self.texts[0], unique, steps, batch)))
                yield from sweep.wanted(base, middle(arm), results, self.seeds_of_sweep(arm))
            return
        for text in self.texts:
            base = dict(zip(SETTING, (unit, text, unique, steps, batch)))
            if not self.points:
                yield from self.tuning(unit, text).wanted(results)
            rate, decay = self.point(unit, text, results)
            point = {"learning_rate": rate, "weight_decay": decay}
            yield [base | point | {"seed": seed} for seed in self.counted_seeds]
            if (
                unit in AXIS
                and text == self.texts[0]
                and self.epochs + self.lengths + self.batches
                and not self.points
            ):
                # The other settings are swept at this rate.
                yield from sweep.wanted(base, middle(unit), results, self.seeds_of_sweep(unit))
            if unit == "l2":
                yield [
                    base | {"arm": "again"} | point | {"seed": seed + AGAIN}
                    for seed in self.counted_seeds
                ]

    def tuning(self, arm: str, text: str) -> ArmTuning:
        """How an arm is tuned on a text."""
        base = dict(zip(SETTING, (arm, text, *self.settings(arm))))
        return ArmTuning(
            *(base, self.first_seed(arm), self.trials, self.finer_points, self.finer_seeds)
        )

    def point(self, arm: str, text: str, results: Sequence[Record]) -> Point:
        """Learning rate and λ of the runs that count."""
        if self.points:
            return points.read(self.points)[arm, text]
        return self.tuning(arm, text).point(results)

    def profile(self, arm: str, unit: str, results: Sequence[Record]) -> dict[float, float]:
        """Mean losses by λ in a setting of a further unit, or in that of all arms, at the middle learning rate."""
        base = dict(zip(SETTING, (arm, self.texts[0], *self.settings(unit))))
        seeds, rate = self.seeds_of_sweep(arm), middle(arm)[0]
        return sweep.profile(sweep.Live(results, base | {"learning_rate": rate}, set(seeds)), seeds)

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """Trains jobs; the final weights of those that count are kept in a folder."""
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for job in jobs:
            groups.setdefault(tuple(job[name] for name in SETTING), []).append(job)
        for (arm, text, unique, steps, batch), group in groups.items():
            task = dataclasses.replace(
                self.task, batch_size=batch, chunk=min(self.task.chunk, steps)
            )
            data = texts.read(task, text, unique)
            counted = group[0]["seed"] < FIRST_SEED and unique > 0 and arm != "again"
            members = [
                Member(job["learning_rate"], job["weight_decay"], job["seed"]) for job in group
            ]
            small = program(task, arm, data.vocab_size, steps)
            found = population(
                *(small, members, data, steps),
                places=self.seeds,
                look=weights(small) if counted else None,
            )
            for job, outcome in zip(group, found):
                record = job | {
                    "loss": outcome.loss,
                    "training_loss": _mean_of_end(outcome.losses),
                    "seconds": round(outcome.seconds, 3),
                }
                if counted:
                    record["weights"] = kept_weights.keep(outcome.seen, folder, job)
                yield record


def middle(arm: str) -> Point:
    """Learning rate and λ in the middle of an arm's first grid."""
    row = ARMS[arm]
    return row.learning_rates[1], row.weight_decays[len(row.weight_decays) // 2]


@functools.lru_cache(maxsize=4)
def program(task: SmallTask, arm: str, vocab_size: int, steps: int) -> SmallProgram:
    row = ARMS[arm]
    return SmallProgram(task, task.model(vocab_size), row.build, row.workers, row.curvature, steps)


@functools.lru_cache(maxsize=4)
def weights(small: SmallProgram) -> Callable[[Any], Any]:
    """The weights of one run, to be looked at afterwards."""
    return small.params


def _mean_of_end(losses: np.ndarray) -> float:
    return float(np.mean(losses[-max(1, len(losses) // 20) :]))
