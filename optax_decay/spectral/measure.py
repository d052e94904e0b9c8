"""Measuring the score of one matrix, or of several whose eigenvalues are pooled.

How a spectrum is computed is the `method` of a score:

=================== ====================================================================== =================
method              what happens                                                           exponent, float32
=================== ====================================================================== =================
exact, eigh, svd    the eigenvalues are computed, see `spectra`                            exact to 1e-5
matrix_products()   matrix products only, see `chebyshev`; `hill` with the median fit      about 0.005
auto                depends on the score, the size and the platform, and is decided when
                    the program is compiled: ``svd`` for scores that need small
                    eigenvalues; else ``exact`` on CPU and for matrices of at most 256
                    rows; else, for `hill`, matrix products
=================== ====================================================================== =================
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.matrices.whole import vary_like
from optax_decay.spectral import chebyshev, tails
from optax_decay.spectral.scores import MatrixProducts, Score, check_score, hill, matrix_products
from optax_decay.spectral.spectra import gram, scale_together, unit_eigenvalues

# Singular values below this do not count towards the rank in the entropy, and q is raised by it.
RANK_FLOOR = 6e-5
# The released program multiplies convolution kernels by sqrt(1/2).
POOLED_SCALE = math.sqrt(0.5)
# On accelerators, smaller matrices are solved exactly. With 512 rows, an H200 would take four times as long.
SMALL = 256


class Measurement(NamedTuple):
    """The score of one matrix.

    Attributes:
        value: the score; 0 where it is not stable.
        stable: bool; False where the spectrum does not define the score.
        centre: the number that `matrix_products` carries to the next call (`chebyshev.Estimate.centre`), else its
            default.
        error: the resolution of `matrix_products` (`chebyshev.Estimate.error`); 0 for exact methods.
        resolved: bool; False for a spectrum that `matrix_products` could not resolve, see `chebyshev`.
    """

    value: jax.Array
    stable: jax.Array
    centre: jax.Array
    error: jax.Array
    resolved: jax.Array


def measure(
    w: jax.Array, score: Score = hill(), *, centre: jax.Array | float | None = None
) -> Measurement:
    """The score of one matrix, or of several whose eigenvalues are pooled. The whole matrix must be on this device.

    Args:
        w: ``[m, n]``, or ``[P, m, n]`` for the P kernel positions of a convolution (multiplied by sqrt(1/2) as the
            released AlphaDecay does).
        score: one of `optax_decay.spectra`, such as ``hill()``; static under ``jax.jit``.
        centre: for `matrix_products`: the `Measurement.centre` of the last call.

    Returns:
        `Measurement` of scalars, float32 or (for float64 weights) float64.

    Raises:
        ValueError: something that is not a score, or a score of gradients.

    >>> import jax.numpy as jnp, optax_decay
    >>> optax_decay.spectra.measure(jnp.diag(jnp.array([3.0, 4.0])), optax_decay.spectra.frobenius_norm()).value
    Array(25., dtype=float32)
    """
    check_score(score)
    if score.needs_gradients:
        raise ValueError(
            f"the score {score.name} is taken from gradients, not from a weight matrix."
        )
    pooled = w.ndim == 3
    scaled, scale = scale_together(w if pooled else w[None])
    scale = scale * POOLED_SCALE if pooled else scale
    centre = jnp.asarray(chebyshev.DEFAULT_CENTRE if centre is None else centre, scaled.dtype)
    # The branches of `auto` must agree on what differs between devices.
    centre = vary_like(centre, scaled)

    def factorise(scaled: jax.Array, method: str) -> Measurement:
        value, stable = _from_eigenvalues(scaled, scale, score, method)
        stable = stable & jnp.isfinite(value)
        value = jnp.where(stable, value, 0)
        return Measurement(value, stable, centre, jnp.zeros_like(value), jnp.ones_like(stable))

    def multiply(scaled: jax.Array, products: MatrixProducts) -> Measurement:
        return _from_products(scaled, centre, score, products)

    method = score.method
    if isinstance(method, MatrixProducts) and method.everywhere:
        return multiply(scaled, method)
    if isinstance(method, str) and method != "auto":
        return factorise(scaled, method)
    if score.name == "entropy" or (score.fit is not None and not score.takes_upper_tail):
        return factorise(scaled, "svd")
    if score.name != "hill" or min(scaled.shape[1:]) <= SMALL:
        return factorise(scaled, "exact")
    products = method if isinstance(method, MatrixProducts) else matrix_products()
    return jax.lax.platform_dependent(
        scaled, cpu=lambda a: factorise(a, "exact"), default=lambda a: multiply(a, products)
    )


def _from_products(
    scaled: jax.Array, centre: jax.Array, score: Score, products: MatrixProducts
) -> Measurement:
    assert score.fit is not None
    found = chebyshev.tail_exponent(
        jax.lax.map(gram, scaled),
        centre,
        tail=_upper_tail(scaled, score.fit),
        product_dtype=products.dtype,
    )
    stable = found.ratio >= tails.MIN_RATIO
    stable &= found.error <= chebyshev.FLAT * (found.alpha - 1)
    stable &= jnp.isfinite(found.alpha)
    value = jnp.where(stable, found.alpha, 0)
    return Measurement(value, stable, found.centre, found.error, found.resolved)


def _eigenvalue_count(scaled: jax.Array) -> int:
    return scaled.shape[0] * min(scaled.shape[1:])


def _upper_tail(scaled: jax.Array, fit: tails.Fit) -> int:
    """The number of eigenvalues in the tail of pooled matrices ``[P, m, n]``."""
    count = _eigenvalue_count(scaled)
    return count - tails.tail_start(count, fit.xmin_pos)


def _from_eigenvalues(
    scaled: jax.Array, scale: jax.Array, score: Score, method: str
) -> tuple[jax.Array, jax.Array]:
    """A score and whether it is defined, from pooled matrices that were divided by a scale."""
    if score.name == "frobenius_norm":
        total = jnp.sum(scaled * scaled)
        return total * scale * scale, total > 0
    largest = _eigenvalue_count(scaled)
    if score.name == "spectral_norm":
        largest = 1
    elif score.fit is not None and score.takes_upper_tail:
        largest = _upper_tail(scaled, score.fit)
    values = unit_eigenvalues(scaled, largest, method)
    if score.fit is not None:
        return _exponent_score(values, scale, score, score.fit)
    top = values[-1]
    positive = top > 0
    square = scale * scale
    if score.name == "spectral_norm":
        return top * square, positive
    if score.name == "stable_rank":
        return jnp.sum(values) / jnp.where(positive, top, 1), positive
    entropy, ranked = _entropy(values * square)
    return entropy, positive & ranked


def _exponent_score(
    values: jax.Array, scale: jax.Array, score: Score, fit: tails.Fit
) -> tuple[jax.Array, jax.Array]:
    """`hill` or `alphahat` from ascending eigenvalues that were divided by scale²."""
    if score.takes_upper_tail:
        exponent = tails.hill(values)
    else:
        square = scale * scale if score.filter_zeros else jnp.ones_like(scale)
        exponent = tails.fit_exponent(values * square, fit, filter_zeros=score.filter_zeros)
    top = values[-1]
    positive = top > 0
    if score.name == "hill":
        return exponent.alpha, exponent.stable & positive
    log_norm = jnp.log10(jnp.where(positive, top, 1)) + 2 * jnp.log10(scale)
    return jax.nn.softplus(exponent.alpha * log_norm), exponent.stable & positive


def _entropy(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normalised entropy of a spectrum, and whether its rank is at least 2."""
    rank = jnp.sum(jnp.sqrt(values) > RANK_FLOOR)
    total = jnp.sum(values)
    share = values / jnp.where(total > 0, total, 1) + RANK_FLOOR
    entropy = -jnp.sum(share * jnp.log(share)) / jnp.log(jnp.maximum(rank, 2) + RANK_FLOOR)
    return entropy, rank >= 2
