"""From one score per matrix to one decay multiplier per matrix. Each assignment is a value that carries its numbers.

With s_i the scores of the n matrices that have one (the others get the multiplier 1 and take no part)::

    linear    m_i = lo + (hi - lo) (s_i - min s) / (max s - min s)        1 for all if max s = min s
    sqrt      m_i = n sqrt(s_i) / Σ_k (sqrt(s_k) + 1e-8)
    log2      m_i = n log2(s_i) / Σ_k (log2(s_k) + 1e-8)
    sigmoid   m_i = 2 / (1 + exp(-a z_i)),  z_i = (s_i - mean) / (std + 1e-8) over the matrices of one block

A larger score means more decay; s and m are dimensionless except that s may be a norm. The released AlphaDecay calls
them tb_linear_map, tb_sqrt, tb_log2 and layerwise_sigmoid. sqrt and log2 keep the unweighted mean of m at 1. linear
does not: with the published ratios, the mean over all weights is 1.8 to 3.5. log2 is negative for scores below 1 (such
as entropies and norms); the released program does not guard against that either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.parameters.arguments import check, nearest

NAMES = ("linear", "sqrt", "log2", "sigmoid")
_TINY = 1e-8


class Assignment(NamedTuple):
    """How scores become decay multipliers. Build one with the functions of this module.

    Attributes:
        name: one of `NAMES`.
        factors: ``(scores [T], valid [T], block of each matrix [T]) -> multipliers [T]``; valid says which matrices
            have a score.
        preserve_mean: rescale the multipliers so that their mean over the weights of measured matrices is 1.
    """

    name: str
    factors: Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]
    preserve_mean: bool = False


def linear(
    low: float | jax.Array = 2 / 3,
    high: float | jax.Array = 3.0,
    *,
    quantile_clip: float | jax.Array = 0.0,
    preserve_mean: bool = False,
) -> Assignment:
    """Maps the smallest score to `low` and the largest to `high`, and the others linearly between.

    Args:
        low, high: dimensionless multipliers >= 0, which may be traced. The scripts of the released program use 2/3
            with 3 or 5, tuned per run.
        quantile_clip: q in [0, 0.5): scores beyond the quantiles q and 1-q are moved there first, which bounds the
            effect of a single outlier. 0 is off. May be traced.
        preserve_mean: rescale so that the mean multiplier over the weights of measured matrices is 1.

    Raises:
        ValueError: a number out of its range.
    """
    check("low", low, 0.0)
    check("high", high, 0.0)
    check("quantile_clip", quantile_clip, 0.0, 0.5, open_high=True)

    def factors(scores: jax.Array, valid: jax.Array, blocks: np.ndarray) -> jax.Array:
        return _linear(scores, valid, low, high, quantile_clip)

    return Assignment("linear", factors, preserve_mean)


def sqrt(*, preserve_mean: bool = False) -> Assignment:
    """Multipliers proportional to the square root of the score, with an unweighted mean of 1.

    Args:
        preserve_mean: as in `linear`; the mean over weights differs from the mean over matrices.
    """

    def factors(scores: jax.Array, valid: jax.Array, blocks: np.ndarray) -> jax.Array:
        return _proportional(jnp.sqrt(jnp.where(valid, scores, 1)), valid)

    return Assignment("sqrt", factors, preserve_mean)


def log2(*, preserve_mean: bool = False) -> Assignment:
    """Multipliers proportional to log2 of the score, with an unweighted mean of 1; negative for scores below 1.

    Args:
        preserve_mean: as in `sqrt`.
    """

    def factors(scores: jax.Array, valid: jax.Array, blocks: np.ndarray) -> jax.Array:
        return _proportional(jnp.log2(jnp.where(valid, scores, 1)), valid)

    return Assignment("log2", factors, preserve_mean)


def sigmoid(sharpness: float | jax.Array = 4.0, *, preserve_mean: bool = False) -> Assignment:
    """Compares the matrices of one block with each other, by a sigmoid of the standardised score.

    Args:
        sharpness: a > 0, dimensionless; may be traced.
        preserve_mean: as in `sqrt`.

    Raises:
        ValueError: a sharpness that is not positive.
    """
    check("sharpness", sharpness, 0.0, open_low=True)

    def factors(scores: jax.Array, valid: jax.Array, blocks: np.ndarray) -> jax.Array:
        return _sigmoid(scores, valid, blocks, sharpness)

    return Assignment("sigmoid", factors, preserve_mean)


def check_assignment(assignment: object) -> None:
    """Raises ValueError unless `assignment` is an `Assignment`; names the nearest one."""
    if not isinstance(assignment, Assignment):
        name = getattr(assignment, "__name__", assignment)
        raise ValueError(
            f"assignment={assignment!r} is not an Assignment; allowed: "
            f"{', '.join(f'spectra.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.spectra.{nearest(name, NAMES)}()?)."
        )


def _clipped(scores: jax.Array, valid: jax.Array, quantile: float | jax.Array) -> jax.Array:
    """Scores moved into the quantiles [q, 1-q] of the valid scores; quantiles are interpolated linearly."""
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


def _linear(
    scores: jax.Array,
    valid: jax.Array,
    low: float | jax.Array,
    high: float | jax.Array,
    quantile: float | jax.Array,
) -> jax.Array:
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


def _sigmoid(
    scores: jax.Array, valid: jax.Array, blocks: np.ndarray, sharpness: float | jax.Array
) -> jax.Array:
    count = int(blocks.max()) + 1

    def mean(values: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(jnp.where(valid, values, 0), blocks, count)
        return (sums / jnp.maximum(members, 1))[blocks]

    members = jax.ops.segment_sum(valid.astype(scores.dtype), blocks, count)
    away = scores - mean(scores)
    return sigmoid_factor(away / (jnp.sqrt(mean(away * away)) + _TINY), sharpness)


def sigmoid_factor(z: jax.Array, sharpness: float | jax.Array) -> jax.Array:
    """The multiplier 2 / (1 + exp(-a z)) of a standardised score z; 1 where that is not finite."""
    factor = 2 * jax.nn.sigmoid(sharpness * z)
    return jnp.where(jnp.isfinite(factor), factor, 1)


def assign(
    scores: jax.Array,
    valid: jax.Array,
    assignment: Assignment,
    *,
    blocks: np.ndarray,
    weights: np.ndarray,
) -> jax.Array:
    """Multipliers ``[T]`` from scores ``[T]``.

    Args:
        scores: any finite number where not valid.
        valid: bool ``[T]``; the other matrices get the multiplier 1.
        assignment: how scores become multipliers.
        blocks: the block of each matrix, numbered from 0.
        weights: the number of weights of each matrix, over which ``preserve_mean`` takes the mean.
    """
    factors = assignment.factors(scores, valid, blocks)
    good = valid & jnp.isfinite(factors)
    factors = jnp.where(good, factors, 1)
    if assignment.preserve_mean:
        mean = mean_ratio(factors, weights, good)
        factors = jnp.where(good, factors / jnp.where(mean > 0, mean, 1), factors)
    return factors


def mean_ratio(
    factors: jax.Array, weights: np.ndarray, among: jax.Array | None = None
) -> jax.Array:
    """The mean multiplier over all weights (of the matrices `among`, if given); 1 if there are no weights."""
    share = jnp.asarray(weights, factors.dtype)
    share = share if among is None else jnp.where(among, share, 0)
    total = jnp.sum(share)
    return jnp.where(total > 0, jnp.sum(factors * share) / jnp.where(total > 0, total, 1), 1)
