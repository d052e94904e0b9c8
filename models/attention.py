"""Causal self-attention, in one place so that faster kernels have one door to come in by."""

import jax
import jax.numpy as jnp


def attention(
    query_BTHE: jax.Array,
    key_BTKE: jax.Array,
    value_BTKE: jax.Array,
    *,
    scale: float,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention of every position to itself and the positions before it.

    Each group of H/K neighbouring query heads shares one key and value head (grouped queries,
    arXiv 2305.13245; K = H is multi-head attention).

    Args:
      query_BTHE: queries, B sequences of T positions, H heads of width E.
      key_BTKE: keys, K heads, where K divides H.
      value_BTKE: values, shaped like the keys.
      scale: what the products of queries and keys are multiplied by before the softmax.
      implementation: "xla" runs everywhere, with the softmax in float32; "cudnn" is the fused
        kernel of NVIDIA GPUs, which takes 16-bit numbers only and never holds the T x T scores.

    Returns:
      [B, T, H, E] in the type of the queries.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query_BTHE, key_BTKE, value_BTKE, scale=scale, is_causal=True, implementation="cudnn"
        )
    B, T, H, E = query_BTHE.shape
    K = key_BTKE.shape[2]
    query_BTKGE = query_BTHE.reshape(B, T, K, H // K, E) * scale
    scores_BKGTS = jnp.einsum(
        "BTKGE,BSKE->BKGTS", query_BTKGE, key_BTKE, preferred_element_type=jnp.float32
    )
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    scores_BKGTS = jnp.where(causal_TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(value_BTKE.dtype)
    return jnp.einsum("BKGTS,BSKE->BTKGE", weights_BKGTS, value_BTKE).reshape(B, T, H, E)
