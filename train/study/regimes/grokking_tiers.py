"""Grokking: addition modulo 97, learned from half of its table. How many steps until held-out sums are right?

Without decay a transformer learns the training half at once, and the other half late or never. Every decay with a
λ that stays the same is run over five λ, and over more while the best is the largest or the smallest of them, with the
same seeds; a seed decides the initial weights and which half is held out. A run that has not reached 95 % at its end is
censored: it counts as longer than all that have.

Controls: L2 decay against itself with other seeds must hold the same number of steps; L2 decay at its best must be at
least twice as fast as at its smallest λ, or the set-up does not test decay; and where others are compared with it, its
best λ must not be at an end of its grid.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from train.study.regimes.addition import AdditionTask, compiled, tables
from train.study.regimes.grokking import EARLY, Grokking, program
from train.study.regimes.grokking_report import write_report as write_report
from train.study.small_runs import numbers


def smoke() -> Grokking:
    """Huber decay (or --arms ARM) and the controls, 3 seeds: a few minutes."""
    return Grokking(arms=("huber",), seeds=3, folder="runs/compare-grokking-smoke")


def cpu() -> Grokking:
    """Every decay with a constant λ, a model of 31k weights, 12 seeds: under two hours on two cores."""
    return Grokking(folder="runs/compare-grokking-cpu")


def gpu() -> Grokking:
    """The same decays, a model of 0.5M weights, up to 4000 steps, 24 seeds: stretches of 9 minutes on one GPU."""
    return Grokking(
        AdditionTask(width=128, mlp_width=512, layers=2, heads=4, init_std=0.06),
        learning_rate=0.002,
        steps=4000,
        seeds=24,
        minutes=9.0,
        folder="runs/compare-grokking-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def facts(regime: Grokking) -> dict[str, Any]:
    """There is no text: the table is computed."""
    return {}


def seconds(regime: Grokking) -> float:
    """Of a run of usual length, measured with some steps of L2 decay here."""
    together = jax.default_backend() != "cpu"
    init, advance = compiled(program(regime.task, "l2", regime.steps), together)
    members = regime.seeds if together else 1
    data: Any = tables(regime.task, 0)
    own = numbers(0.01, 1.0, regime.steps, 0)
    if together:
        own = numbers([0.01] * members, [1.0] * members, regime.steps, list(range(members)))
        data = jax.tree.map(lambda x: jnp.stack([x] * members), data)
    state, _ = advance(init(own), own, data)
    began = time.perf_counter()
    state, right = advance(state, own, data)
    jax.block_until_ready(right)
    return (time.perf_counter() - began) / regime.task.every * EARLY * regime.steps / members
