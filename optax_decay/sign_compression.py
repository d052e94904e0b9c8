"""A mean over workers that sends one bit per number: the collective of 1-bit Adam (arXiv 2102.02888).

With x_n the vector of worker n of N, padded with zeros to P elements, e_n its worker error (P), E_n its server error
(P/N; worker n serves chunk n), and sgn(0) = +1::

    z_n = x_n + e_n          s_n = ‖z_n‖ / √P            e_n ← z_n − s_n sgn(z_n)
    all-to-all: the signs of chunk j of every z_n go to worker j, 8 to a byte; all-gather: the N scales s_n
    c_j = (1/N) Σ_n s_n sgn(z_n)[chunk j] + E_j      r_j = ‖c_j‖ / √(P/N)      E_j ← c_j − r_j sgn(c_j)
    all-gather: the signs of every c_j, 8 to a byte, and the N scales r_j
    result = concat_j r_j sgn(c_j)

The result is the same on every worker to the last bit, since all decode the same bytes. What one step leaves out stays
in e_n and E_j and is sent later: up to rounding, mean_n(x_n + e_n) + E = result + mean_n(new e_n) + new E.

Sent per worker: 2 · (N−1)/N · P/8 bytes of signs and 8 · (N−1) bytes of scales, against 2 · (N−1)/N · 4P of a float32
ring all-reduce.

**Differs from the released code** (DeepSpeed, ``compressed_allreduce``): a sign is x >= 0 everywhere, where one of its
packers tests the sign bit, so that −0.0 is sent as −1 but accounted for as +1. The padding counts as there: P is a
multiple of N · lcm(N, 8), the padded zeros take part in both norms and have errors of their own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...]


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes of the surrounding `shard_map` over which `x` differs; empty under ``check_vma=False``."""
    kind = jax.typeof(x)
    # Older and newer releases of JAX call it .vma.
    manual = getattr(kind, "manual_axis_type", None)
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())


def is_bound(axis: str) -> bool:
    """True inside a `shard_map` (or `vmap`) over this axis."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def tracks_varying(axis_name: AxisName) -> bool:
    """True if the surrounding `shard_map` runs with ``check_vma=True``, so that `varying_axes` can be relied on."""
    return bool(varying_axes(jax.lax.axis_index(axis_name)))


def local_params(params: Any, axis_name: AxisName) -> Any:
    """`params` marked as differing between workers, so that `jax.grad` leaves every worker its own gradient.

    Inside `shard_map` the gradient with respect to a replicated array is summed over the mesh before user code sees
    it: compressing it would save nothing, and it is N times the mean. Differentiate with respect to these instead, and
    hand the original params to ``tx.update``. Moves no data. Under ``check_vma=False`` nothing is summed and nothing
    changes.

    >>> def step(params, state, batch):  # inside jax.shard_map over "data"
    ...     grads = jax.grad(loss)(optax_decay.local_params(params, "data"), batch)
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    """
    axes = axis_tuple(axis_name)

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, params)


def padded_size(size: int, workers: int) -> int:
    """`size` rounded up to whole bytes in every chunk: a multiple of ``workers · lcm(workers, 8)``.

    >>> padded_size(6, 4), padded_size(65, 8)
    (32, 128)
    """
    block = workers * math.lcm(workers, 8)
    return -(-size // block) * block


def _scale(z: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(z * z) / z.size)


def _quantize(z: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signs of z, and what ``scale · sign`` leaves out."""
    positive = z >= 0
    return positive, z - jnp.where(positive, scale, -scale)


def sign_compressed_mean(
    x: jax.Array, worker_error: jax.Array, server_error: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean of `x` over the mesh axis, to one bit per element with error feedback; for use inside `shard_map`.

    Args:
        x: [size] float array, this worker's own.
        worker_error: [P], this worker's own, P = ``padded_size(size, N)``; zeros at the start.
        server_error: [P/N], this worker's own; zeros at the start.
        axis_name: mesh axis of the N workers, or a tuple of axes.

    Returns:
        The mean [size], equal on all workers, and the two new errors. One worker gets `x` back.
    """
    workers = jax.lax.axis_size(axis_name)
    if workers == 1:
        return jax.lax.pmean(x, axis_name), worker_error, server_error
    z = jnp.pad(x, (0, worker_error.size - x.size)) + worker_error
    scale = _scale(z)
    positive, worker_error = _quantize(z, scale)
    packed = jnp.packbits(positive).reshape(workers, -1)
    packed = jax.lax.all_to_all(packed, axis_name, 0, 0, tiled=True)
    shares = jax.lax.all_gather(scale, axis_name)[:, None] / workers
    signs = jnp.unpackbits(packed, axis=1).astype(bool)
    # A sum, not a dot: accelerators round the operands of a float32 dot to bfloat16.
    c = jnp.sum(jnp.where(signs, shares, -shares), axis=0) + server_error
    scale = _scale(c)
    positive, server_error = _quantize(c, scale)
    packed = jax.lax.all_gather(jnp.packbits(positive), axis_name, to="invarying")
    scales = jax.lax.all_gather(scale, axis_name, to="invarying")[:, None]
    mean = jnp.where(jnp.unpackbits(packed, axis=1).astype(bool), scales, -scales)
    return mean.reshape(-1)[: x.size], worker_error, server_error
