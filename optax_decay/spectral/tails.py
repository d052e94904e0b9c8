"""Power-law exponents of a spectrum's tail, and what a random matrix would give.

With eigenvalues λ_0 <= ... <= λ_{N-1} and the tail from index i on, n = N - i values, the exponent of a density
proportional to λ^-α is estimated by maximum likelihood::

    α_i = 1 + n / Σ_{j>=i} ln(λ_j / λ_i)

``median`` takes i = int(N / xmin_pos), the Hill fit of AlphaDecay (arXiv 2506.14562). ``goodness-of-fit`` tries every
i and keeps the one with the smallest distance between the tail's empirical and fitted distribution,
``D_i = max_j |1 - (λ_j/λ_i)^(1-α_i) - (j-i)/n|``, as Clauset et al. (arXiv 0706.1062) and WeightWatcher do;
``fix-finger`` tries only λ_i within [0.95 p, 1.5 p] of the peak p of the histogram of log10 λ. The last two depend on
single eigenvalues and jump on near-random matrices (4 Gaussian draws of 512 x 512: 8.9 ± 2.1 against the Hill fit's
2.123 ± 0.003): diagnostics rather than controls.

Differs from the released AlphaDecay: sums run over gaps of the logarithms (no cancellation); the lower end of the
fix-finger window is 0.95 p, where the released program compares log10(0.95 p) with λ; and every result comes with a
flag, False for spectra without an exponent, which crash the released program or give rounding noise.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FITS = ("median", "goodness-of-fit", "fix-finger")
# Below this part of the largest eigenvalue, float32 eigenvalues of a Gram matrix are rounding noise.
MIN_RATIO = 1e-5
# Mean log excess of a flat spectrum: exponents above 1e4 are rounding noise too.
MIN_SPREAD = 1e-4
ZERO = 1e-5
BINS = 100


class Exponent(NamedTuple):
    """An exponent and whether it means anything.

    Attributes:
        alpha: the exponent; 0 where it is not stable.
        stable: bool; False for zero, flat, non-finite or rank-deficient spectra.
    """

    alpha: jax.Array
    stable: jax.Array


def tail_start(count: int, xmin_pos: float) -> int:
    """Index of the first eigenvalue of the tail; the upper half, rounded up, for xmin_pos = 2."""
    return int(count / xmin_pos)


def _judge(spread: jax.Array, ratio: jax.Array) -> Exponent:
    stable = (spread >= MIN_SPREAD) & (ratio >= MIN_RATIO) & jnp.isfinite(spread)
    alpha = 1 + 1 / jnp.where(stable, spread, 1)
    return Exponent(jnp.where(stable, alpha, 0), stable)


def hill(tail: jax.Array) -> Exponent:
    """The Hill exponent of a tail ``[n]`` of eigenvalues in ascending order, its smallest as xmin."""
    safe = jnp.maximum(tail, jnp.finfo(tail.dtype).tiny)
    spread = jnp.mean(jnp.log(safe / safe[0]))
    return _judge(spread, tail[0] / safe[-1])


def fit(
    eigenvalues: jax.Array,
    method: str = "median",
    *,
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
) -> Exponent:
    """The tail exponent of one spectrum.

    Args:
        eigenvalues: ``[N]``, ascending, not negative.
        method: one of `FITS`.
        xmin_pos: N / xmin_pos eigenvalues lie below the tail; used by ``median``.
        filter_zeros: leave eigenvalues <= 1e-5 out, unless that leaves none.
    """
    count = eigenvalues.shape[0]
    if method == "median" and not filter_zeros:
        return hill(eigenvalues[tail_start(count, xmin_pos) :])
    info = jnp.finfo(eigenvalues.dtype)
    top = jnp.maximum(eigenvalues[-1], info.tiny)
    logs = jnp.log(jnp.maximum(eigenvalues / top, info.eps**2))
    kept = jnp.sum(eigenvalues > ZERO) if filter_zeros else jnp.asarray(count)
    kept = jnp.where(kept == 0, count, kept)
    first = count - kept
    if method == "median":
        starts = jnp.asarray([tail_start(n, xmin_pos) for n in range(count + 1)])
        i = first + starts[kept]
    else:
        i = _best_start(logs, _spreads(logs), first, method == "fix-finger")
    found = i < count
    i = jnp.minimum(i, count - 1)
    alpha, stable = _judge(_spreads(logs)[i], eigenvalues[i] / top)
    return Exponent(jnp.where(found, alpha, 0), stable & found)


def _spreads(logs: jax.Array) -> jax.Array:
    """Mean log excess of the tail from every index on; sums of non-negative gaps."""
    size = logs.shape[0]
    left = jnp.arange(size - 1, 0, -1, dtype=logs.dtype)
    gaps = jnp.maximum(logs[1:] - logs[:-1], 0) * left
    sums = jnp.cumsum(gaps[::-1])[::-1]
    return jnp.concatenate([sums / (left + 1), jnp.zeros(1, logs.dtype)])


def _best_start(
    logs: jax.Array, spreads: jax.Array, first: jax.Array, near_peak: bool
) -> jax.Array:
    """The first index with the smallest distance, of those allowed; N if none is."""
    size = logs.shape[0]
    index = jnp.arange(size)
    allowed = (index >= first) & (index < size - 1) & (logs >= logs[-1] + math.log(MIN_RATIO))
    if near_peak:
        peak = _peak(logs, index >= first)
        allowed &= (logs >= peak + math.log(0.95)) & (logs <= peak + math.log(1.5))
    distances = jax.lax.map(
        lambda i: _distance(logs, spreads[i], i), index, batch_size=min(32, size)
    )
    distances = jnp.where(allowed, distances, jnp.inf)
    return jnp.where(jnp.any(allowed), jnp.argmin(distances), size)


def _distance(logs: jax.Array, spread: jax.Array, i: jax.Array) -> jax.Array:
    size = logs.shape[0]
    index = jnp.arange(size)
    # (λ_j/λ_i)^(1-α) with α - 1 = 1/spread; α > 1 always holds for a positive spread.
    fitted = 1 - jnp.exp(-(logs - logs[i]) / jnp.where(spread > 0, spread, 1))
    empirical = (index - i) / (size - i)
    worst = jnp.max(jnp.where(index >= i, jnp.abs(fitted - empirical), 0))
    return jnp.where(spread > 0, worst, 1)


def _peak(logs: jax.Array, kept: jax.Array) -> jax.Array:
    """ln of the left edge of the fullest of 100 equal bins of ln λ, the first among equals."""
    top = logs[-1]
    low = jnp.min(jnp.where(kept, logs, top))
    width = jnp.maximum(top - low, jnp.finfo(logs.dtype).tiny)
    bins = jnp.clip(jnp.floor((logs - low) / width * BINS), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[bins].add(kept.astype(jnp.int32))
    return low + jnp.argmax(counts) * width / BINS


@functools.cache
def random_matrix_alpha(rows: int, columns: int, xmin_pos: float = 2.0) -> float:
    """The Hill exponent of a large matrix of independent entries with this aspect ratio.

    With q = min/max of the two sides, eigenvalues follow Marchenko and Pastur's law. In the variable θ of
    ``λ = 1 + q + 2 sqrt(q) cos θ`` its density is ``2 sin²θ / (π λ)``, and both the place of the tail's start and the
    mean log excess are integrals of smooth functions: 2.122 for a square matrix, 2.99 for 3:8, 3.45 for 1:4.

    >>> round(random_matrix_alpha(512, 512), 2)
    2.12
    """
    q = min(rows, columns) / max(rows, columns)
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def density(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = 1 + q + 2 * math.sqrt(q) * np.cos(theta)
        return value, 2 * np.sin(theta) ** 2 / (math.pi * value)

    def integral(end: float, excess_over: float | None = None) -> float:
        theta = (nodes + 1) * end / 2
        value, mass = density(theta)
        if excess_over is not None:
            mass = mass * np.log(value / excess_over)
        return float(np.sum(mass * weights) * end / 2)

    share = 1 - 1 / xmin_pos
    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < share else (low, middle)
    start = float(density(np.asarray(low))[0])
    return 1 + share / integral(low, start)


def check_fit(method: Any, xmin_pos: Any) -> None:
    """Raises ValueError for an unknown fit or an xmin_pos that leaves no tail or no body."""
    if method not in FITS:
        raise ValueError(f"fit={method!r} is not known; allowed: {', '.join(map(repr, FITS))}.")
    if not xmin_pos > 1:
        raise ValueError(
            f"xmin_pos={xmin_pos!r} is outside (1, inf); the nearest allowed value is a number above 1, "
            f"such as 2 for the upper half."
        )
