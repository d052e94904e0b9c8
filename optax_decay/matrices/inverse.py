r"""The inverse of a positive definite matrix, as one small loop of matrix products.

**Why.** XLA for TPUs writes a Cholesky factorisation and the triangular solves after it out, block by block. For a
matrix of 2048 rows this takes minutes to compile. The loop here takes seconds, for a matrix of any size, and does as
many operations.

**Equation.** With the Cholesky factor A = L Lᵀ, the rows of [A | 1] become those of [Lᵀ | L⁻¹], one block k of rows
after the other::

    [A | 1]_k ← L_kk⁻¹ [A | 1]_k,        [A | 1]_j ← [A | 1]_j - L_jk [A | 1]_k,   L_jk = A_jk L_kk⁻ᵀ,    j > k

and A⁻¹ = L⁻ᵀ L⁻¹ is the sum over k of the products of the finished blocks of L⁻¹. The inverse factor L_kk⁻¹ of the
block on the diagonal comes from the same equations, with blocks of one row.
"""

import jax
import jax.numpy as jnp

from optax_decay.matrices.whole import vary_like

BLOCK = 128  # rows


def inverse(a: jax.Array) -> jax.Array:
    """A⁻¹ of a symmetric positive definite ``[n, n]`` A; NaN where A is not positive definite."""
    n = a.shape[0]
    blocks = -(-n // BLOCK)
    # Behind A, an identity fills the last block.
    behind = blocks * BLOCK - n
    rest = jnp.diag((jnp.arange(n + behind) >= n).astype(a.dtype))
    a = jnp.pad(a, ((0, behind), (0, behind))) + rest
    result = vary_like(jnp.zeros_like(a), a)

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        both, result = carry
        both, rows = _eliminated(both, k, BLOCK)
        finished = rows[:, n + behind :]
        return both, result + _product(finished.T, finished)

    return jax.lax.fori_loop(0, blocks, step, (_beside_identity(a), result))[1][:n, :n]


def _inverse_factor(a: jax.Array) -> jax.Array:
    """L⁻¹, one row after the other."""
    both = jax.lax.fori_loop(
        0, len(a), lambda k, both: _eliminated(both, k, 1)[0], _beside_identity(a)
    )
    return both[:, len(a) :]


def _beside_identity(a: jax.Array) -> jax.Array:
    return jnp.concatenate([a, jnp.eye(len(a), dtype=a.dtype)], axis=1)


def _eliminated(both: jax.Array, k: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """``[A | 1]`` after step k, and the rows of block k, which has `size` rows."""
    n, start = len(both), k * size
    rows = jax.lax.dynamic_slice(both, (start, 0), (size, 2 * n))
    column = jax.lax.dynamic_slice(both, (0, start), (n, size))
    pivot = jax.lax.dynamic_slice(rows, (0, start), (size, size))
    factor = jax.lax.rsqrt(pivot) if size == 1 else _inverse_factor(pivot)
    rows = _product(factor, rows)
    below = jnp.where(jnp.arange(n)[:, None] >= start + size, column, 0)
    both = both - _product(_product(below, factor.T), rows)
    return jax.lax.dynamic_update_slice(both, rows, (start, 0)), rows


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    if a.shape[1] == 1:  # no sum: elementwise
        return a * b
    return jnp.matmul(a, b, precision="highest")
