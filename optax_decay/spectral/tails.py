"""Power-law exponents of a spectrum's tail, and what a random matrix would give.

With eigenvalues λ_0 <= ... <= λ_{N-1} and the tail from index i on, n = N - i values, the exponent of a density
proportional to λ^-α is estimated by maximum likelihood::

    α_i = 1 + n / Σ_{j>=i} ln(λ_j / λ_i)

Three fits choose i:

* `median` takes i = int(N / xmin_pos), the Hill fit of AlphaDecay (arXiv 2506.14562).
* `goodness_of_fit` tries every i and keeps the one with the smallest distance between the empirical and the fitted
  distribution of the tail, ``D_i = max_j |1 - (λ_j/λ_i)^(1-α_i) - (j-i)/n|``, as Clauset et al. (arXiv 0706.1062) and
  WeightWatcher do.
* `fix_finger` does the same, but only with λ_i within [0.95 p, 1.5 p], where p is the peak of the histogram of log10 λ.

The last two depend on single eigenvalues and jump on near-random matrices: four Gaussian draws of 512 x 512 give
8.9 ± 2.1, where the Hill fit gives 2.123 ± 0.003. Use them as diagnostics rather than to control the decay.

**Differs from the released AlphaDecay.** Sums run over gaps of the logarithms, which avoids cancellation. The lower end
of the fix-finger window is 0.95 p, where the released program compares log10(0.95 p) with λ. Every result comes with a
flag, which is False for spectra without an exponent; those crash the released program or give rounding noise.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.parameters.arguments import check, nearest

FITS = ("median", "goodness_of_fit", "fix_finger")
# Below this part of the largest eigenvalue, float32 eigenvalues of a Gram matrix are rounding noise.
MIN_RATIO = 1e-5
# A spectrum whose mean log excess is smaller is flat: exponents above 1e4 are rounding noise too.
MIN_SPREAD = 1e-4
ZERO = 1e-5
BINS = 100


class Fit(NamedTuple):
    """Where the tail of a spectrum starts. Build one with `median`, `goodness_of_fit` or `fix_finger`.

    Attributes:
        name: one of `FITS`.
        xmin_pos: N / xmin_pos eigenvalues lie below the tail. Only `median` lets one choose it; for the other fits it
            is 2, and only the exponent of a random matrix depends on it (`random_matrix_alpha`).
    """

    name: str
    xmin_pos: float = 2.0


def median(xmin_pos: float = 2.0) -> Fit:
    """The Hill fit: the tail starts at the eigenvalue with index int(N / xmin_pos), for 2 at the median.

    Args:
        xmin_pos: a Python number above 1, dimensionless; it fixes shapes and cannot be traced.

    Raises:
        ValueError: a number that leaves no eigenvalue below the tail.
    """
    check("xmin_pos", xmin_pos, 1.0, open_low=True)
    return Fit("median", xmin_pos)


def goodness_of_fit() -> Fit:
    """Tries every start and keeps the one where a power law fits the tail best; a diagnostic."""
    return Fit("goodness_of_fit")


def fix_finger() -> Fit:
    """As `goodness_of_fit`, but only with starts near the peak of the spectrum's histogram; a diagnostic."""
    return Fit("fix_finger")


class Exponent(NamedTuple):
    """The exponent of a tail, and whether the spectrum defines one.

    Attributes:
        alpha: the exponent, dimensionless; 0 where it is not stable.
        stable: bool; False for zero, flat, non-finite or rank-deficient spectra.
    """

    alpha: jax.Array
    stable: jax.Array


def tail_start(count: int, xmin_pos: float) -> int:
    """The index of the first eigenvalue of the tail. For xmin_pos = 2 the tail is the upper half, rounded up."""
    return int(count / xmin_pos)


def _judge(spread: jax.Array, ratio: jax.Array) -> Exponent:
    stable = (spread >= MIN_SPREAD) & (ratio >= MIN_RATIO) & jnp.isfinite(spread)
    alpha = 1 + 1 / jnp.where(stable, spread, 1)
    return Exponent(jnp.where(stable, alpha, 0), stable)


def hill(tail: jax.Array) -> Exponent:
    """The Hill exponent of a tail ``[n]`` of ascending eigenvalues, whose smallest value is λ_i."""
    safe = jnp.maximum(tail, jnp.finfo(tail.dtype).tiny)
    spread = jnp.mean(jnp.log(safe / safe[0]))
    return _judge(spread, tail[0] / safe[-1])


def fit_exponent(
    eigenvalues: jax.Array, fit: Fit = median(), *, filter_zeros: bool = False
) -> Exponent:
    """The exponent of the tail of one spectrum.

    Args:
        eigenvalues: ``[N]``, ascending, not negative.
        fit: where the tail starts.
        filter_zeros: leave eigenvalues <= 1e-5 out, unless that leaves none.
    """
    count = eigenvalues.shape[0]
    if fit.name == "median" and not filter_zeros:
        return hill(eigenvalues[tail_start(count, fit.xmin_pos) :])
    info = jnp.finfo(eigenvalues.dtype)
    top = jnp.maximum(eigenvalues[-1], info.tiny)
    logs = jnp.log(jnp.maximum(eigenvalues / top, info.eps**2))
    kept = jnp.sum(eigenvalues > ZERO) if filter_zeros else jnp.asarray(count)
    kept = jnp.where(kept == 0, count, kept)
    first = count - kept
    if fit.name == "median":
        starts = jnp.asarray([tail_start(n, fit.xmin_pos) for n in range(count + 1)])
        i = first + starts[kept]
    else:
        i = _best_start(logs, _spreads(logs), first, fit.name == "fix_finger")
    found = i < count
    i = jnp.minimum(i, count - 1)
    alpha, stable = _judge(_spreads(logs)[i], eigenvalues[i] / top)
    return Exponent(jnp.where(found, alpha, 0), stable & found)


def _spreads(logs: jax.Array) -> jax.Array:
    """The mean log excess of the tail that starts at each index, as sums of gaps, which are not negative."""
    size = logs.shape[0]
    left = jnp.arange(size - 1, 0, -1, dtype=logs.dtype)
    gaps = jnp.maximum(logs[1:] - logs[:-1], 0) * left
    sums = jnp.cumsum(gaps[::-1])[::-1]
    return jnp.concatenate([sums / (left + 1), jnp.zeros(1, logs.dtype)])


def _best_start(
    logs: jax.Array, spreads: jax.Array, first: jax.Array, near_peak: bool
) -> jax.Array:
    """The allowed index with the smallest distance, the first among equals; N if no index is allowed."""
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
    """The left edge of the fullest of 100 equal bins of ln λ, as ln λ; the first among equals."""
    top = logs[-1]
    low = jnp.min(jnp.where(kept, logs, top))
    width = jnp.maximum(top - low, jnp.finfo(logs.dtype).tiny)
    bins = jnp.clip(jnp.floor((logs - low) / width * BINS), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[bins].add(kept.astype(jnp.int32))
    return low + jnp.argmax(counts) * width / BINS


@functools.cache
def random_matrix_alpha(rows: int, columns: int, xmin_pos: float = 2.0) -> float:
    """The Hill exponent of a large matrix of independent entries with this aspect ratio.

    With q = min/max of the two sides, the eigenvalues follow the law of Marchenko and Pastur. In the variable θ of
    ``λ = 1 + q + 2 sqrt(q) cos θ`` its density is ``2 sin²θ / (π λ)``. The start of the tail and the mean log excess
    are then integrals of smooth functions. The exponent is 2.122 for a square matrix, 2.99 for 3:8 and 3.45 for 1:4.

    Args:
        rows, columns: the sides of the matrix; only their ratio matters.
        xmin_pos: as in `median`.

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


def check_fit(fit: object) -> None:
    """Raises ValueError unless `fit` is a `Fit`; names the nearest one."""
    if not isinstance(fit, Fit):
        name = getattr(fit, "__name__", fit)
        raise ValueError(
            f"fit={fit!r} is not a Fit; allowed: {', '.join(f'spectra.{n}()' for n in FITS)} "
            f"(did you mean optax_decay.spectra.{nearest(name, FITS)}()?)."
        )
