"""Runs of one small program side by side: a grid of seeds and points (learning rate, decay), in one program.

States, losses and results have two leading axes, seeds and points; tokens have that of seeds, so that all points of a
seed see the same text in the same order. Every run is at the same step. With shared counters a counter has no such
axes, and a `jax.lax.cond` that looks at it stays one: an optimizer that computes bases or spectra every k steps does so
every k steps. Where counters are mapped, both branches of such a `cond` are computed in each step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.study.small_runs import Compiled, Numbers, SmallProgram, numbers

SEEDS = Numbers(learning_rate=None, weight_decay=None, steps=None, seed=0)
TUNED = ("learning_rate", "weight_decay")


def mapped(program: SmallProgram, shared_counters: bool) -> Any:
    """A tree like a run's state: None for counters (integer scalars) that are shared, 0 for mapped leaves."""

    def axis(x: jax.ShapeDtypeStruct) -> int | None:
        counter = x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
        return None if shared_counters and counter else 0

    return jax.tree.map(axis, jax.eval_shape(program.init, numbers(1.0, 0.0, 1, 0)))


@functools.lru_cache(maxsize=4)
def side_by_side(
    program: SmallProgram, varied: tuple[str, ...] = TUNED, shared_counters: bool = True
) -> Compiled:
    """A grid of runs at once.

    Args:
        program: of one run, without simulated workers.
        varied: fields of `Numbers` that differ between points; all runs share the others.
        shared_counters: whether counters have no axes of runs; an optimizer whose counters depend on the run's own
            numbers, such as steps that were left out, needs them mapped.

    Returns:
        Functions of `Numbers` (seeds [seeds], varied numbers [points]), states [seeds, points, ...] and tokens
        [steps, seeds, B, T + 1].

    Raises:
        ValueError: simulated workers; when called, shared counters that depend on the run.
    """
    if program.workers > 1:
        raise ValueError("runs side by side have no simulated workers: train them one at a time.")
    state = mapped(program, shared_counters)

    def over_runs(function: Callable[..., Any], axes: tuple[tuple[Any, Any], ...], out: Any) -> Any:
        """`axes`: of every argument, what is mapped over seeds and what over points."""
        outer, inner = zip(*axes)
        return jax.vmap(jax.vmap(function, inner, out), outer, out)

    points = Numbers(*(0 if name in varied else None for name in Numbers._fields))
    own, tokens = (SEEDS, points), (1, None)
    init = over_runs(program.init, (own,), state)
    advance = over_runs(program.advance, ((state, state), own, tokens), (state, 1))
    held_out_loss = over_runs(program.held_out_loss, ((state, state), (None, None)), 0)
    return Compiled(jax.jit(init), jax.jit(advance, donate_argnums=0), jax.jit(held_out_loss))
