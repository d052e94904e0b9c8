"""Repeated text: U unique tokens, seen E times. Every decay, tuned, with its curve over λ and how forgiving it is.

Each arm is tuned over learning rate and λ together, with the same number of trials of full length on seeds that no
result uses. A sweep over λ at the best learning rate then gives the curve of the arm and the λ of the runs that count.
Runs that count share their seeds, so that arms are compared seed by seed: Student's t, corrected by Holm.

Controls: L2 decay against itself must hold 0; Muon must beat AdamW; and L2 decay must beat no decay by more than 0.1
nats, or the set-up does not test decay.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.study.regimes.repeated import AXIS, Repeated, program, text_of
from train.study.regimes.repeated_report import write_report as write_report
from train.study.small_runs import SmallTask, compiled, numbers


def smoke() -> Repeated:
    """Huber decay (or --arms ARM) and the controls on one text, with short runs and few seeds: a few minutes."""
    return Repeated(
        texts=("stdlib",),
        arms=("huber",),
        unique=9_600,
        steps=300,
        trials=9,
        sweep_seeds=2,
        seeds=3,
        epochs=(),
        lengths=(),
        batches=(),
        folder="runs/compare-repeated-smoke",
    )


def cpu() -> Repeated:
    """All arms on two texts, 85k weights, 1200 steps of 256 tokens, 12 seeds: under two hours on two cores."""
    return Repeated(folder="runs/compare-repeated-cpu")


def gpu() -> Repeated:
    """All arms on two texts, 1.2M weights, 4000 steps of 4096 tokens, 24 seeds: stretches of 9 minutes on one GPU."""
    task = SmallTask(
        *(160, 432, 4, 5, 0.06),
        length=128,
        batch_size=32,
        eval_batches=32,
        dtype="bfloat16",
    )
    return Repeated(
        task,
        texts=("stdlib", "zipf-large"),
        unique=1_000_000,
        steps=4000,
        seeds=24,
        epochs=(4, 64),
        minutes=9.0,
        folder="runs/compare-repeated-gpu",
    )


TIERS = {make.__name__: make for make in (smoke, cpu, gpu)}


def facts(regime: Repeated) -> dict[str, Any]:
    """About the texts, with their digests."""
    return {text: text_of(regime.task, text, regime.unique).summary() for text in regime.texts}


def seconds(regime: Repeated) -> float:
    """Of a run with L2 decay on this machine, without compiling it; on an accelerator one of many side by side."""
    data = text_of(regime.task, regime.texts[0], regime.unique)
    chunk = min(regime.task.chunk, regime.steps)
    task = regime.task
    members = 1 if jax.default_backend() == "cpu" else regime.seeds
    if members > 1:
        from train.study.population import side_by_side

        runs = side_by_side(
            program(task, "l2", data.vocab_size, regime.steps), (jax.local_devices()[0],)
        )
        own = numbers([0.008] * members, [1.0] * members, regime.steps, list(range(members)))
        tokens = np.stack([np.stack([data.batch(i)] * members) for i in range(chunk)])
    else:
        runs = compiled(program(task, "l2", data.vocab_size, regime.steps))
        own = numbers(0.008, 1.0, regime.steps, 0)
        tokens = np.stack([data.batch(i) for i in range(chunk)])
    state, _ = runs.advance(runs.init(own), own, jnp.asarray(tokens))
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        state, losses = runs.advance(state, own, jnp.asarray(tokens))
        jax.block_until_ready(losses)
        taken.append(time.perf_counter() - began)
    return min(taken) / chunk * regime.steps / members


__all__ = ["AXIS", "TIERS", "facts", "seconds", "write_report"]
