"""Runs of one small program side by side: members that differ in learning rate, decay and seed, in one `jax.vmap`.

All members are at the same step, so that counters are not mapped: a `jax.lax.cond` that looks at a counter stays one,
and an optimizer that computes bases or spectra every k steps does so every k steps. Under a mapped counter both
branches would be computed in each step.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from train.study.small_runs import Compiled, Numbers, SmallProgram, numbers

MAPPED = Numbers(learning_rate=0, weight_decay=0, steps=None, seed=0)


def members(points: Sequence[tuple[float, float, int]], steps: int) -> Numbers:
    """The numbers of runs of equal length, from (learning rate, weight decay, seed) of each."""
    rates, decays, seeds = zip(*points)
    return numbers(rates, decays, steps, seeds)


def counters(program: SmallProgram, own: Numbers) -> Any:
    """Which leaves of a state are mapped over members: a tree of 0, and of None for counters (integer scalars)."""
    first = Numbers(*(x if axis is None else x[0] for x, axis in zip(own, MAPPED)))
    shapes = jax.eval_shape(program.init, first)

    def is_counter(x: jax.ShapeDtypeStruct) -> bool:
        return x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)

    return jax.tree.map(lambda x: None if is_counter(x) else 0, shapes)


@functools.lru_cache(maxsize=4)
def side_by_side(program: SmallProgram) -> Compiled:
    """All members at once; states, tokens (behind the steps) and losses have an axis of members."""
    if program.workers > 1:
        raise ValueError("members side by side have no simulated workers; run them one at a time.")
    state = counters(program, members([(1.0, 0.0, 0)], 1))
    init = jax.vmap(program.init, in_axes=(MAPPED,), out_axes=state)
    advance = jax.vmap(program.advance, in_axes=(state, MAPPED, 1), out_axes=(state, 1))
    held_out_loss = jax.vmap(program.held_out_loss, in_axes=(state, None))
    return Compiled(jax.jit(init), jax.jit(advance, donate_argnums=0), jax.jit(held_out_loss))
