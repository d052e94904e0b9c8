"""Adding updates to weights that are stored in 16 bits, so that decay acts.

A step of decay multiplies a weight by 1 - ηλ. bfloat16 keeps 8 significant bits, so for ηλ < 2⁻⁹ the product rounds
back to the weight, every time: at η = 1e-3 and λ = 0.1 nothing decays at all, however the sum is computed, because
the loss happens when it is stored. Two remedies, both in one fused pass:

* ``apply_updates(params, updates, key=key)`` rounds stochastically: with x the float32 sum and a <= x <= b its bfloat16
  neighbours, it stores b with probability (x-a)/(b-a). The expectation is exact; no memory.
* ``kahan_apply_updates(params, updates, lost)`` keeps what rounding lost in a second bfloat16 tree and adds it back in
  the next step: deterministic, about 16 significant bits, 2 bytes per weight.

Float32 weights are better still, at 2 more bytes than Kahan's. In all three the updates should be float32: cast
gradients before the chain, or a bfloat16 update loses the decay before it gets here.

Reference: stochastic rounding of weights goes back to Gupta et al., arXiv 1502.02551; for both on bfloat16 weights see
Zamirai et al., arXiv 2010.06192.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down at random so that the expectation is `x`.

    Args:
        x: float32 array of any shape.
        key: PRNG key.

    Returns:
        bfloat16 array. Values that bfloat16 holds exactly, infinities and NaN stay what they are.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # Magnitudes are ordered like their bit patterns: adding noise below the cut carries with the right probability.
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(
    params: optax.Params, updates: optax.Updates, *, key: jax.Array | None = None
) -> Any:
    """``optax.apply_updates`` that rounds bfloat16 weights stochastically.

    Args:
        params: tree of weights. Leaves that are not bfloat16 are updated as optax does.
        updates: tree of the same structure; None leaves keep their weight.
        key: PRNG key, a new one each step, such as ``jax.random.fold_in(key, step)``. Devices that hold the same
            weight need the same key. May be left out when no weight is bfloat16.

    Raises:
        ValueError: a bfloat16 weight without a key, or a float16 weight (use `kahan_apply_updates`).
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    deltas = treedef.flatten_up_to(updates)
    new = []
    for index, (w, u) in enumerate(zip(leaves, deltas)):
        if w is None or u is None:
            new.append(w)
        elif w.dtype == jnp.float16:
            raise ValueError(
                "stochastic rounding is for bfloat16 weights; use kahan_apply_updates for float16."
            )
        elif w.dtype == jnp.bfloat16:
            if key is None:
                raise ValueError(
                    "bfloat16 weights are rounded at random: pass key=..., a new one each step."
                )
            total = w.astype(jnp.float32) + u.astype(jnp.float32)
            new.append(round_stochastically(total, jax.random.fold_in(key, index)))
        else:
            new.append(optax.apply_updates(w, u))
    return jax.tree.unflatten(treedef, new)


def kahan_init(params: optax.Params) -> Any:
    """Zeros like the 16-bit leaves of `params`: nothing is lost yet. Other leaves become scalars that stay 0."""
    return jax.tree.map(
        lambda w: jnp.zeros_like(w) if jnp.finfo(w.dtype).bits == 16 else jnp.zeros([], w.dtype),
        params,
    )


def kahan_apply_updates(
    params: optax.Params, updates: optax.Updates, lost: optax.Params
) -> tuple[Any, Any]:
    """Adds updates to 16-bit weights and remembers what rounding lost.

    With w the weight, c what was lost so far and u the update, all in float32: ``x = w + c + u``, ``w ← round(x)``,
    ``c ← round(x - w)``.

    Args:
        params: tree of weights.
        updates: tree of the same structure; None leaves keep their weight.
        lost: from `kahan_init` or the previous step.

    Returns:
        The new weights and the new `lost`, with unchanged dtypes.
    """

    def one(w: jax.Array | None, c: jax.Array, u: jax.Array | None) -> tuple[Any, Any]:
        if w is None or u is None:
            return w, c
        if jnp.finfo(w.dtype).bits != 16:
            return optax.apply_updates(w, u), c
        x = w.astype(jnp.float32) + c.astype(jnp.float32) + u.astype(jnp.float32)
        # reduce_precision is a rounding that XLA may not remove, unlike a cast and its inverse.
        info = jnp.finfo(w.dtype)
        stored = jax.lax.reduce_precision(x, info.nexp, info.nmant)
        return stored.astype(w.dtype), (x - stored).astype(w.dtype)

    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    pairs = [
        one(*leaf)
        for leaf in zip(leaves, treedef.flatten_up_to(lost), treedef.flatten_up_to(updates))
    ]
    return (
        jax.tree.unflatten(treedef, [pair[0] for pair in pairs]),
        jax.tree.unflatten(treedef, [pair[1] for pair in pairs]),
    )
