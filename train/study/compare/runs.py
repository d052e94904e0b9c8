"""One run of a comparison, and the time of its step.

Every arm is one compiled program, whatever the grid point, the seed or the budget. Runs go one after another, each a
population of one member (train/study/population.py). On one CPU core a step of 134k weights and 512 tokens takes 7.1 ms
of CPU time this way, 7.5 as one of four runs in `jax.lax.map`, 8.7 in a Python loop over jitted steps, and 9.0 as one
of four in `jax.vmap`. There a `cond` whose counter is mapped also computes both of its branches in each step.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.data.batches import TokenBatches
from train.study.compare.arms import ARMS
from train.study.population import Member, population
from train.study.small_runs import SmallProgram, SmallTask, compiled, numbers

ROUNDS = 5  # of timing


def program(task: SmallTask, arm: str, vocab_size: int) -> SmallProgram:
    """The runs of an arm."""
    row = ARMS[arm]
    return SmallProgram(task, task.model(vocab_size), row.build, row.workers, row.curvature)


def run(
    task: SmallTask,
    data: TokenBatches,
    arm: str,
    *,
    learning_rate: float,
    weight_decay: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Trains once.

    Args:
        task: of the comparison.
        data: text for the task; the run's seed orders it.
        arm: a name in `ARMS`.
        learning_rate: its peak.
        weight_decay: λ.
        steps: of the whole run, with a schedule of that length; a multiple of `task.chunk`.
        seed: of the initial weights and the order of the text.

    Returns:
        The loss on held-out text in nats per token (infinite if it is not a number), the mean training loss of every
        tenth of a chunk, and the seconds it took (compiling included, where the arm has not run before).
    """
    member = Member(learning_rate, weight_decay, seed)
    (found,) = population(program(task, arm, data.vocab_size), [member], data, steps)
    each = math.gcd(task.chunk, max(1, task.chunk // 10))
    curve = found.losses.reshape(-1, each).mean(axis=1)
    return {
        "loss": found.loss,
        "curve": [round(float(x), 4) if math.isfinite(x) else math.inf for x in curve],
        "seconds": round(found.seconds, 3),
    }


def cost(
    task: SmallTask, data: TokenBatches, arm: str, point: tuple[float, float]
) -> dict[str, Any]:
    """Seconds of a step of an arm and of AdamW, in turns: of the CPU if that is the device.

    Returns:
        The best of several rounds of each, and the ratio of every round, which says how far to trust that of the best.
    """
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    tokens = jnp.asarray(np.stack([data.batch(i) for i in range(task.chunk)]))
    own = numbers(*point, task.chunk, 0)
    taken: dict[str, list[float]] = {arm: [], "adamw": []}
    for _ in range(ROUNDS + 1):
        for name, seconds in taken.items():
            runs = compiled(program(task, name, data.vocab_size))
            state = jax.block_until_ready(runs.init(own))
            began = clock()
            jax.block_until_ready(runs.advance(state, own, tokens))
            seconds.append((clock() - began) / task.chunk)
    ours, adamw = (seconds[1:] for seconds in taken.values())  # the first compiles
    return {
        "seconds_per_step": min(ours),
        "adamw_seconds_per_step": min(adamw),
        "ratios": [round(a / b, 4) for a, b in zip(ours, adamw)],
        "clock": "CPU" if on_cpu else "wall",
    }
