"""The effect of a decay in its last step, kept in its state with ``metrics=True``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters import axes as axes_lib
from optax_decay.product.per_matrix import Value, accumulator_dtype


class Metrics(NamedTuple):
    """The effect of a decay on one parameter in the last step; float32 of shape ``signature.batch_shape``.

    Attributes:
        rate: λ(t)·m, dimensionless, before the learning rate.
        decay_rms: RMS of λ·m·ψ(w), after the cautious gate.
        update_rms: RMS of the incoming update.
        weight_rms: RMS of the weights before the step.
        beyond: fraction of weights with ``|w| > δ``; 0 for pulls without a threshold.
        radial: ⟨u, w⟩/(‖u‖ ‖w‖), the share of the incoming update u that lies along the weights: what a fixed norm
            takes away. 0 where one of them is zero.
    """

    rate: jax.Array
    decay_rms: jax.Array
    update_rms: jax.Array
    weight_rms: jax.Array
    beyond: jax.Array
    radial: jax.Array


def no_metrics(signature: axes_lib.Signature, dtype: jax.typing.DTypeLike) -> Metrics:
    """Zeros, before the first update: six arrays, because a donated buffer must not appear twice."""
    shape, real = signature.batch_shape, accumulator_dtype(dtype)
    return Metrics(*(jnp.zeros(shape, real) for _ in Metrics._fields))


def measure(
    signature: axes_lib.Signature,
    coefficient: Value,
    term: jax.Array,
    update: jax.Array,
    w: jax.Array,
    delta: Value | None,
) -> Metrics:
    """`Metrics` of one leaf; inside ``shard_map`` they describe the local shard.

    Args:
        signature: of the leaf.
        coefficient: λ·m, a number or an array that broadcasts against the leaf.
        term: λ·m·ψ(w) after the gate, like w.
        update: the incoming update.
        w: weights before the step.
        delta: threshold that broadcasts against w, or None.
    """
    dtype = accumulator_dtype(w.dtype)
    wide = jnp.promote_types(w.dtype, jnp.float32)

    def rms(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x).astype(dtype)), axis=signature.reduced))

    rate = jnp.asarray(coefficient, dtype)
    if rate.ndim:
        rate = jnp.squeeze(rate, signature.reduced)
    beyond = jnp.zeros([], dtype)
    if delta is not None:
        beyond = jnp.mean((jnp.abs(w) > delta).astype(dtype), axis=signature.reduced)
    shape = signature.batch_shape
    return Metrics(
        jnp.broadcast_to(rate, shape),
        rms(term),
        rms(update),
        rms(w),
        jnp.broadcast_to(beyond, shape),
        _cosine(update.astype(wide), w.astype(wide), signature),
    )


def _cosine(u: jax.Array, w: jax.Array, signature: axes_lib.Signature) -> jax.Array:
    """⟨u, w⟩/(‖u‖ ‖w‖) of every matrix, real; 0 where one of them is zero."""

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(jnp.real(x * jnp.conj(y)), axis=signature.reduced)

    size = jnp.sqrt(dot(u, u)) * jnp.sqrt(dot(w, w))
    return dot(u, w) / jnp.where(size > 0, size, 1)
