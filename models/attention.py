"""Self-attention: one function that every model uses, with one implementation per kind of device."""

import functools

import jax
import jax.numpy as jnp

from models.products import aligned, on_cpu, padded, product

# On CPUs, causal attention works on this many blocks of positions, one after the other. A block skips the keys behind
# it, and the backward pass recomputes its scores instead of keeping them.
CPU_BLOCKS = 4


def attention(
    query_BTHE: jax.Array,
    key_BTKE: jax.Array,
    value_BTKE: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention of every position to itself and the positions before it, or to all positions.

    Each group of H/K neighbouring query heads shares one key and value head (grouped-query attention,
    arXiv 2305.13245). K = H is multi-head attention.

    Args:
      query_BTHE: queries, B sequences of T positions, H heads of width E.
      key_BTKE: keys, K heads, where K divides H.
      value_BTKE: values, shaped like the keys.
      scale: factor of the products of queries and keys, before the softmax.
      causal: whether a position attends only to itself and the positions before it.
      implementation: "xla" runs everywhere, with the softmax in float32. "cudnn" is the fused kernel of NVIDIA GPUs; it
        takes 16-bit numbers only and never stores the T x T scores. It gets heads padded to a multiple of 8 features.

    Returns:
      [B, T, H, E] in the dtype of the queries.
    """
    if implementation == "cudnn":
        E = query_BTHE.shape[-1]
        arrays = [padded(x, aligned(E)) for x in (query_BTHE, key_BTKE, value_BTKE)]
        return jax.nn.dot_product_attention(
            *arrays, scale=scale, is_causal=causal, implementation="cudnn"
        )[..., :E]
    # Heads stand before positions because products with leading batch axes are twice as fast on CPUs.
    B, T, H, E = query_BTHE.shape
    K = key_BTKE.shape[2]
    query_BKGTE = query_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    key_BKSE, value_BKSE = key_BTKE.transpose(0, 2, 1, 3), value_BTKE.transpose(0, 2, 1, 3)
    blocks = CPU_BLOCKS if causal and on_cpu() and T % CPU_BLOCKS == 0 else 1
    size = T // blocks
    mix = functools.partial(_mix, scale, causal)
    if blocks > 1:
        mix = jax.checkpoint(mix)
    mixed = [
        mix(query_BKGTE[..., end - size : end, :], key_BKSE[..., :end, :], value_BKSE[..., :end, :])
        for end in range(size, T + 1, size)
    ]
    mixed_BKGTE = jnp.concatenate(mixed, axis=-2) if blocks > 1 else mixed[0]
    return mixed_BKGTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)


def _mix(
    scale: float,
    causal: bool,
    query_BKGTE: jax.Array,
    key_BKSE: jax.Array,
    value_BKSE: jax.Array,
) -> jax.Array:
    """Attention of the last T of S positions to all S positions: [B, K, G, T, E]."""
    B, K, G, T, E = query_BKGTE.shape
    S = key_BKSE.shape[-2]
    flat = query_BKGTE.reshape(B, K, G * T, E)
    scores_BKGTS = scale * product(flat, key_BKSE.mT, jnp.float32).reshape(B, K, G, T, S)
    if causal:
        causal_TS = jnp.tril(jnp.ones((T, S), bool), S - T)
        scores_BKGTS = jnp.where(causal_TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(value_BKSE.dtype)
    return product(weights_BKGTS.reshape(B, K, G * T, S), value_BKSE).reshape(B, K, G, T, E)
