"""The spectrum of a weight matrix: the eigenvalues of its Gram matrix. Functions of arrays ``[..., m, n]``.

The spectrum of W is that of ``W W^T`` on the smaller side: min(m, n) eigenvalues λ, the squares of the singular values,
in units of weight². Three methods compute it:

========= ==================================================================================== ===================
method    algorithm                                                                            float32
========= ==================================================================================== ===================
exact     Gram matrix at highest precision, tridiagonal form, bisection for the eigenvalues    exact to 1e-5
          asked for (CPU, GPU); ``eigh`` on TPU
eigh      Gram matrix at highest precision, ``eigh``                                           exact to 1e-5
svd       singular values of W itself: the only one that is right far below λ_max · 1e-5       exact to 1e-6
========= ==================================================================================== ===================

A Gram matrix in float32 squares the condition number: eigenvalues have an error of ε·λ_max. The tail exponent looks at
the upper half of the spectrum only, so this matters where the median is below 1e-5 λ_max; such results are flagged.

The matrices of a stack are worked on one after the other (``lax.map``). Batching them would hold the workspace of all
of them in memory for the whole step, and would not be faster.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.matrices.alignment import with_aligned
from optax_decay.matrices.orthogonal import unit_scale
from optax_decay.matrices.whole import each_matrix
from optax_decay.parameters.arguments import one_of

METHODS = ("exact", "eigh", "svd")


def gram(w: jax.Array) -> jax.Array:
    """The Gram matrix of the smaller side of ``[m, n]``, at highest precision."""
    equation = "im,jm->ij" if w.shape[0] <= w.shape[1] else "mi,mj->ij"
    return with_aligned(lambda w: jnp.einsum(equation, w, w, precision="highest"), w)


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


def unit_eigenvalues(w: jax.Array, largest: int, method: str) -> jax.Array:
    """The `largest` largest eigenvalues of pooled matrices ``[P, m, n]``, ascending."""
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


def scale_together(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pooled matrices divided by a common power of two, in at least float32, and that power."""
    wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    flat, scale = unit_scale(wide.reshape(1, -1, wide.shape[-1]))
    return flat.reshape(wide.shape), scale[0, 0, 0]


def eigenvalues(
    x: jax.Array,
    *,
    largest: int | None = None,
    method: str = "exact",
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    spec: Any = None,
) -> jax.Array:
    """The squared singular values of every matrix, ascending.

    Args:
        x: ``[..., m, n]``, real.
        largest: how many eigenvalues to return, counted from the largest; default: all min(m, n).
        method: ``"exact"``, ``"eigh"`` or ``"svd"``.
        mesh, spec: the mesh over which x is split and how, as in `each_matrix` of ``optax_decay.matrices.whole``.

    Returns:
        ``[..., largest]``, at least float32. Zeros for a matrix that is not finite.

    Raises:
        ValueError: an unknown method, or `largest` outside [1, min(m, n)].
    """
    one_of("method", method, METHODS)
    count = min(x.shape[-2:])
    largest = count if largest is None else largest
    if not 1 <= largest <= count:
        raise ValueError(
            f"largest={largest} is outside [1, {count}], the smaller side of {x.shape}."
        )

    def one(w: jax.Array) -> jax.Array:
        scaled, scale = scale_together(w[None])
        return unit_eigenvalues(scaled, largest, method) * scale * scale

    return each_matrix(lambda stack: jax.lax.map(one, stack), x, mesh=mesh, spec=spec)
