"""Where the bound κ of constrained parameter regularization comes from; see `cpr_decay`.

With R_t the size of one matrix after step t = 1, 2, … and R_0 that of the initial weights::

    uniform(κ)               κ
    dependent(c)             c · R_0
    warm_start(s)            R_s
    inflection(k, m)         R_t at the first step t > 3k, t a multiple of m, with R_t - R_{t-m} < R_{t-m} - R_{t-2m}

Until κ is known it is infinite, and nothing decays.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import check, nearest


class Memory(NamedTuple):
    """Memory of a bound for each matrix; arrays of shape ``signature.batch_shape``.

    Attributes:
        bound: κ; infinite until it is known.
        sample: R at the last sample; used by `inflection`.
        growth: difference of the last two samples; used by `inflection`.
    """

    bound: jax.Array
    sample: jax.Array
    growth: jax.Array


class Bound(NamedTuple):
    """A rule for κ. Build one with the functions of this module.

    Attributes:
        name: of the function that built it.
        advance: ``(step, R, R before the step, memory) -> memory``; `step` counts from 1.
        reads_initial: uses R before the step, which is computed only then.
    """

    name: str
    advance: Callable[[jax.Array, jax.Array, jax.Array, Memory], Memory]
    reads_initial: bool = False


def uniform(bound: float) -> Bound:
    """The same κ > 0 for every matrix, in units of R."""
    check("bound", bound, 0.0, open_low=True)

    def advance(step: jax.Array, size: jax.Array, before: jax.Array, memory: Memory) -> Memory:
        return memory._replace(bound=jnp.full_like(memory.bound, bound))

    return Bound("uniform", advance)


def dependent(factor: float = 1.0) -> Bound:
    """κ is `factor` > 0 times R of the initial weights."""
    check("factor", factor, 0.0, open_low=True)

    def advance(step: jax.Array, size: jax.Array, before: jax.Array, memory: Memory) -> Memory:
        return memory._replace(bound=jnp.where(step == 1, factor * before, memory.bound))

    return Bound("dependent", advance, reads_initial=True)


def warm_start(steps: int) -> Bound:
    """κ is R after `steps` >= 1 steps. The authors take twice the warm-up of the learning rate."""
    check("steps", steps, 1)

    def advance(step: jax.Array, size: jax.Array, before: jax.Array, memory: Memory) -> Memory:
        return memory._replace(bound=jnp.where(step == steps, size, memory.bound))

    return Bound("warm_start", advance)


def inflection(steps: int = 200, sample_every: int | None = None) -> Bound:
    """κ is R where its growth begins to slow down: the authors' default.

    Args:
        steps: k >= 1. Sampling starts after k steps, differences after 2k, and κ is set after 3k at the earliest.
        sample_every: steps between samples, >= 1. None: k.
    """
    check("steps", steps, 1)
    every = steps if sample_every is None else sample_every
    check("sample_every", every, 1)

    def advance(step: jax.Array, size: jax.Array, before: jax.Array, memory: Memory) -> Memory:
        kappa, sample, growth = memory
        sampled = step % jnp.asarray(every, jnp.int32) == 0
        difference = size - sample
        found = sampled & (step > 3 * steps) & jnp.isinf(kappa) & (growth > difference)
        return Memory(
            jnp.where(found, size, kappa),
            jnp.where(sampled & (step > steps), size, sample),
            jnp.where(sampled & (step > 2 * steps), difference, growth),
        )

    return Bound("inflection", advance)


NAMES = ("uniform", "dependent", "warm_start", "inflection")


def check_bound(bound: object) -> None:
    """Raises ValueError unless `bound` is a `Bound`; names the nearest one."""
    if not isinstance(bound, Bound):
        name = getattr(bound, "__name__", bound)
        raise ValueError(
            f"bound={bound!r} is not a Bound; allowed: {', '.join(f'bounds.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.bounds.{nearest(name, NAMES)}()?)."
        )
