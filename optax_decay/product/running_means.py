"""Bias correction of running means that start at 0, without cancellation.

With β the share that is kept per step (Adam's b1 and b2, `memory` elsewhere) and t completed steps, the present one
included, the mean of a constant x is (1 - βᵗ) x. Dividing by `share_seen` corrects for that.

Written as ``1 - β**t``, float32 loses five of its seven digits for β = 0.999 at t = 1. Here ``t · log β`` goes through
``expm1``, and β as ``1 - (1 - β)``, because a Python 1 - β is exact to float64.
"""

import jax
import jax.numpy as jnp

from optax_decay.product.per_matrix import Value


def _log_power(memory: Value, count: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    log = jnp.log1p(-jnp.asarray(1 - memory, dtype))
    # β = 0 has the logarithm -inf, and 0 · -inf is not a number.
    return count.astype(dtype) * jnp.maximum(log, jnp.finfo(dtype).min)


def power(memory: Value, count: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """βᵗ, in `dtype`; 1 at t = 0 for every β in [0, 1]."""
    return jnp.exp(_log_power(memory, count, dtype))


def share_seen(memory: Value, count: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """1 - βᵗ, in `dtype`; 0 at t = 0 for every β in [0, 1].

    Args:
        memory: β, a Python number or a traced one.
        count: t, an integer scalar (or array) of completed steps.
        dtype: float32 or float64.

    >>> import jax.numpy as jnp
    >>> share_seen(0.999, jnp.int32(1), jnp.float32).round(7)
    Array(0.001, dtype=float32)
    """
    return -jnp.expm1(_log_power(memory, count, dtype))
