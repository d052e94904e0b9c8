"""A mean over workers that sends one bit per number: the collective of 1-bit Adam (arXiv 2102.02888).

With x_n the vector of worker n of N, padded with zeros to P elements, e_n its worker error (P), E_n its server error
(P/N; worker n serves chunk n), and sgn(0) = +1::

    z_n = x_n + e_n          s_n = ‖z_n‖ / √P            e_n ← z_n − s_n sgn(z_n)
    all-to-all: the signs of chunk j of every z_n go to worker j, 8 to a byte; all-gather: the N scales s_n
    c_j = (1/N) Σ_n s_n sgn(z_n)[chunk j] + E_j      r_j = ‖c_j‖ / √(P/N)      E_j ← c_j − r_j sgn(c_j)
    all-gather: the signs of every c_j, 8 to a byte, and the N scales r_j
    result = concat_j r_j sgn(c_j)

The result is the same on every worker to the last bit, because all workers decode the same bytes. What one step does
not send stays in e_n and E_j and is sent later: up to rounding,
mean_n(x_n + e_n) + E = result + mean_n(new e_n) + new E.

Sent per worker: 2 · (N−1)/N · P/8 bytes of signs and 8 · (N−1) bytes of scales, against 2 · (N−1)/N · 4P of a float32
ring all-reduce.

**Differs from the released code** (DeepSpeed, ``compressed_allreduce``): here the sign is + wherever x >= 0, whereas
one of its packers tests the sign bit, so that it sends −0.0 as −1 but accounts for it as +1. The padding is the same:
P is a multiple of N · lcm(N, 8), and the padded zeros take part in both norms and have errors of their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.parameters.meshes import gather_alike, mark_varying, varying_axes

AxisName = str | tuple[str, ...]


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    """The mesh axes that the name or names stand for."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


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
    it: compressing it would save nothing, and it is N times the mean. Differentiate with respect to the result of this
    function instead, and give the original params to ``tx.update``. No data moves. Under ``check_vma=False`` gradients
    are not summed, and this function changes nothing.

    Args:
        params: a tree of arrays.
        axis_name: mesh axis of the workers, or a tuple of axes.

    >>> def step(params, state, batch):  # inside jax.shard_map over "data"
    ...     grads = jax.grad(loss)(optax_decay.one_bit.local_params(params, "data"), batch)
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    """
    axes = axis_tuple(axis_name)

    def mark(x: jax.Array) -> jax.Array:
        return mark_varying(x, axes)

    return jax.tree.map(mark, params)


def padded_size(size: int, workers: int) -> int:
    """`size` rounded up to whole bytes in every chunk: a multiple of ``workers · lcm(workers, 8)``.

    >>> padded_size(6, 4), padded_size(65, 8)
    (32, 128)
    """
    block = workers * math.lcm(workers, 8)
    return -(-size // block) * block


def encode(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The signs of each row of `z` [S, P], 8 to a byte with the first in the highest bit; scales; and errors."""
    scale = jnp.sqrt(jnp.sum(z * z, axis=-1) / z.shape[-1])
    positive = z >= 0
    signed = jnp.where(positive, scale[..., None], -scale[..., None])
    return jnp.packbits(positive, axis=-1), scale, z - signed


def decode(packed: jax.Array, scale: jax.Array) -> jax.Array:
    """``scale · sign``: uint8 [..., P/8] and scales [...] to [..., P]."""
    signs = jnp.unpackbits(packed, axis=-1).astype(bool)
    return jnp.where(signs, scale[..., None], -scale[..., None])


def decode_sum(packed: jax.Array, scales: jax.Array) -> jax.Array:
    """``Σ_n scales[n] · sign(packed[n])``: uint8 [N, S, P/8] and [N, S] to [S, P]."""

    def add(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + decode(*row), None

    # Row by row: a dot would round its operands on accelerators, and a reduction over the first axis is 50 times
    # slower on CPUs.
    total, _ = jax.lax.scan(add, decode(packed[0], scales[0]), (packed[1:], scales[1:]), unroll=8)
    return total


def sign_compressed_means(
    xs: Sequence[jax.Array],
    worker_errors: Sequence[jax.Array],
    server_errors: Sequence[jax.Array],
    axis_name: AxisName,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Means over a mesh axis, to one bit per element with error feedback; for use inside `shard_map`.

    Every row of every array is a vector with scales of its own. All rows share one exchange: one all-to-all and one
    all-gather of bytes, and two all-gathers of scales, however many vectors there are.

    Args:
        xs: [rows_i, size_i] float arrays, this worker's own.
        worker_errors: [rows_i, P_i], this worker's own, P_i = ``padded_size(size_i, N)``; zeros at the start.
        server_errors: [rows_i, P_i/N], this worker's own; zeros at the start.
        axis_name: mesh axis of the N workers, or a tuple of axes.

    Returns:
        The means [rows_i, size_i], equal on all workers, and the new errors of workers and servers. With one worker the
        means are `xs`.
    """
    workers = jax.lax.axis_size(axis_name)
    if workers == 1:
        return jax.lax.pmean(list(xs), axis_name), list(worker_errors), list(server_errors)
    bytes_ends = np.cumsum([e.size // 8 for e in server_errors])[:-1]
    scale_ends = np.cumsum([e.shape[0] for e in server_errors])[:-1]

    def received(packed: jax.Array, scales: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Splits [N, bytes] and [N, rows] of all arrays into [N, rows_i, bytes_i] and [N, rows_i] of each."""
        parts = jnp.split(packed, bytes_ends, axis=1)
        rows = jnp.split(scales, scale_ends, axis=1)
        return [(p.reshape(*s.shape, -1), s) for p, s in zip(parts, rows)]

    coded = []
    for x, error in zip(xs, worker_errors):
        coded.append(encode(jnp.pad(x, ((0, 0), (0, error.shape[1] - x.shape[1]))) + error))
    # [rows, N, bytes of a chunk] to one line per receiver.
    lines = [signs.reshape(len(signs), workers, -1).swapaxes(0, 1) for signs, _, _ in coded]
    packed = jnp.concatenate([line.reshape(workers, -1) for line in lines], axis=1)
    packed = jax.lax.all_to_all(packed, axis_name, 0, 0, tiled=True)
    scales = jax.lax.all_gather(jnp.concatenate([s for _, s, _ in coded]), axis_name) / workers
    recoded = []
    for (signs, scale), error in zip(received(packed, scales), server_errors):
        recoded.append(encode(decode_sum(signs, scale.astype(error.dtype)) + error))
    packed = jnp.concatenate([signs.reshape(-1) for signs, _, _ in recoded])
    # Under jax.vmap, which does not track what varies, jax supports only the plain form.
    gather = gather_alike if tracks_varying(axis_name) else jax.lax.all_gather
    packed = gather(packed, axis_name)
    scales = gather(jnp.concatenate([s for _, s, _ in recoded]), axis_name)
    means = []
    for (signs, scale), x in zip(received(packed, scales), xs):
        whole = decode(signs.swapaxes(0, 1), scale.astype(x.dtype).swapaxes(0, 1))
        means.append(whole.reshape(len(x), -1)[:, : x.shape[1]])
    return means, [e for _, _, e in coded], [e for _, _, e in recoded]
