"""When 1-bit Adam stops updating the variance: after a number of steps, or once it changes little."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.one_bit import buffers as sign_buffers
from optax_decay.one_bit import compression as sc
from optax_decay.product.pulls import check


@dataclasses.dataclass(frozen=True)
class VarianceCriterion:
    """Ends the warm-up when ``ratio <= ‖v_t‖₁ / ‖v_{t-every}‖₁ <= growth``, looked at every `every` steps.

    Attributes:
        min_steps: no end before this many steps: those of the learning rate's warm-up, or more.
        ratio: lower bound, in (0, 1]; 0.96 in the paper (arXiv 2102.02888).
        growth: upper bound, at least 1. ``math.inf`` is the paper's rule, which also holds while v grows from 0.
        every: Δ, steps; None for 1/(1−β₂).
    """

    min_steps: int
    ratio: float = 0.96
    growth: float = 1 / 0.96
    every: int | None = None

    def __post_init__(self) -> None:
        check("min_steps", self.min_steps, 1)
        check("ratio", self.ratio, 0.0, 1.0, open_low=True)
        check("growth", self.growth, 1.0)
        if self.every is not None:
            check("every", self.every, 1)

    def interval(self, b2: Any) -> Any:
        """Δ in steps."""
        if self.every is not None:
            return self.every
        if isinstance(b2, int | float):
            return max(1, round(1 / (1 - b2)))
        return jnp.maximum(1, jnp.round(1 / (1 - b2)).astype(jnp.int32))


class Look(NamedTuple):
    """What the criterion saw last: ``‖v‖₁`` and its ratio to the one before, float32 scalars, 0 before any."""

    norm: jax.Array
    ratio: jax.Array


def variance_norm(variances: Sequence[jax.Array], specs: Sequence[Any]) -> jax.Array:
    """``Σ v`` over all given arrays and all devices that split them; float32, the same everywhere."""
    groups: dict[tuple[str, ...], jax.Array] = {}
    for v, spec in zip(variances, specs):
        split = tuple(axis for axis in sign_buffers.spec_axes(spec) if sc.is_bound(axis))
        groups[split] = groups.get(split, jnp.zeros([])) + jnp.sum(v).astype(jnp.float32)
    sums = [jax.lax.psum(total, split) if split else total for split, total in groups.items()]
    return sum(sums, jnp.zeros([], jnp.float32))


def warmup_ends(
    warmup_steps: int | VarianceCriterion,
    b2: Any,
    frozen: jax.Array,
    count: jax.Array,
    last: Look,
    variances: Sequence[jax.Array],
    specs: Sequence[Any],
) -> tuple[jax.Array, Look]:
    """Whether the warm-up ends with step `count` (from 1), and what the criterion has seen by then."""
    if not isinstance(warmup_steps, VarianceCriterion):
        return count >= warmup_steps, last
    criterion = warmup_steps

    def look() -> tuple[jax.Array, Look]:
        norm = variance_norm(variances, specs)
        seen = last.norm > 0
        ratio = jnp.where(seen, norm / jnp.where(seen, last.norm, 1), 0)
        calm = (ratio >= criterion.ratio) & (ratio <= criterion.growth)
        return calm & (count >= criterion.min_steps), Look(norm, ratio)

    due = ~frozen & (count % criterion.interval(b2) == 0)
    return jax.lax.cond(due, look, lambda: (jnp.array(False), last))
