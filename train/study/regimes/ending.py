"""The end of the schedule: does the ratio of gradients to weights rise there, and which λ over time prevents it?

With L2 decay the equilibrium norm of a weight falls with the learning rate, and the gradient of a normalised layer
grows as one over the norm. AdamC (arXiv 2506.02285) makes λ follow the learning rate. Each arm is run over three λ
with the same seeds; the set-up is that of repeated text, in a linear schedule down to zero.

Controls: L2 decay against itself with other seeds must hold 0, for the loss and for the ratio.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import optax

from train.config.fields import UserError, nearest
from train.step.update import State
from train.study.population import Member, population
from train.study.regimes import texts
from train.study.regimes.arms import ARMS
from train.study.regimes.repeated import AGAIN, Repeated
from train.study.regimes.shared import check_ranges, seeds_of
from train.study.regimes.tenths import means, record_tenths
from train.study.regimes.work import Record
from train.study.small_runs import Optimizer, SmallProgram, SmallTask

SETUP = Repeated()
USUAL = ("l2", "none", "corrected", "to_zero", "log_time", "hold_drop_ramp", "cautious", "huber")


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of the schedule: gradients over weights, corrected decay, and schedules of λ."""

    task: SmallTask = SETUP.task
    texts: tuple[str, ...] = SETUP.texts
    """Texts as in --data.text of a run, or reference: the English reference of Python."""
    arms: tuple[str, ...] = USUAL
    """Names in train/study/regimes/arms.py; l2 is always there."""
    unique: int = SETUP.unique
    """Unique training tokens."""
    steps: int = SETUP.steps
    """Updates of every run."""
    learning_rate: float = 0.008
    """Peak of every run; of arms whose own grid begins elsewhere, the middle of that."""
    seeds: int = 12
    """Runs of each arm and λ."""
    fresh_seeds: int = 0
    """Another number repeats everything with other seeds, in a folder of its own."""
    minutes: float = float("inf")
    """Time for this start. The same command goes on where it stopped."""
    processes: int = 0
    """Processes that train; 0: one per core, and one alone on an accelerator."""
    folder: str = "runs/compare-ending"
    """Where the results go."""

    @property
    def names(self) -> list[str]:
        """All arms, L2 decay first."""
        return list(dict.fromkeys(("l2", *self.arms)))

    def check(self) -> None:
        """Raises UserError for the first field that is out of its range."""
        known = [name for name, arm in ARMS.items() if arm.workers == 1 and arm.kind != "control"]
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
                ("steps", 20, 10**9),
                ("learning_rate", 1e-9, 1.0),
            ),
        )

    def units(self) -> list[str]:
        return [f"{arm} {text}" for text in self.texts for arm in self.names]

    def expected(self) -> float:
        """Number of runs."""
        points = sum(len(ARMS[arm].weight_decays) for arm in self.names) + 1
        return len(self.texts) * self.seeds * points

    def points(self, arm: str) -> list[tuple[float, float]]:
        """Learning rate and λ."""
        rates = ARMS[arm].learning_rates
        rate = self.learning_rate * rates[1] / ARMS["l2"].learning_rates[1]
        return [(rate, decay) for decay in ARMS[arm].weight_decays]

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """The jobs of a unit: all seeds of a point, one point after the other."""
        arm, _, text = unit.partition(" ")
        seeds = seeds_of(self.fresh_seeds, self.seeds)
        for i, (rate, decay) in enumerate(self.points(arm)):
            base = {"arm": arm, "text": text, "learning_rate": rate, "weight_decay": decay}
            yield [base | {"seed": seed} for seed in seeds]
            if arm == "l2" and i == 1:
                yield [base | {"seed": seed + AGAIN} for seed in seeds]

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """Trains jobs of one arm and text."""
        arm, text = jobs[0]["arm"], jobs[0]["text"]
        task = dataclasses.replace(self.task, chunk=min(self.task.chunk, self.steps))
        data = texts.read(task, text, self.unique)
        small = program(task, arm, data.vocab_size, self.steps)
        members = [Member(j["learning_rate"], j["weight_decay"], j["seed"]) for j in jobs]
        found = population(
            *(small, members, data, self.steps), places=self.seeds, look=ratios_of(small)
        )
        for job, outcome in zip(jobs, found):
            yield job | {
                "loss": outcome.loss,
                "log_ratios": [round(float(x), 5) for x in outcome.seen],
                "seconds": round(outcome.seconds, 3),
            }


@functools.lru_cache(maxsize=4)
def program(task: SmallTask, arm: str, vocab_size: int, steps: int) -> SmallProgram:
    """An arm whose gradients are watched."""
    row = ARMS[arm]
    return SmallProgram(
        *(task, task.model(vocab_size), _watched(row.build, steps), row.workers, row.curvature),
        steps,
    )


def _watched(build: Optimizer, steps: int) -> Optimizer:
    return lambda s: optax.chain(record_tenths(steps, s.axes), build(s))


@functools.lru_cache(maxsize=4)
def ratios_of(small: SmallProgram) -> Callable[[State], jax.Array]:
    """The log ratio of every tenth of a run."""
    del small  # a function of its own for every program
    return lambda state: means(state["optimizer"])
