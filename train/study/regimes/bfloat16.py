"""Weights stored in bfloat16: which λ still acts, by the way an update is rounded?

A step of decay multiplies a weight by 1 - ηλ. bfloat16 keeps 8 significant bits, so a shrink below 2⁻⁹ is rounded away
unless the gradient moves the weight. Every form of rounding is run over the same λ with the same seeds, at a small and
a usual learning rate; forms are compared with float32 weights seed by seed. The set-up is that of repeated text.

Controls: float32 weights against themselves with other seeds must hold 0; and at the usual learning rate, L2 decay on
float32 weights must beat no decay by more than 0.1 nats.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from train.step.update import State
from train.study.population import Member, population
from train.study.regimes import texts
from train.study.regimes.repeated import AGAIN, Repeated
from train.study.regimes.repeated import program as plain
from train.study.regimes.rounding import FORMS, RoundedProgram, wide
from train.study.regimes.shared import check_ranges, seeds_of
from train.study.regimes.work import Record
from train.study.small_runs import SmallTask

SETUP = Repeated()


@dataclasses.dataclass(frozen=True)
class Bfloat16:
    """Weights in bfloat16: round to nearest, stochastic rounding, Kahan and float32, by λ."""

    task: SmallTask = SETUP.task
    texts: tuple[str, ...] = SETUP.texts
    """Texts as in --data.text of a run, or reference: the English reference of Python."""
    unique: int = SETUP.unique
    """Unique training tokens."""
    steps: int = SETUP.steps
    """Updates of every run."""
    learning_rates: tuple[float, ...] = (0.001, 0.008)
    """Peaks; λ is weight_decay_shrink over the peak."""
    shrinks: tuple[float, ...] = (0.0, 0.0008, 0.0024, 0.008, 0.024)
    """ηλ at the peak, the share of a weight that one step of decay takes; 0 and others. 2⁻⁹ is 0.00195."""
    seeds: int = 12
    """Runs of each form, learning rate and shrink."""
    fresh_seeds: int = 0
    """Another number repeats everything with other seeds, in a folder of its own."""
    minutes: float = float("inf")
    """Time for this start. The same command goes on where it stopped."""
    processes: int = 0
    """Processes that train; 0: one per core, and one alone on an accelerator."""
    folder: str = "runs/compare-bfloat16"
    """Where the results go."""

    def check(self) -> None:
        """Raises UserError for the first field that is out of its range."""
        check_ranges(
            self,
            (
                ("seeds", 2, AGAIN),
                ("fresh_seeds", 0, 900),
                ("steps", 2, 10**9),
                ("learning_rates", 1e-9, 1.0),
                ("shrinks", 0.0, 0.5),
            ),
        )

    def units(self) -> list[str]:
        return [f"{form} {text}" for text in self.texts for form in FORMS]

    def expected(self) -> float:
        """Number of runs."""
        points = len(self.learning_rates) * len(self.shrinks)
        return len(self.texts) * self.seeds * (len(FORMS) * points + 1)

    def wanted(self, unit: str, results: list[Record]) -> Iterator[list[Record]]:
        """The jobs of a unit: all seeds of a point, one point after the other."""
        form, _, text = unit.partition(" ")
        for rate in self.learning_rates:
            for shrink in self.shrinks:
                yield [
                    {
                        "arm": form,
                        "text": text,
                        "learning_rate": rate,
                        "weight_decay": decay_of(shrink, rate),
                        "seed": seed,
                    }
                    for seed in seeds_of(self.fresh_seeds, self.seeds)
                ]
        if form == "float32":
            rate, shrink = self.learning_rates[-1], self.shrinks[-1]
            yield [
                {
                    "arm": form,
                    "text": text,
                    "learning_rate": rate,
                    "weight_decay": decay_of(shrink, rate),
                    "seed": seed + AGAIN,
                }
                for seed in seeds_of(self.fresh_seeds, self.seeds)
            ]

    def train(self, jobs: Sequence[Record], folder: pathlib.Path) -> Iterator[Record]:
        """Trains jobs of one form and text."""
        form, text = jobs[0]["arm"], jobs[0]["text"]
        task = dataclasses.replace(self.task, chunk=min(self.task.chunk, self.steps))
        data = texts.read(task, text, self.unique)
        small = program(task, form, data.vocab_size, self.steps)
        members = [Member(j["learning_rate"], j["weight_decay"], j["seed"]) for j in jobs]
        found = population(
            *(small, members, data, self.steps), places=self.seeds, look=hidden_size(small)
        )
        for job, outcome in zip(jobs, found):
            yield job | {
                "loss": outcome.loss,
                "rms": float(outcome.seen),
                "seconds": round(outcome.seconds, 3),
            }


def decay_of(shrink: float, rate: float) -> float:
    """λ of a shrink ηλ, to six digits so that it is one number everywhere."""
    return float(f"{shrink / rate:.6g}")


@functools.lru_cache(maxsize=4)
def program(task: SmallTask, form: str, vocab_size: int, steps: int) -> Any:
    """L2 decay on weights of one form."""
    return RoundedProgram(plain(task, "l2", vocab_size, steps), form)


@functools.lru_cache(maxsize=4)
def hidden_size(small: RoundedProgram) -> Callable[[State], jax.Array]:
    """Root mean square of the hidden matrices of one run."""
    roles = [signature.role for signature in jax.tree.leaves(small.inner.axes)]

    def of_one(state: State) -> jax.Array:
        leaves = jax.tree.leaves(wide(state["params"]))
        chosen = [w for w, role in zip(leaves, roles, strict=True) if role == "hidden"]
        total = sum(jnp.sum(jnp.square(w)) for w in chosen)
        return jnp.sqrt(total / sum(w.size for w in chosen))

    return of_one
