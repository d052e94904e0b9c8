"""Adam as the matrix optimizers apply it to parameters that are not matrices.

    m ← b1 m + (1-b1) g,   v ← b2 v + (1-b2) |g|²,   u = sqrt(1-b2^t)/(1-b1^t) · m / (sqrt(v) + eps)

eps is added before the bias correction, as in the released code of Conda and ROOT (and of transformers' AdamW): it
equals ``eps / sqrt(1-b2^t)`` in the convention of ``optax.adam``, ten times as much at t = 1 with b2 = 0.99.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def accumulator_like(x: Any, real: bool = False) -> jax.Array:
    """Zeros of the shape of `x` in float32, or its own dtype if that is wider; `real` drops the imaginary part."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.zeros_like(x, dtype=jnp.finfo(dtype).dtype if real else dtype)


def accumulated(b: Any, count: jax.Array) -> jax.Array:
    """``1 - b^t``: the weight that an average with decay b has gathered after t steps.

    Written so that b = 0.999 does not lose five of float32's seven digits at t = 1.
    """
    static = isinstance(b, int | float)
    log = (math.log(b) if b > 0 else -math.inf) if static else jnp.log(b)
    return -jnp.expm1(count * log)


def bias_correction(b1: Any, b2: Any, count: jax.Array) -> jax.Array:
    """``sqrt(1-b2^t) / (1-b1^t)`` for t completed steps, the present one included."""
    return jnp.sqrt(accumulated(b2, count)) / accumulated(b1, count)


def moments(
    g: jax.Array, m: jax.Array, v: jax.Array, b1: Any, b2: Any
) -> tuple[jax.Array, jax.Array]:
    """The new averages of g and |g|², in the dtypes of the old ones."""
    square = jnp.square(jnp.abs(g)).astype(v.dtype)
    m = (b1 * m + (1 - b1) * g).astype(m.dtype)
    return m, (b2 * v + (1 - b2) * square).astype(v.dtype)
