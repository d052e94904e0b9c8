"""The spectrum of a weight matrix: eigenvalues, exponents, norms. Functions of arrays ``[..., m, n]``.

The spectrum of W is that of ``W W^T`` on the smaller side: λ = squared singular values, min(m, n) of them, in units of
weight². How it is computed, `METHODS`:

========= ==================================================================================== ===================
method    what                                                                                 alpha, float32
========= ==================================================================================== ===================
exact     Gram matrix at highest precision, tridiagonal form, bisection for the eigenvalues    exact to 1e-5
          asked for (CPU, GPU); ``eigh`` on TPU
eigh      Gram matrix at highest precision, ``eigh``                                           exact to 1e-5
svd       singular values of W itself: the only one that is right far below λ_max · 1e-5       exact to 1e-6
matmul    products only, see `chebyshev`: alpha only, by the Hill fit                          about 0.005
auto      by metric, size and platform, decided when the program is compiled: ``svd`` for
          metrics that need small eigenvalues; else ``exact`` on CPU and for small
          matrices; else ``matmul``
========= ==================================================================================== ===================

float32 Gram matrices square the condition number, which costs nothing here: alpha looks at the upper half only. An
error of ε·λ_max matters where the median is below 1e-5 λ_max, and there results are flagged.

Matrices of a stack are worked on one after the other (``lax.map``): batching would hold the workspace of all of them
in memory for the whole step and gains nothing.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.matrices.orthogonal import unit_scale
from optax_decay.matrices.whole import each_matrix, vary_like
from optax_decay.spectral import chebyshev
from optax_decay.spectral import tails as tail_exponents

METHODS = ("auto", "exact", "eigh", "svd", "matmul")
METRICS = ("alpha", "alphahat", "stable_rank", "entropy", "spectral_norm", "fnorm")
# Singular values below this do not count towards the rank in the entropy, and q is raised by it.
RANK_FLOOR = 6e-5
# The released program multiplies convolution kernels by sqrt(1/2).
POOLED_SCALE = math.sqrt(0.5)
# On accelerators, smaller matrices are solved exactly.
SMALL = 512


class Measurement(NamedTuple):
    """One metric of one matrix.

    Attributes:
        value: the metric; 0 where it is not stable.
        stable: bool; False where the spectrum does not define it.
        centre: what ``matmul`` carries to the next call (`chebyshev.Estimate.centre`), else its default.
        error: resolution of ``matmul`` (`chebyshev.Estimate.error`), else 0.
        resolved: bool; False for a spectrum that ``matmul`` could not resolve, see `chebyshev`.
    """

    value: jax.Array
    stable: jax.Array
    centre: jax.Array
    error: jax.Array
    resolved: jax.Array


def gram(w: jax.Array) -> jax.Array:
    """``[m, n] -> [min, min]`` at highest precision."""
    equation = "im,jm->ij" if w.shape[0] <= w.shape[1] else "mi,mj->ij"
    return jnp.einsum(equation, w, w, precision="highest")


def _from_gram(g: jax.Array, largest: int, method: str) -> jax.Array:
    """The `largest` largest eigenvalues of a Gram matrix, ascending."""
    n = g.shape[0]
    if n == 1:
        return g[0]

    def full(g: jax.Array) -> jax.Array:
        return jnp.linalg.eigvalsh(g)[n - largest :]

    def bisection(g: jax.Array) -> jax.Array:
        _, diagonal, off, _ = jax.lax.linalg.tridiagonal(g, lower=True)
        off = off[: n - 1]
        # A matrix that decouples exactly would divide 0 by 0 where a bisection point meets an eigenvalue.
        least = jnp.finfo(g.dtype).eps ** 2 * jnp.max(jnp.abs(diagonal))
        off = jnp.where(jnp.abs(off) < least, least, off)
        return jax.scipy.linalg.eigh_tridiagonal(
            diagonal, off, eigvals_only=True, select="i", select_range=(n - largest, n - 1)
        )

    values = (
        full(g) if method == "eigh" else jax.lax.platform_dependent(g, tpu=full, default=bisection)
    )
    return jnp.maximum(values, 0)


def _unit_eigenvalues(w: jax.Array, largest: int, method: str) -> jax.Array:
    """Eigenvalues of pooled matrices ``[P, m, n]``, ascending; `largest` of each if there is one, else all."""
    if method == "svd":
        values = (
            jnp.linalg.svd(w, compute_uv=False)
            if w.shape[0] == 1
            else jax.lax.map(lambda a: jnp.linalg.svd(a, compute_uv=False), w)
        )
        return jnp.sort(values.ravel() ** 2)[-largest:]
    if w.shape[0] == 1:
        return _from_gram(gram(w[0]), largest, method)
    values = jax.lax.map(lambda a: _from_gram(gram(a), min(a.shape), method), w)
    return jnp.sort(values.ravel())[-largest:]


def _scaled(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pooled matrices on one power-of-two scale, in accumulator precision, and the scale."""
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    flat, scale = unit_scale(wide.reshape(1, -1, wide.shape[-1]))
    return flat.reshape(wide.shape), scale[0, 0, 0]


def eigenvalues(
    x: jax.Array,
    *,
    largest: int | None = None,
    method: str = "exact",
    mesh: Any = None,
    spec: Any = None,
) -> jax.Array:
    """Squared singular values of every matrix, ascending.

    Args:
        x: ``[..., m, n]``, real.
        largest: how many, from the top; default: all min(m, n).
        method: ``"exact"``, ``"eigh"`` or ``"svd"``.
        mesh, spec: where x lives, see `whole_matrices.each_matrix`.

    Returns:
        ``[..., largest]``, at least float32. Zeros for a matrix that is not finite.

    Raises:
        ValueError: a method that has no eigenvalues, or `largest` out of range.
    """
    if method not in METHODS[1:4]:
        raise ValueError(
            f"method={method!r} gives no eigenvalues; allowed: 'exact', 'eigh', 'svd'."
        )
    count = min(x.shape[-2:])
    largest = count if largest is None else largest
    if not 1 <= largest <= count:
        raise ValueError(
            f"largest={largest} is outside [1, {count}], the smaller side of {x.shape}."
        )

    def one(w: jax.Array) -> jax.Array:
        scaled, scale = _scaled(w[None])
        return _unit_eigenvalues(scaled, largest, method) * scale * scale

    return each_matrix(lambda stack: jax.lax.map(one, stack), x, mesh=mesh, spec=spec)


def _entropy(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    rank = jnp.sum(jnp.sqrt(values) > RANK_FLOOR)
    total = jnp.sum(values)
    share = values / jnp.where(total > 0, total, 1) + RANK_FLOOR
    entropy = -jnp.sum(share * jnp.log(share)) / jnp.log(jnp.maximum(rank, 2) + RANK_FLOOR)
    return entropy, rank >= 2


def _measure(
    values: jax.Array, scale: jax.Array, metric: str, exponent: tail_exponents.Exponent | None
) -> tuple[jax.Array, jax.Array]:
    """A metric from ascending eigenvalues that were divided by scale²."""
    top = values[-1]
    positive = top > 0
    square = scale * scale
    if metric == "spectral_norm":
        return top * square, positive
    if metric == "fnorm":
        return jnp.sum(values) * square, positive
    if metric == "stable_rank":
        return jnp.sum(values) / jnp.where(positive, top, 1), positive
    if metric == "entropy":
        entropy, ranked = _entropy(values * square)
        return entropy, positive & ranked
    assert exponent is not None
    if metric == "alpha":
        return exponent.alpha, exponent.stable & positive
    log_norm = jnp.log10(jnp.where(positive, top, 1)) + 2 * jnp.log10(scale)
    return jax.nn.softplus(exponent.alpha * log_norm), exponent.stable & positive


def check(
    metric: Any, method: Any, fit: Any = "median", xmin_pos: Any = 2.0, filter_zeros: Any = False
) -> None:
    """Raises ValueError for names that do not exist, or a method that cannot give the metric."""
    if metric not in METRICS:
        raise ValueError(
            f"metric={metric!r} is not known; allowed: {', '.join(map(repr, METRICS))}."
        )
    if method not in METHODS:
        raise ValueError(
            f"method={method!r} is not known; allowed: {', '.join(map(repr, METHODS))}."
        )
    tail_exponents.check_fit(fit, xmin_pos)
    if method == "matmul" and (metric != "alpha" or fit != "median" or filter_zeros):
        raise ValueError(
            "method='matmul' gives metric='alpha' by fit='median' without filter_zeros only; "
            "the nearest valid choice is method='exact'."
        )


def measure(
    w: jax.Array,
    metric: str = "alpha",
    *,
    method: str = "auto",
    fit: str = "median",
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
    centre: jax.Array | float | None = None,
    product_dtype: Any = jnp.bfloat16,
) -> Measurement:
    """One metric of one matrix, or of several whose eigenvalues are pooled. The whole matrix must be here.

    ============== =======================================================================================
    metric         definition (λ_N the largest of N eigenvalues)
    ============== =======================================================================================
    alpha          exponent of the tail, `tail_exponents`
    alphahat       softplus(alpha · log10 λ_N)
    stable_rank    Σ λ / λ_N
    entropy        -Σ q ln q / ln(r + c), q_j = λ_j/Σλ + c, r = #{sqrt λ > c}, c = 6e-5
    spectral_norm  λ_N, the square of the matrix 2-norm
    fnorm          Σ λ, the square of the Frobenius norm
    ============== =======================================================================================

    Args:
        w: ``[m, n]``, or ``[P, m, n]`` for the P kernel positions of a convolution (multiplied by sqrt(1/2) as the
            released AlphaDecay does).
        metric: one of `METRICS`.
        method: one of `METHODS`.
        fit, xmin_pos, filter_zeros: see `tail_exponents.fit`; ``fit`` must be ``"median"`` for ``method="matmul"``.
        centre: for ``matmul``: the last result's `Measurement.centre`.
        product_dtype: for ``matmul``: dtype of its products.

    Returns:
        `Measurement` of scalars, float32 or (for float64 weights) float64.
    """
    check(metric, method, fit, xmin_pos, filter_zeros)
    pooled = w.ndim == 3
    scaled, scale = _scaled(w if pooled else w[None])
    scale = scale * POOLED_SCALE if pooled else scale
    count = scaled.shape[0] * min(scaled.shape[1:])
    start = tail_exponents.tail_start(count, xmin_pos)
    plain = fit == "median" and not filter_zeros
    wide = scaled.dtype
    centre = jnp.asarray(chebyshev.DEFAULT_CENTRE if centre is None else centre, wide)
    # The branches of `auto` must agree on what differs between devices.
    centre = vary_like(centre, scaled)

    def pack(value: jax.Array, stable: jax.Array, *rest: jax.Array) -> Measurement:
        stable = stable & jnp.isfinite(value)
        rest = rest or (centre, jnp.zeros_like(value), jnp.ones_like(stable))
        return Measurement(jnp.where(stable, value, 0), stable, *rest)

    def factorise(scaled: jax.Array, method: str) -> Measurement:
        if metric == "fnorm":
            total = jnp.sum(scaled * scaled)
            return pack(total * scale * scale, total > 0)
        exponent = None
        needs_tail_only = metric == "spectral_norm" or (plain and metric in ("alpha", "alphahat"))
        largest = (count - start if metric != "spectral_norm" else 1) if needs_tail_only else count
        values = _unit_eigenvalues(scaled, largest, method)
        if metric in ("alpha", "alphahat") and plain:
            exponent = tail_exponents.hill(values)
        elif metric in ("alpha", "alphahat"):
            square = scale * scale if filter_zeros else jnp.ones_like(scale)
            exponent = tail_exponents.fit(
                values * square, fit, xmin_pos=xmin_pos, filter_zeros=filter_zeros
            )
        return pack(*_measure(values, scale, metric, exponent))

    def products(scaled: jax.Array) -> Measurement:
        found = chebyshev.tail_exponent(
            jax.lax.map(gram, scaled), centre, tail=count - start, product_dtype=product_dtype
        )
        stable = found.ratio >= tail_exponents.MIN_RATIO
        stable &= found.error <= chebyshev.FLAT * (found.alpha - 1)
        return pack(found.alpha, stable, found.centre, found.error, found.resolved)

    if method != "auto":
        return products(scaled) if method == "matmul" else factorise(scaled, method)
    if metric == "entropy" or (metric in ("alpha", "alphahat") and not plain):
        return factorise(scaled, "svd")
    if metric != "alpha" or min(scaled.shape[1:]) <= SMALL:
        return factorise(scaled, "exact")
    return jax.lax.platform_dependent(scaled, cpu=lambda a: factorise(a, "exact"), default=products)
