"""What regimes on a text share: checks of their fields, seeds of a repetition, and the time of a run."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.config.fields import UserError
from train.data.batches import TokenBatches
from train.study.population import side_by_side
from train.study.regimes import texts
from train.study.regimes.repeated import APART
from train.study.small_runs import SmallTask, compiled, numbers

ROUNDS = 3


def seeds_of(repetition: int, seeds: int) -> list[int]:
    """Seeds of the runs that count, of one repetition."""
    return [APART * repetition + i for i in range(seeds)]


def check_ranges(regime: Any, ranges: Sequence[tuple[str, float, float]]) -> None:
    """Raises UserError for the first field that is out of its range, and for texts that are not there or twice."""
    for name, low, high in ranges:
        value = getattr(regime, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not low <= one <= high:
                raise UserError(
                    f"{name} = {one:g} must be {low:g} to {high:g}; nearest: {min(max(one, low), high):g}."
                )
    texts = getattr(regime, "texts", ("one",))
    if not texts or len(set(texts)) < len(texts):
        raise UserError(f"texts = {texts}: name at least one, and each once.")


def facts(regime: Any) -> dict[str, Any]:
    """About the texts of a regime, with their digests."""
    return {text: texts.read(regime.task, text, regime.unique).summary() for text in regime.texts}


def seconds_of_run(
    task: SmallTask, program: Any, data: TokenBatches, steps: int, members: int
) -> float:
    """Measured with some steps, without compiling them; on an accelerator, of one of so many runs side by side."""
    chunk = min(task.chunk, steps)
    together = jax.default_backend() != "cpu"
    if together:
        runs = side_by_side(program, (jax.local_devices()[0],))
        own = numbers([0.008] * members, [1.0] * members, steps, list(range(members)))
        tokens = np.stack([np.stack([data.batch(i)] * members) for i in range(chunk)])
    else:
        runs = compiled(program)
        own = numbers(0.008, 1.0, steps, 0)
        tokens = np.stack([data.batch(i) for i in range(chunk)])
    state, _ = runs.advance(runs.init(own), own, jnp.asarray(tokens))
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        state, losses = runs.advance(state, own, jnp.asarray(tokens))
        jax.block_until_ready(losses)
        taken.append(time.perf_counter() - began)
    return min(taken) / chunk * steps / (members if together else 1)
