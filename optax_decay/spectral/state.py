"""The state of `spectral_alpha`: scores and multipliers by path, and how new measurements enter it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.spectral import chebyshev
from optax_decay.spectral.assignment import Assignment, assign, mean_ratio
from optax_decay.spectral.scores import Score
from optax_decay.spectral.selection import MeasuredParameter, block_of
from optax_decay.spectral.sweep import Measurements
from optax_decay.spectral.tails import random_matrix_alpha


class SpectralAlphaState(NamedTuple):
    """State of `spectral_alpha`. Dictionaries hold the parameters with a measured matrix, one number per slice.

    Attributes:
        score: the last score, before any correction; 0 where there is none. float32 (float64 for float64 weights).
        multiplier: m, dimensionless; 1 for slices that are not measured.
        stable: bool; False where the last spectrum defined no score.
        centre: the number that `matrix_products` carries to its next call (`chebyshev.Estimate.centre`).
        error: the resolution of `matrix_products` (`chebyshev.Estimate.error`); 0 for exact methods.
        resolved: bool; False where `matrix_products` could not resolve the spectrum (`chebyshev.Estimate.resolved`).
        measured: int32 scalar, number of measurements so far.
        unstable: int32 scalar, matrices with the multiplier 1 because their spectrum defines no score.
        unresolved: int32 scalar, matrices with a score that is not resolved.
        mean_ratio: mean of m over the weights of all measured matrices.
    """

    score: dict[str, jax.Array]
    multiplier: dict[str, jax.Array]
    stable: dict[str, jax.Array]
    centre: dict[str, jax.Array]
    error: dict[str, jax.Array]
    resolved: dict[str, jax.Array]
    measured: jax.Array
    unstable: jax.Array
    unresolved: jax.Array
    mean_ratio: jax.Array


def initial_state(
    parameters: Sequence[MeasuredParameter], dtypes: Mapping[str, Any]
) -> SpectralAlphaState:
    """The state before the first measurement: every multiplier is 1.

    Args:
        parameters: the measured parameters.
        dtypes: of the weights, by path.
    """

    def table(value: Any, dtype: jax.typing.DTypeLike | None = None) -> dict[str, jax.Array]:
        return {
            p.path: jnp.full(
                p.signature.batch_shape, value, dtype or accumulator_dtype(dtypes[p.path])
            )
            for p in parameters
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


class ScoreMap(NamedTuple):
    """How scores of fixed matrices become multipliers, with everything that is known when the step is compiled.

    Attributes:
        parameters: the measured parameters; arrays ``[T]`` follow their chosen slices in this order.
        assignment: from scores to multipliers.
        blocks: the block of each matrix, numbered from 0.
        weights: the number of weights of each matrix.
        random: the exponent of a random matrix of each shape, if scores are divided by it; else None.
    """

    parameters: tuple[MeasuredParameter, ...]
    assignment: Assignment
    blocks: np.ndarray
    weights: np.ndarray
    random: np.ndarray | None

    def multipliers(self, scores: jax.Array, valid: jax.Array) -> jax.Array:
        """Multipliers ``[T]``; 1 for matrices without a valid score."""
        if self.random is not None:
            scores = scores / jnp.asarray(self.random, scores.dtype)
        return assign(scores, valid, self.assignment, blocks=self.blocks, weights=self.weights)


def make_score_map(
    score: Score, assignment: Assignment, parameters: Sequence[MeasuredParameter]
) -> ScoreMap:
    """The `ScoreMap` for the chosen matrices of `parameters`."""
    numbers: dict[Any, int] = {}
    blocks, weights, random = [], [], []
    for parameter in parameters:
        for flat in parameter.chosen:
            index = tuple(int(i) for i in np.unravel_index(flat, parameter.slice_shape))
            block = block_of(parameter.path, index)
            blocks.append(numbers.setdefault(block, len(numbers)))
            weights.append(parameter.weights)
            if score.aspect_correction and score.fit is not None:
                random.append(random_matrix_alpha(*parameter.sides, score.fit.xmin_pos))
    return ScoreMap(
        tuple(parameters),
        assignment,
        np.asarray(blocks),
        np.asarray(weights),
        np.asarray(random) if score.aspect_correction else None,
    )


def _per_slice(parameter: MeasuredParameter, values: jax.Array) -> jax.Array:
    """The numbers of a table, one per slice. All kernel positions of a slice hold the same one; takes the first."""
    pooled = parameter.pooled_axes
    first = [0 if i in pooled else slice(None) for i in parameter.signature.batch]
    return values[tuple(first)].reshape(-1)


def _all_chosen(parameter: MeasuredParameter) -> bool:
    return len(parameter.chosen) == math.prod(parameter.slice_shape)


def gather(
    parameters: Sequence[MeasuredParameter],
    table: Mapping[str, jax.Array],
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """``[T]``: the numbers of the chosen matrices, in order."""
    parts = []
    for parameter in parameters:
        values = _per_slice(parameter, jnp.asarray(table[parameter.path]))
        parts.append(values if _all_chosen(parameter) else values[np.asarray(parameter.chosen)])
    return jnp.concatenate([part.astype(dtype) for part in parts])


def scatter(
    parameters: Sequence[MeasuredParameter], flat: jax.Array, table: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The inverse of `gather`: the table with the numbers of the chosen matrices replaced."""
    new, first = dict(table), 0
    for parameter in parameters:
        old = table[parameter.path]
        mine = flat[first : first + len(parameter.chosen)].astype(old.dtype)
        first += len(parameter.chosen)
        if not _all_chosen(parameter):
            mine = _per_slice(parameter, old).at[np.asarray(parameter.chosen)].set(mine)
        new[parameter.path] = jnp.broadcast_to(parameter.spread(mine), old.shape)
    return new


def renew(
    state: SpectralAlphaState, found: Measurements, score_map: ScoreMap
) -> SpectralAlphaState:
    """The state after some matrices have been measured."""
    parameters = score_map.parameters
    wide = found.value.dtype

    def merge(table: Any, new: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        flat = jnp.where(found.fresh, new.astype(wide), gather(parameters, table, wide))
        return flat, scatter(parameters, flat, table)

    score, score_table = merge(state.score, found.value)
    stable, stable_table = merge(state.stable, found.stable)
    _, centre = merge(state.centre, found.centre)
    _, error = merge(state.error, found.error)
    resolved, resolved_table = merge(state.resolved, found.resolved)
    valid = stable > 0.5
    factors = score_map.multipliers(score, valid)
    return SpectralAlphaState(
        score_table,
        scatter(parameters, factors, state.multiplier),
        stable_table,
        centre,
        error,
        resolved_table,
        _saturating_sum(state.measured, jnp.sum(found.fresh).astype(jnp.int32)),
        jnp.sum(~valid).astype(jnp.int32),
        jnp.sum(valid & (resolved < 0.5)).astype(jnp.int32),
        mean_ratio(factors, score_map.weights).astype(state.mean_ratio.dtype),
    )


def _saturating_sum(count: jax.Array, more: jax.Array) -> jax.Array:
    """Their sum, which stays at the largest int32."""
    return jnp.minimum(count, jnp.iinfo(jnp.int32).max - more) + more
