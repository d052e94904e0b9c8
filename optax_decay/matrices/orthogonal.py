"""The orthogonal factor of a matrix, from matrix products alone or exactly, and its largest singular value.

Every real X = U S V^T has the orthogonal factor U V^T, the nearest matrix with orthonormal rows or columns. An odd
polynomial of X changes the singular values and keeps U and V. Iterating a polynomial that moves (0, 1] towards 1
therefore converges to the factor with products only. One Newton-Schulz step with the coefficients (a, b, c) is::

    A = X X^T,    X <- a X + (b A + c A A) X        (singular values: s <- a s + b s^3 + c s^5)

on the orientation of X with fewer rows than columns. References: Bernstein and Newhouse (arXiv 2409.20325) for the
use in optimizers; Jordan et al. 2024 ("Muon") for `MUON`; the classical, exact limit is `NEWTON_SCHULZ`.

**Differs from the released programs.** Works on any leading batch axes and in any dtype of the products. The sum of
squares is taken in float32 after scaling by the largest entry, so that tiny and huge inputs neither underflow nor
overflow. A zero matrix gives zeros.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.matrices.alignment import with_aligned
from optax_decay.matrices.whole import each_matrix
from optax_decay.parameters.arguments import check, one_of

MUON = ((3.4445, -4.7750, 2.0315),) * 5
NEWTON_SCHULZ = ((1.875, -1.25, 0.375),) * 12
SPLIT = 256  # rows from which Hermitian products are computed by quarters


def unit_scale(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides each matrix by the power of two s that puts its largest entry into [0.5, 1); returns ``(x / s, s)``.

    Division by a power of two is exact. Matrices that are zero or not finite become zeros with s = 1.
    """
    top = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(top) & (top >= jnp.finfo(x.dtype).tiny)
    exponent = jnp.frexp(jnp.where(usable, top, 0.5))[1]
    # In two halves: the power itself may be outside the range of the dtype where the quotient is not.
    half = exponent // 2
    scaled = jnp.ldexp(jnp.ldexp(x, -half), half - exponent)
    return jnp.where(usable, scaled, 0), jnp.ldexp(jnp.ones_like(top), exponent)


def adjoint(x: jax.Array) -> jax.Array:
    """The conjugate transpose of the last two axes."""
    x = jnp.swapaxes(x, -1, -2)
    return jnp.conj(x) if jnp.iscomplexobj(x) else x


def _gram(x: jax.Array, precision: Any) -> jax.Array:
    """``X X^H``. For large matrices, one quarter is the conjugate transpose of another and is not computed."""
    m = x.shape[-2]
    if m < SPLIT:
        return jnp.matmul(x, adjoint(x), precision=precision)
    upper, lower = x[..., : m // 2, :], x[..., m // 2 :, :]
    corner = jnp.matmul(upper, adjoint(lower), precision=precision)
    top = [jnp.matmul(upper, adjoint(upper), precision=precision), corner]
    bottom = [adjoint(corner), jnp.matmul(lower, adjoint(lower), precision=precision)]
    return jnp.concatenate(
        [jnp.concatenate(top, axis=-1), jnp.concatenate(bottom, axis=-1)], axis=-2
    )


def quintic_steps(x: jax.Array, coefficients: Any, *, precision: Any = None) -> jax.Array:
    """Newton-Schulz steps alone, on whole matrices whose singular values are at most 1.

    Compiles one step for any K (``lax.scan``). Because A and A A are Hermitian, an eighth (wide matrices) to a sixth
    (square matrices) of the arithmetic is saved.

    Args:
        x: ``[..., m, n]``, real or complex, of any orientation, in the dtype of the products.
        coefficients: ``[K, 3]``.
        precision: of the products, as in ``jnp.matmul``.

    Returns:
        Array like x.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Coefficients keep all their digits where products are rounded to 16 bits: a polynomial that is bounded with all
    # digits need not be bounded with three of them.
    table = jnp.asarray(coefficients, jnp.finfo(wide).dtype)
    flip = x.shape[-2] > x.shape[-1]

    def steps(y: jax.Array, table: jax.Array) -> jax.Array:
        return jax.lax.scan(step, y, table)[0]

    def step(y: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = abc[0], abc[1], abc[2]
        gram = _gram(y, precision)
        mixed = b * gram.astype(wide) + c * _gram(gram, precision).astype(wide)
        last = jnp.matmul(mixed.astype(y.dtype), y, precision=precision)
        return (a * y.astype(wide) + last.astype(wide)).astype(y.dtype), None

    y = with_aligned(steps, adjoint(x) if flip else x, table)
    return adjoint(y) if flip else y


def newton_schulz(
    x: jax.Array,
    coefficients: Any = MUON,
    *,
    dtype: Any = None,
    precision: Any = None,
    eps: float = 1e-7,
    mesh: Any = None,
    spec: Any = None,
) -> jax.Array:
    """An approximate orthogonal factor of every matrix, after dividing it by its Frobenius norm.

    Args:
        x: ``[..., m, n]``, real.
        coefficients: ``[K, 3]``, one (a, b, c) per step. Static sequences and arrays (traced too) are accepted.
        dtype: of the products, such as ``jnp.bfloat16``; default: that of x, at least float32.
        precision: of the products, as in ``jnp.matmul``.
        eps: added to the Frobenius norm, in units of x, so that a much smaller matrix is not enlarged to norm 1.
        mesh, spec: the mesh over which x is split and how, see `each_matrix`.

    Returns:
        ``[..., m, n]`` in the dtype of the products.

    Raises:
        ValueError: x has fewer than two dimensions, or the coefficients are not ``[K, 3]``.
    """
    table = coefficients if isinstance(coefficients, jax.Array) else np.asarray(coefficients, float)
    if table.ndim != 2 or table.shape[1] != 3 or not table.shape[0]:
        raise ValueError(
            f"coefficients of shape {table.shape} are not [K, 3]: one (a, b, c) per step."
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dtype = wide if dtype is None else dtype

    def iterate(stack: jax.Array) -> jax.Array:
        y, scale = unit_scale(stack.astype(wide))
        norm = jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True))
        y = (y / (norm + eps / scale)).astype(dtype)
        return quintic_steps(y, table, precision=precision)

    return each_matrix(iterate, x, mesh=mesh, spec=spec)


def polar(x: jax.Array, *, method: str = "svd", mesh: Any = None, spec: Any = None) -> jax.Array:
    """The exact orthogonal factor ``U V^T`` of every matrix ``[..., m, n]``.

    Args:
        x: real; at least float32 is used.
        method: ``"svd"``; or ``"eigh"``, through the Gram matrix of the smaller side: cheaper on accelerators, with
            an error that grows with the square of the condition number.
        mesh, spec: the mesh over which x is split and how, see `each_matrix`.

    Returns:
        ``[..., m, n]``. ``"svd"`` completes directions with a singular value of zero arbitrarily. ``"eigh"`` leaves
        them out; its rank tolerance is ``max(m, n)`` times machine epsilon of the largest eigenvalue.

    Raises:
        ValueError: an unknown method.
    """
    one_of("method", method, ("svd", "eigh"))
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(w: jax.Array) -> jax.Array:
        y, _ = unit_scale(w.astype(wide))
        if method == "svd":
            u, _, vt = jnp.linalg.svd(y, full_matrices=False)
            return jnp.matmul(u, vt, precision="highest")
        y = y.T if w.shape[0] > w.shape[1] else y
        values, vectors = jnp.linalg.eigh(jnp.matmul(y, y.T, precision="highest"))
        floor = max(w.shape) * jnp.finfo(wide).eps * values[-1]
        inverse = jnp.where(values > floor, jax.lax.rsqrt(jnp.maximum(values, floor)), 0)
        root = jnp.matmul(vectors * inverse, vectors.T, precision="highest")
        out = jnp.matmul(root, y, precision="highest")
        return out.T if w.shape[0] > w.shape[1] else out

    return each_matrix(lambda stack: jax.lax.map(one, stack), x, mesh=mesh, spec=spec)


def top_singular_vector(shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """A start vector for `top_singular_value`, ``[..., n]`` for matrices ``[..., m, n]``.

    The vector is fixed and has no structure: fractional parts of multiples of the golden ratio, centred, of unit
    length.
    """
    n = shape[-1]
    v = np.modf(0.5 + np.arange(1, n + 1) * (5**0.5 - 1) / 2)[0] - 0.5 + 1e-3
    v = v / np.sqrt(np.sum(v * v))
    return jnp.broadcast_to(jnp.asarray(v, dtype), (*shape[:-2], n))


def top_singular_value(
    x: jax.Array,
    vector: jax.Array | None = None,
    *,
    iterations: int = 4,
    exact_below: int = 0,
    mesh: Any = None,
    spec: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The largest singular value, by power iteration on ``X^T X`` from a carried vector.

    The result is a lower bound that rises with every iteration. Singular vectors of weights turn slowly, so a few
    iterations per training step, started from the vector of the last step, follow the largest singular value.

    Args:
        x: ``[..., m, n]``, real.
        vector: ``[..., n]``, the vector that the last call returned; None for `top_singular_vector`.
        iterations: products with ``X^T X``, at least 1.
        exact_below: matrices whose smaller side is below this are solved exactly, through the eigenvalues of their
            Gram matrix. Their vector is returned unchanged.
        mesh, spec: the mesh over which x is split and how, see `each_matrix`.

    Returns:
        ``([...], [..., n])``: the singular value and the right singular vector to carry. A zero matrix gives 0.

    Raises:
        ValueError: fewer than one iteration.
    """
    check("iterations", iterations, 1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    vector = top_singular_vector(x.shape, wide) if vector is None else vector

    def exact(stack: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(w: jax.Array) -> jax.Array:
            y, scale = unit_scale(w.astype(wide))
            y = y.T if w.shape[0] > w.shape[1] else y
            values = jnp.linalg.eigvalsh(jnp.matmul(y, y.T, precision="highest"))
            return jnp.sqrt(jnp.maximum(values[-1], 0)) * scale[0, 0]

        return jax.lax.map(one, stack), v

    def power(stack: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, scale = unit_scale(stack.astype(wide))

        def unit(a: jax.Array) -> jax.Array:
            length = jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True))
            return jnp.where(length > 0, a / jnp.where(length > 0, length, 1), 0)

        def body(_: Any, v: jax.Array) -> jax.Array:
            left = jnp.einsum("bmn,bn->bm", y, v, precision="highest")
            new = unit(jnp.einsum("bmn,bm->bn", y, left, precision="highest"))
            # A vector in the null space would stay there: keep the old one.
            return jnp.where(jnp.any(new != 0, axis=-1, keepdims=True), new, v)

        v = jax.lax.fori_loop(0, iterations, body, unit(v.astype(wide)))
        image = jnp.einsum("bmn,bn->bm", y, v, precision="highest")
        return jnp.sqrt(jnp.sum(image * image, axis=-1)) * scale[:, 0, 0], v

    small = min(x.shape[-2:]) < exact_below
    return each_matrix(exact if small else power, x, vector, mesh=mesh, spec=spec)
