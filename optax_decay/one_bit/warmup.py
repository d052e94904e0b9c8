"""When the warm-up of 1-bit Adam ends: after a number of steps, or once the variance has settled."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.one_bit import buffers, compression
from optax_decay.parameters.arguments import check


@dataclasses.dataclass(frozen=True)
class VarianceCriterion:
    """Ends the warm-up when ``min_ratio <= ‖v_t‖₁ / ‖v_{t-Δ}‖₁ <= max_ratio``, checked every Δ steps.

    Attributes:
        min_steps: the warm-up lasts at least this many steps: those of the learning rate's warm-up, or more.
        min_ratio: lower bound, in (0, 1]; 0.96 in the paper (arXiv 2102.02888).
        max_ratio: upper bound, at least 1. ``math.inf`` gives the paper's rule, which also holds while v grows from 0.
        check_every: Δ >= 1, steps between two checks; None for 1/(1−β₂).

    Raises:
        ValueError: a number out of its range.
    """

    min_steps: int
    min_ratio: float = 0.96
    max_ratio: float = 1 / 0.96
    check_every: int | None = None

    def __post_init__(self) -> None:
        check("min_steps", self.min_steps, 1)
        check("min_ratio", self.min_ratio, 0.0, 1.0, open_low=True)
        check("max_ratio", self.max_ratio, 1.0)
        if self.check_every is not None:
            check("check_every", self.check_every, 1)

    def steps_between_checks(self, b2: float | jax.Array) -> int | jax.Array:
        """Δ in steps."""
        if self.check_every is not None:
            return self.check_every
        if isinstance(b2, int | float):
            return max(1, round(1 / (1 - b2)))
        return jnp.maximum(1, jnp.round(1 / (1 - b2)).astype(jnp.int32))


class VarianceCheck(NamedTuple):
    """What a `VarianceCriterion` measured last, as float32 scalars; zeros before the first check.

    Attributes:
        norm: ``‖v‖₁``, in units of the squared gradient.
        ratio: the norm over the norm of the check before; 0 for the first check.
    """

    norm: jax.Array
    ratio: jax.Array


def variance_norm(
    variances: Sequence[jax.Array], specs: Sequence[jax.sharding.PartitionSpec]
) -> jax.Array:
    """``‖v‖₁`` over all given arrays and all devices that split them; float32, the same on every device."""
    groups: dict[tuple[str, ...], jax.Array] = {}
    for v, spec in zip(variances, specs):
        split = tuple(axis for axis in buffers.spec_axes(spec) if compression.is_bound(axis))
        groups[split] = groups.get(split, jnp.zeros([])) + jnp.sum(v).astype(jnp.float32)
    sums = [jax.lax.psum(total, split) if split else total for split, total in groups.items()]
    return sum(sums, jnp.zeros([], jnp.float32))


def warmup_ends(
    warmup_steps: int | jax.Array | VarianceCriterion,
    b2: float | jax.Array,
    frozen: jax.Array,
    count: jax.Array,
    last: VarianceCheck,
    variances: Sequence[jax.Array],
    specs: Sequence[jax.sharding.PartitionSpec],
) -> tuple[jax.Array, VarianceCheck]:
    """Whether the warm-up ends with step `count` (from 1), and the last check of the criterion, if there is one."""
    if not isinstance(warmup_steps, VarianceCriterion):
        return count >= warmup_steps, last
    criterion = warmup_steps

    def check_now() -> tuple[jax.Array, VarianceCheck]:
        norm = variance_norm(variances, specs)
        seen = last.norm > 0
        ratio = jnp.where(seen, norm / jnp.where(seen, last.norm, 1), 0)
        settled = (ratio >= criterion.min_ratio) & (ratio <= criterion.max_ratio)
        return settled & (count >= criterion.min_steps), VarianceCheck(norm, ratio)

    due = ~frozen & (count % criterion.steps_between_checks(b2) == 0)
    return jax.lax.cond(due, check_now, lambda: (jnp.array(False), last))
