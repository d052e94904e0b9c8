"""From one score per matrix to one decay multiplier per matrix.

With s_i the scores of the n matrices that have one (the others get 1 and take no part)::

    linear    m_i = lo + (hi - lo) (s_i - min s) / (max s - min s)        1 for all if max s = min s
    sqrt      m_i = n sqrt(s_i) / Σ_k (sqrt(s_k) + 1e-8)
    log2      m_i = n log2(s_i) / Σ_k (log2(s_k) + 1e-8)
    sigmoid   m_i = 2 / (1 + exp(-a z_i)),  z_i = (s_i - mean) / (std + 1e-8) over the matrices of one block

A larger score means more decay. Names in the released AlphaDecay: tb_linear_map, tb_sqrt, tb_log2, layerwise_sigmoid.
sqrt and log2 keep the unweighted mean at 1; linear does not: with its published ratios the mean over all weights is
1.8 to 3.5. log2 is negative for scores below 1 (entropy, norms), which the released program does not guard either.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ASSIGNMENTS = ("linear", "sqrt", "log2", "sigmoid")
_TINY = 1e-8


def _clipped(scores: jax.Array, valid: jax.Array, quantile: Any) -> jax.Array:
    """Scores moved into the quantiles [q, 1-q] of the valid ones, with linear interpolation between them."""
    count = jnp.sum(valid)
    ordered = jnp.sort(jnp.where(valid, scores, jnp.inf))

    def at(q: Any) -> jax.Array:
        place = q * jnp.maximum(count - 1, 0).astype(scores.dtype)
        low = jnp.floor(place).astype(jnp.int32)
        high = jnp.clip(low + 1, 0, jnp.maximum(count - 1, 0))
        a, b = ordered[low], ordered[high]
        part = place - low.astype(scores.dtype)
        return jnp.where(part > 0, a + (b - a) * part, a)

    return jnp.clip(scores, at(quantile), at(1 - quantile))


def _linear(scores: jax.Array, valid: jax.Array, low: Any, high: Any, quantile: Any) -> jax.Array:
    if not (isinstance(quantile, int | float) and quantile == 0):
        scores = _clipped(scores, valid, quantile)
    smallest = jnp.min(jnp.where(valid, scores, jnp.inf))
    largest = jnp.max(jnp.where(valid, scores, -jnp.inf))
    spread = largest - smallest
    share = (scores - smallest) / jnp.where(spread > 0, spread, 1)
    return jnp.where(spread > 0, low + (high - low) * share, 1)


def _proportional(values: jax.Array, valid: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(valid, values + _TINY, 0))
    return values / total * jnp.sum(valid).astype(values.dtype)


def _sigmoid(scores: jax.Array, valid: jax.Array, blocks: np.ndarray, sharpness: Any) -> jax.Array:
    count = int(blocks.max()) + 1

    def mean(values: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(jnp.where(valid, values, 0), blocks, count)
        return (sums / jnp.maximum(members, 1))[blocks]

    members = jax.ops.segment_sum(valid.astype(scores.dtype), blocks, count)
    away = scores - mean(scores)
    z = away / (jnp.sqrt(mean(away * away)) + _TINY)
    return 2 * jax.nn.sigmoid(sharpness * z)


def assign(
    scores: jax.Array,
    valid: jax.Array,
    assignment: str,
    *,
    low: Any,
    high: Any,
    blocks: np.ndarray,
    sharpness: Any = 4.0,
    quantile: Any = 0.0,
    weights: np.ndarray | None = None,
) -> jax.Array:
    """Multipliers ``[T]`` from scores ``[T]``.

    Args:
        scores: any finite number where not valid.
        valid: bool ``[T]``.
        assignment: one of `ASSIGNMENTS`.
        low, high: the ratios of ``linear``.
        blocks: the block of each matrix, numbered from 0, for ``sigmoid``.
        sharpness: a, for ``sigmoid``.
        quantile: for ``linear``: scores beyond the quantiles q and 1-q are moved there first; 0 is off.
        weights: weights per matrix, ``[T]``: rescale so that the mean over the weights of valid matrices is 1.
    """
    if assignment == "linear":
        factors = _linear(scores, valid, low, high, quantile)
    elif assignment == "sigmoid":
        factors = _sigmoid(scores, valid, blocks, sharpness)
    else:
        function = {"sqrt": jnp.sqrt, "log2": jnp.log2}[assignment]
        factors = _proportional(function(jnp.where(valid, scores, 1)), valid)
    good = valid & jnp.isfinite(factors)
    factors = jnp.where(good, factors, 1)
    if weights is not None:
        mean = mean_ratio(factors, weights, good)
        factors = jnp.where(good, factors / jnp.where(mean > 0, mean, 1), factors)
    return factors


def mean_ratio(
    factors: jax.Array, weights: np.ndarray, among: jax.Array | None = None
) -> jax.Array:
    """The mean multiplier per weight; 1 if there are no weights to take it over."""
    share = jnp.asarray(weights, factors.dtype)
    share = share if among is None else jnp.where(among, share, 0)
    total = jnp.sum(share)
    return jnp.where(total > 0, jnp.sum(factors * share) / jnp.where(total > 0, total, 1), 1)
