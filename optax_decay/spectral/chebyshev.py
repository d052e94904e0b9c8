r"""The tail exponent of a matrix from matrix products, without eigenvalues and without random vectors.

**Problem.** For a weight matrix with Gram matrix G (n x n, smaller side, eigenvalues λ_1 <= ... <= λ_n) the Hill
exponent of the upper k = n - int(n/2) eigenvalues is ``alpha = 1 + 1/H`` with::

    H = mean_{j > n-k} ln(λ_j / λ_med),        λ_med = λ_{n-k+1}

Eigenvalue solvers spend their time in tridiagonalisation, which accelerators run at a few percent of their rate.
H needs far less than n eigenvalues: it is a single number, an integral over the upper half of the spectral density.

**Derivation.**

1. *A logarithmic scale by one inverse.* With a centre θ > 0, the Cayley map ``Y = (G-θ)(G+θ)^-1 = 1 - 2θ(G+θ)^-1``
   has the eigenvalues ``y = tanh(z/2)`` with ``z = ln(λ/θ)``, always inside (-1, 1). Polynomials of Y resolve ln λ
   around θ evenly. Outliers at a thousand times the median do not cost resolution, as they would with polynomials of G.
2. *Exact moments.* The Chebyshev moments ``μ_k = tr T_k(Y)``, k <= K = (p+1)q, need p+q-2 products: the baby steps
   T_2 .. T_q, the giant steps T_2q .. T_pq, and Frobenius inner products, because
   ``tr(T_a T_b) = (μ_{a+b} + μ_{|a-b|}) / 2``. The traces are exact; a stochastic trace with 64 vectors has ten times
   the error at the same cost.
3. *The counting function.* With y = cos φ, the number of eigenvalues above y is the integral of the cosine series
   of the density from 0 to φ::

       N(φ) = (μ_0 φ + 2 Σ_k w_k μ_k sin(kφ) / k) / π

   with the de la Vallée-Poussin window ``w_k = min(1, 2(1 - k/(K+1)))``. The window keeps the lower half of the
   moments exact, and damps the ripples that a cliff of the density causes in a truncated series.
4. *The exponent.* The k-th largest eigenvalue is where N crosses k - 1/2, at φ*; and since dz = -2 dφ / sin φ,
   integrating Σ (z_j - z*) by parts leaves only N::

       H = (2/k) ∫_0^φ* N(φ) / sin φ dφ

   a one-dimensional integral of a smooth function (N(0) = 0), done by the trapezoidal rule.

**Error.** The truncated series smooths the density over π/K in φ, that is over 2π/K in ln λ at the centre. This acts
in two places. The integral is insensitive to it (its integrand vanishes at neither end only to first order). The place
of the median is not: H moves by as much as ln λ_med does, so ``dα = (α-1)² d ln λ_med``. Where the density is smooth,
the error is of second order, and smaller than the dependence of the statistic on one single eigenvalue,
``(α-1)² / (2 N'(z*))``. The *weak case* is a cliff of the density within 2π/K of the median, such as a pure power law
of large α, which starts 0.14 below its median at α = 6. It is detected without an exact solution: the same moments,
windowed at 2K/3, then give another α, and the difference is reported as `Estimate.error`.

Another pass runs when this error exceeds both 0.01 (α-1) and the floor above, or when the median lies more than a
factor e from the centre. It moves the centre to the median found, where the resolution is finest, and takes twice the
giant steps if the error was the reason.

**Cost.** Gram 2n²m, Cholesky and inverse 7/3 n³, then 2n³ per product, 14 products for K = 72, all of them in
``bfloat16`` on request (rounding changes α by less than 0.002). Workspace: q + 5 matrices n x n. The centre is carried
from one refresh to the next, so that a matrix usually takes one pass, and two at the start of a run.

**Reference.** The combination is new here. Its parts are known: Chebyshev moments and windows (kernel polynomial
method, cond-mat/0504627),
baby-step giant-step evaluation (Paterson and Stockmeyer 1973), the Hill estimator at the median (AlphaDecay,
arXiv 2506.14562).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.matrices.alignment import with_aligned
from optax_decay.matrices.inverse import inverse
from optax_decay.matrices.whole import vary_like

# Points of the quadrature in φ: 2048/K points per half wave of the fastest sine keep its error below 1e-5 of H.
_GRID = 2048
# ln(θ / mean eigenvalue) before the first estimate.
DEFAULT_CENTRE = math.log(0.5)
_PASSES = 3
TOLERANCE = 0.01
# With a larger error, relative to α-1, the spectrum is narrower than the resolution and counts as flat.
FLAT = 0.2
# ln of the smallest centre over the mean eigenvalue: a median below it lies in a null space.
_LOWEST_CENTRE = -12.0
_POWER_STEPS = 16


class Estimate(NamedTuple):
    """The result of `tail_exponent`; scalars in the dtype of the Gram matrix.

    Attributes:
        alpha: the Hill exponent.
        centre: ln of the median eigenvalue found over the mean eigenvalue; pass it to the next call.
        error: the change of α when a third of the moments is left out.
        resolved: False where the error still exceeds the tolerance after the last pass (the weak case).
        ratio: median eigenvalue over the largest, which is estimated by power iteration.
        passes: int32, number of passes.
    """

    alpha: jax.Array
    centre: jax.Array
    error: jax.Array
    resolved: jax.Array
    ratio: jax.Array
    passes: jax.Array


def cayley(gram: jax.Array, centre: jax.Array) -> jax.Array:
    """``(G-θ)(G+θ)^-1`` of a positive semidefinite ``[n, n]`` G, by one Cholesky factorisation."""
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def by_library(a: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), identity)

    solved = jax.lax.platform_dependent(
        gram + centre * identity, cpu=by_library, cuda=by_library, rocm=by_library, default=inverse
    )
    y = identity - 2 * centre * solved
    return (y + y.T) / 2


def moments(
    y: jax.Array,
    baby: int,
    giant: jax.Array | int,
    most_giants: int,
    product_dtype: jax.typing.DTypeLike,
    size: int | None = None,
) -> jax.Array:
    """``tr T_k(Y)`` for k = 0 .. (giant+1)·baby, zeros after that.

    Args:
        y: ``[n, n]`` symmetric with eigenvalues in [-1, 1].
        baby: q >= 2.
        giant: p in [1, most_giants]; may be traced.
        most_giants: fixes the shape of the result, ``[(most_giants+1)·baby + 1]``.
        product_dtype: of the factors; products are accumulated in the dtype of y.
        size: rows and columns of y that count; zeros behind them are padding. Default: all.
    """
    wide = y.dtype
    # Where T_0 and T_1 are zero, so are all others, and their traces.
    counted = jnp.arange(y.shape[0]) < (y.shape[0] if size is None else size)
    identity = vary_like(jnp.diag(counted.astype(wide)), y)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        exact = "highest" if jnp.dtype(product_dtype).itemsize == 8 else None
        return jnp.matmul(
            a.astype(product_dtype),
            b.astype(product_dtype),
            preferred_element_type=wide,
            precision=exact,
        )

    def baby_step(carry: tuple, _: Any) -> tuple:
        before, now = carry
        new = 2 * product(y, now) - before
        return (now, new), (new.astype(product_dtype), jnp.trace(new))

    (_, top), (rest, traces) = jax.lax.scan(baby_step, (identity, y), None, length=baby - 1)
    babies = jnp.concatenate([y.astype(product_dtype)[None], rest])
    mu = vary_like(jnp.zeros((most_giants + 1) * baby + 1, wide), y)
    head = jnp.concatenate([jnp.stack([jnp.trace(identity), jnp.trace(y)]), traces])
    mu = jax.lax.dynamic_update_slice(mu, head, (0,))

    def combine(j: jax.Array | int, t: jax.Array, mu: jax.Array) -> jax.Array:
        inner = jnp.einsum(
            "bij,ij->b", babies, t.astype(product_dtype), preferred_element_type=wide
        )
        below = jax.lax.dynamic_slice(mu, ((j - 1) * baby,), (baby,))[::-1]
        return jax.lax.dynamic_update_slice(mu, 2 * inner - below, (j * baby + 1,))

    def giant_step(j: jax.Array, carry: tuple) -> tuple:
        before, now, mu = carry
        new = 2 * product(top, now) - before
        return now, new, combine(j, new, mu)

    carry = (identity, top, combine(1, top, mu))
    return jax.lax.fori_loop(2, giant + 1, giant_step, carry)[2]


def hill_from_moments(
    mu: jax.Array, count: jax.Array | int, tail: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The Hill statistic from Chebyshev moments: steps 3 and 4 of the derivation.

    Args:
        mu: moments, ``[K_max + 1]``.
        count: K, the number of moments to use; may be traced.
        tail: k, the number of eigenvalues in the tail.

    Returns:
        ``(H, z, density)``: the mean log excess, ln of the tail's smallest eigenvalue over the centre, and the
        number of eigenvalues per unit of ln λ there.
    """
    wide = mu.dtype
    k = jnp.arange(1, mu.shape[0], dtype=wide)
    window = jnp.clip(2 * (1 - k / (count + 1)), 0, 1)
    weighted = window * mu[1:]
    step = math.pi / _GRID
    phi = jnp.arange(1, _GRID, dtype=wide) * step
    waves = jnp.sin(k[:, None] * phi)
    above = (mu[0] * phi + 2 * jnp.matmul(weighted / k, waves, precision="highest")) / math.pi
    target = jnp.asarray(tail - 0.5, wide)
    # The first crossing from above; near a spectrum's edge ripples may cross again.
    i = jnp.argmax(above >= target)
    last, next_ = above[jnp.maximum(i - 1, 0)], above[i]
    slope = jnp.maximum(next_ - last, jnp.finfo(wide).tiny)
    fraction = jnp.clip((target - last) / slope, 0, 1)
    angle = phi[jnp.maximum(i - 1, 0)] + fraction * step
    start = (mu[0] + 2 * jnp.sum(weighted)) / math.pi
    integrand = jnp.concatenate([start[None], above / jnp.sin(phi)])
    # To the grid point before the crossing, then the partial cell.
    inside = jnp.arange(_GRID) <= i
    whole = step * (jnp.sum(jnp.where(inside, integrand, 0)) - (integrand[0] + integrand[i]) / 2)
    part = fraction * step * (integrand[i] + target / jnp.sin(angle)) / 2
    z = 2 * jnp.arctanh(jnp.cos(angle))
    density = slope / step * jnp.sin(angle) / 2
    return 2 / tail * (whole + part), z, density


def tail_exponent(
    gram: jax.Array,
    centre: jax.Array | float | None = None,
    *,
    tail: int,
    baby: int = 8,
    giant: int = 8,
    product_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Estimate:
    """The Hill exponent of the `tail` largest eigenvalues of the Gram matrices, pooled.

    Args:
        gram: ``[P, n, n]``, float32 or float64, positive semidefinite, on one scale; their spectra are pooled
            (P = 1 except for convolutions).
        centre: ln(θ / mean eigenvalue), from the last call; default ln(1/2).
        tail: k in [2, P·n), the number of eigenvalues in the tail.
        baby, giant: q and p; K = (p+1)q moments. Another pass for a weak case uses 2p.
        product_dtype: of the factors of the products, ``bfloat16`` or ``float32``.
    """
    wide, size = gram.dtype, gram.shape[0] * gram.shape[1]
    mean = jnp.trace(jnp.sum(gram, 0)) / size
    mean = jnp.where(mean > 0, mean, 1)
    gram = gram / mean
    start = vary_like(jnp.asarray(DEFAULT_CENTRE if centre is None else centre, wide), gram)
    small = jnp.finfo(wide).eps

    def one_pass(carry: tuple) -> tuple:
        _, centre, _, _, _, giants, passes = carry
        mu = jnp.sum(
            jax.lax.map(
                lambda g: with_aligned(
                    lambda y, p: moments(y, baby, p, 2 * giant, product_dtype, gram.shape[-1]),
                    cayley(g, jnp.exp(centre)),
                    giants,
                ),
                gram,
            ),
            0,
        )
        used = (giants + 1) * baby
        h, z, density = hill_from_moments(mu, used, tail)
        other, _, _ = hill_from_moments(mu, 2 * used // 3, tail)
        excess, excess_other = 1 / jnp.maximum(h, small), 1 / jnp.maximum(other, small)
        error = jnp.abs(excess - excess_other)
        floor = excess * excess / (2 * jnp.maximum(density, small))
        resolved = error <= jnp.maximum(TOLERANCE * excess, floor)
        near = jnp.abs(z) < 1
        # Another pass must differ from this one.
        more = ~near | (~resolved & (giants < 2 * giant))
        giants = jnp.where(resolved, giants, 2 * giant)
        centre = jnp.maximum(centre + z, _LOWEST_CENTRE)
        return 1 + excess, centre, error, resolved & near, more, giants, passes + 1

    def again(carry: tuple) -> jax.Array:
        return carry[4] & (carry[6] < _PASSES)

    zero = 0 * start
    first = (
        1 + zero,
        start,
        zero,
        zero > 0,
        zero == 0,
        jnp.asarray(giant, jnp.int32) + zero.astype(jnp.int32),
        zero.astype(jnp.int32),
    )
    alpha, found, error, resolved, _, _, passes = jax.lax.while_loop(again, one_pass, first)
    largest = _largest(gram)
    usable = jnp.isfinite(alpha) & jnp.isfinite(found) & (largest > 0)
    centre = jnp.where(usable, found, DEFAULT_CENTRE)
    ratio = jnp.where(usable, jnp.exp(found) / jnp.where(largest > 0, largest, 1), 0)
    error = jnp.where(usable, error, 0)
    return Estimate(alpha, centre, error, resolved & usable, ratio, passes)


def _largest(gram: jax.Array) -> jax.Array:
    """A lower bound of the largest eigenvalue of ``[P, n, n]``, for a guard that needs its order of magnitude only."""
    v = jnp.ones(gram.shape[:2], gram.dtype) + jnp.arange(gram.shape[1], dtype=gram.dtype) % 3
    v = vary_like(v, gram)

    def body(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = carry
        v = v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), jnp.finfo(v.dtype).tiny)
        image = jnp.einsum("pij,pj->pi", gram, v)
        return image, jnp.linalg.norm(image, axis=-1)

    return jnp.max(jax.lax.fori_loop(0, _POWER_STEPS, body, (v, v[:, 0]))[1])
