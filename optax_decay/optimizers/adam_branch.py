"""The Adam branch of the matrix optimizers: how Conda and ROOT update parameters that are not hidden matrices.

    m ← b1 m + (1-b1) g,   v ← b2 v + (1-b2) |g|²,   u = sqrt(1-b2^t)/(1-b1^t) · m / (sqrt(v) + eps)

eps is added before the bias correction, as in the released code of Conda and ROOT (and in transformers' AdamW). It
equals ``eps / sqrt(1-b2^t)`` in the convention of ``optax.adam``: ten times as much at t = 1 with b2 = 0.99.
"""

import jax
import jax.numpy as jnp

from optax_decay.product.running_means import share_seen


def accumulator_like(x: jax.Array, real: bool = False) -> jax.Array:
    """Zeros of the shape of `x` in float32, or in its own dtype if that is wider; `real` drops the imaginary part."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.zeros_like(x, dtype=jnp.finfo(dtype).dtype if real else dtype)


def bias_correction(b1: float | jax.Array, b2: float | jax.Array, count: jax.Array) -> jax.Array:
    """``sqrt(1-b2^t) / (1-b1^t)`` for t completed steps, the present one included."""
    dtype = jnp.result_type(float)
    return jnp.sqrt(share_seen(b2, count, dtype)) / share_seen(b1, count, dtype)


def new_moments(
    g: jax.Array, m: jax.Array, v: jax.Array, b1: float | jax.Array, b2: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The new running means of g and |g|², in the dtypes of the old ones."""
    square = jnp.square(jnp.abs(g)).astype(v.dtype)
    m = (b1 * m + (1 - b1) * g).astype(m.dtype)
    return m, (b2 * v + (1 - b2) * square).astype(v.dtype)


def step(
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    correction: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The direction u and the new moments of one parameter, for g in the dtype of m and `correction` of this step."""
    m, v = new_moments(g, m, v, b1, b2)
    return jnp.asarray(correction, v.dtype) * m / (jnp.sqrt(v) + eps), m, v
