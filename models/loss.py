"""The loss of a language model, computed from its last features without storing all logits at once.

    loss = Σ_n  logsumexp(z_n) − z_n[t_n],      z = x w,      ∂z_n = softmax(z_n) − onehot(t_n)

over the positions n whose target t_n is not padding. The logits of N positions and V tokens are the largest arrays of a
small model. On one device, the logits and their gradient are computed for one part of the positions at a time. On
several GPUs they are computed for all positions in one part.

GPUs round the logits to the dtype of x, because they spend most of the time of the loss reading and writing them.
logsumexp is computed in float32 from the rounded logits, and the gradient is that of the rounded logits. PyTorch's
autocast and MaxText round in the same place. Logits of float32 features, and `logits` itself, stay float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from models.products import aligned, gradients, on_cpu, padded, platform, product

CPU_BYTES = 2**23  # of logits in one part on CPUs: this fits into a processor's caches
BYTES = 2**30  # of logits in one part on other devices
LEAST = jnp.finfo(jnp.float32).min
GROUP = 8  # logits that a thread of a GPU reads at once: 16 bytes of bfloat16


def logits(x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
    """x w: float32 [B, T, V]."""
    B, T, D = x_BTD.shape
    return product(x_BTD.reshape(B * T, D), w_DV, jnp.float32).reshape(B, T, -1)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropy over tokens, in nats, and the number of tokens.

    Both are float32, whatever the dtype of the logits. A negative target is padding and does not count.
    """
    logits_BTV, real_BT = logits_BTV.astype(jnp.float32), targets_BT >= 0
    chosen_BT = jnp.maximum(targets_BT, 0)[..., None]
    losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    losses_BT -= jnp.take_along_axis(logits_BTV, chosen_BT, axis=-1)[..., 0]
    return jnp.sum(jnp.where(real_BT, losses_BT, 0)), jnp.sum(real_BT, dtype=jnp.float32)


@jax.named_scope("loss")
def nats(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `cross_entropy` of the logits x w.

    Args:
      x_BTD: last features.
      w_DV: matrix of the head.
      targets_BT: integers below V; negative targets are padding.
    """
    # On several devices every part would need its own sum over the devices.
    split = jax.sharding.get_abstract_mesh().size > 1
    count = 1 if split else part_count(targets_BT.size, w_DV.shape[1], stored(x_BTD).itemsize)
    if count == 1 and platform() != "gpu":
        return cross_entropy(logits(x_BTD, w_DV), targets_BT)
    x_ND, targets_N = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    return _in_parts(count, x_ND, w_DV, targets_N), jnp.sum(targets_N >= 0, dtype=jnp.float32)


def stored(x: jax.Array) -> jnp.dtype:
    """The dtype in which the logits of the features `x` are kept."""
    return x.dtype if platform() == "gpu" else jnp.dtype(jnp.float32)


def part_count(positions: int, vocabulary: int, itemsize: int = 4) -> int:
    """The smallest number of equal parts such that the logits of one part are not too many."""
    least = -(-itemsize * positions * vocabulary // (CPU_BYTES if on_cpu() else BYTES))
    return next(n for n in range(min(least, positions), positions + 1) if positions % n == 0)


def logsumexp_and_target(
    logits_nV: jax.Array, targets_n: jax.Array, hit_nV: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """logsumexp(z) and z[t] of every row, float32; logits behind the first `tokens` of a row are padding.

    On GPUs, reading memory takes most of the time, and XLA would read the logits three times. There logsumexp takes one
    pass, and z[t] is gathered.
    """
    if platform() != "gpu":
        chosen_nV = jnp.where(hit_nV, logits_nV, 0)
        chosen_n = jnp.sum(chosen_nV, axis=-1, dtype=jnp.float32)
        return jax.nn.logsumexp(only(logits_nV, tokens), axis=-1), chosen_n
    chosen_n1 = jnp.take_along_axis(logits_nV, targets_n[:, None], axis=1)
    return _logsumexp(only(logits_nV, tokens)), chosen_n1[:, 0].astype(jnp.float32)


def only(logits_nV: jax.Array, tokens: int) -> jax.Array:
    """The logits in float32, with the least number behind the first `tokens`, so that padding has no probability."""
    logits_nV = logits_nV.astype(jnp.float32)
    if logits_nV.shape[1] == tokens:
        return logits_nV
    return jnp.where(jnp.arange(logits_nV.shape[1]) < tokens, logits_nV, LEAST)


@jax.custom_jvp
def _logsumexp(logits_nV: jax.Array) -> jax.Array:
    """m + ln s, with the maximum m and s = Σ exp(z − m) computed in one pass.

    Where a new maximum is found, the sum so far is scaled. To scale it after every logit would take longer than to read
    them: two exponentials each. So neighbouring logits are first summed in groups, below their own maximum.
    """

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> Any:
        m = jnp.maximum(a[0], b[0])
        return m, a[1] * jnp.exp(a[0] - m) + b[1] * jnp.exp(b[0] - m)

    group = _group(logits_nV.shape[1])
    logits_nvg = logits_nV.reshape(len(logits_nV), -1, group)
    members = [logits_nvg[..., g] for g in range(group)]
    m_nv = functools.reduce(jnp.maximum, members, LEAST)
    s_nv = sum(jnp.exp(z_nv - m_nv) for z_nv in members)
    m_n, s_n = jax.lax.reduce((m_nv, s_nv), (LEAST, jnp.float32(0)), join, (1,))
    return m_n + jnp.log(s_n)


def _group(vocabulary: int) -> int:
    """The size of the groups; where several devices may share a row, all members of a group are on one of them."""
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    return math.gcd(vocabulary // devices, GROUP) if vocabulary % devices == 0 else 1


@_logsumexp.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (logits_nV,), (change_nV,) = primals, tangents
    top_n = _logsumexp(logits_nV)
    return top_n, jnp.sum(jnp.exp(logits_nV - top_n[:, None]) * change_nV, axis=-1)


def _zeros(shape: tuple[int, ...], x: jax.Array) -> jax.Array:
    """The start of a sum, float32. Inside `jax.shard_map` it varies over the same mesh axes as `x`."""
    return jnp.zeros_like(x, jnp.float32, shape=shape)


def _split(count: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.reshape(count, -1, *x.shape[1:]) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(count: int, x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array) -> jax.Array:
    def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_nD, targets_n = part
        return total + cross_entropy(product(x_nD, w_DV, jnp.float32), targets_n)[0], None

    return jax.lax.scan(add, _zeros((), x_ND), _split(count, x_ND, targets_N))[0]


def _forward(
    count: int, x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, Any]:
    # The vocabulary is padded once, in front of the loop; a padded token has no probability.
    V = w_DV.shape[1]
    rounded_DV = padded(w_DV.astype(x_ND.dtype), aligned(V))

    def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> Any:
        total, dw_DV = sums
        x_nD, targets_n = part
        token_V = jnp.arange(rounded_DV.shape[1])
        logits_nV = product(x_nD, rounded_DV, stored(x_ND))
        hit_nV = token_V == targets_n[:, None]
        top_n, target_n = logsumexp_and_target(logits_nV, targets_n, hit_nV, V)
        real_n = targets_n >= 0
        dz_nV = jnp.exp(only(logits_nV, V) - top_n[:, None]) - hit_nV
        dz_nV = jnp.where(real_n[:, None], dz_nV, 0)
        dx_nD, more_DV = gradients(x_nD, rounded_DV, dz_nV)
        total += jnp.sum(jnp.where(real_n, top_n - target_n, 0))
        return (total, dw_DV + more_DV), dx_nD.astype(x_ND.dtype)

    zero = (_zeros((), x_ND), _zeros(rounded_DV.shape, x_ND))
    (total, dw_DV), dx_cnD = jax.lax.scan(add, zero, _split(count, x_ND, targets_N))
    return total, (dx_cnD.reshape(x_ND.shape), dw_DV[:, :V].astype(w_DV.dtype))


def _backward(count: int, kept: tuple[jax.Array, jax.Array], scale: jax.Array) -> Any:
    del count
    return *((scale * d).astype(d.dtype) for d in kept), None


_in_parts.defvjp(_forward, _backward)
