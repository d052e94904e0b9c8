"""The memory of `spectral_alpha`: scores and multipliers by path, and how new measurements enter it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.spectral import chebyshev
from optax_decay.spectral import tails as tail_exponents
from optax_decay.spectral.assignment import assign, mean_ratio
from optax_decay.spectral.options import Options
from optax_decay.spectral.selection import Leaf, block_of
from optax_decay.spectral.sweep import Swept


class SpectralAlphaState(NamedTuple):
    """Memory of `spectral_alpha`. Dictionaries hold the leaves with a measured matrix, one number per slice.

    Attributes:
        metric: the last score, before any correction; 0 where there is none. float32 (float64 for float64 weights).
        multiplier: m; 1 for slices that are not measured.
        stable: bool; False where the last spectrum defined no score.
        centre: what the matrix-product method carries (`chebyshev.Estimate.centre`).
        error: its resolution (`chebyshev.Estimate.error`); 0 for exact methods.
        resolved: bool; False where that is not enough (`chebyshev.Estimate.resolved`).
        measured: int32 scalar, matrices measured so far.
        unstable: int32 scalar, matrices at the base decay because their spectrum defines no score.
        unresolved: int32 scalar, matrices with a score that is not resolved.
        mean_ratio: mean of m over the weights of all measured matrices.
    """

    metric: dict[str, jax.Array]
    multiplier: dict[str, jax.Array]
    stable: dict[str, jax.Array]
    centre: dict[str, jax.Array]
    error: dict[str, jax.Array]
    resolved: dict[str, jax.Array]
    measured: jax.Array
    unstable: jax.Array
    unresolved: jax.Array
    mean_ratio: jax.Array


def initial_state(leaves: Sequence[Leaf], dtypes: Mapping[str, Any]) -> SpectralAlphaState:
    """Every matrix at the base decay, nothing measured."""

    def table(value: Any, dtype: Any = None) -> dict[str, jax.Array]:
        return {
            leaf.path: jnp.full(
                leaf.signature.batch_shape, value, dtype or accumulator_dtype(dtypes[leaf.path])
            )
            for leaf in leaves
        }

    wide = jnp.result_type(jnp.float32, *(accumulator_dtype(d) for d in dtypes.values()))
    return SpectralAlphaState(
        table(0),
        table(1),
        table(False, jnp.bool_),
        table(chebyshev.DEFAULT_CENTRE),
        table(0),
        table(True, jnp.bool_),
        jnp.zeros([], jnp.int32),
        jnp.zeros([], jnp.int32),
        jnp.zeros([], jnp.int32),
        jnp.ones([], wide),
    )


class Map(NamedTuple):
    """What turns scores into multipliers for fixed leaves: numbers known when the step is compiled."""

    options: Options
    leaves: tuple[Leaf, ...]
    blocks: np.ndarray
    weights: np.ndarray
    random: np.ndarray

    def __call__(self, scores: jax.Array, valid: jax.Array) -> jax.Array:
        o = self.options
        if o.aspect_correction:
            scores = scores / jnp.asarray(self.random, scores.dtype)
        return assign(
            scores,
            valid,
            o.assignment,
            low=o.min_ratio,
            high=o.max_ratio,
            blocks=self.blocks,
            sharpness=o.sharpness,
            quantile=o.quantile_clip,
            weights=self.weights if o.preserve_mean else None,
        )


def make_map(options: Options, leaves: Sequence[Leaf]) -> Map:
    """`Map` over the chosen matrices of `leaves`, in order."""
    numbers: dict[Any, int] = {}
    blocks, weights, random = [], [], []
    for leaf in leaves:
        for flat in leaf.chosen:
            index = tuple(int(i) for i in np.unravel_index(flat, leaf.slice_shape))
            block = block_of(leaf.path, index)
            blocks.append(numbers.setdefault(block, len(numbers)))
            weights.append(leaf.weights)
            if options.aspect_correction:
                random.append(tail_exponents.random_matrix_alpha(*leaf.sides, options.xmin_pos))
    return Map(options, tuple(leaves), np.asarray(blocks), np.asarray(weights), np.asarray(random))


def _per_slice(leaf: Leaf, values: jax.Array) -> jax.Array:
    """A table's numbers, one per slice; kernel positions share a number, so that of the first."""
    first = [0 if i in leaf.pooled_axes else slice(None) for i in leaf.signature.batch]
    return values[tuple(first)].reshape(-1)


def _all_chosen(leaf: Leaf) -> bool:
    return len(leaf.chosen) == math.prod(leaf.slice_shape)


def gather(leaves: Sequence[Leaf], table: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """``[T]``: the numbers of the chosen matrices, in order."""
    parts = []
    for leaf in leaves:
        values = _per_slice(leaf, jnp.asarray(table[leaf.path]))
        parts.append(values if _all_chosen(leaf) else values[np.asarray(leaf.chosen)])
    return jnp.concatenate([part.astype(dtype) for part in parts])


def scatter(
    leaves: Sequence[Leaf], flat: jax.Array, table: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The inverse of `gather`: a table with the chosen matrices' numbers replaced."""
    new, first = dict(table), 0
    for leaf in leaves:
        old = table[leaf.path]
        mine = flat[first : first + len(leaf.chosen)].astype(old.dtype)
        first += len(leaf.chosen)
        if not _all_chosen(leaf):
            mine = _per_slice(leaf, old).at[np.asarray(leaf.chosen)].set(mine)
        new[leaf.path] = jnp.broadcast_to(leaf.spread(mine), old.shape)
    return new


def renew(state: SpectralAlphaState, found: Swept, scores_of: Map) -> SpectralAlphaState:
    """The state after some matrices have been measured."""
    leaves = scores_of.leaves
    wide = found.value.dtype

    def merge(table: Any, new: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = jnp.where(found.fresh, new.astype(wide), gather(leaves, table, wide))
        return flat, scatter(leaves, flat, table)

    score, metric = merge(state.metric, found.value)
    stable, stable_table = merge(state.stable, found.stable)
    _, centre = merge(state.centre, found.centre)
    _, error = merge(state.error, found.error)
    resolved, resolved_table = merge(state.resolved, found.resolved)
    valid = stable > 0.5
    factors = scores_of(score, valid)
    return SpectralAlphaState(
        metric,
        scatter(leaves, factors, state.multiplier),
        stable_table,
        centre,
        error,
        resolved_table,
        _count_on(state.measured, jnp.sum(found.fresh).astype(jnp.int32)),
        jnp.sum(~valid).astype(jnp.int32),
        jnp.sum(valid & (resolved < 0.5)).astype(jnp.int32),
        mean_ratio(factors, scores_of.weights).astype(state.mean_ratio.dtype),
    )


def _count_on(count: jax.Array, more: jax.Array) -> jax.Array:
    """Their sum, which stays at the largest int32."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - more) + more
