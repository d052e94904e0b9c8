"""Self-attention, in one place so that faster kernels have one door to come in by."""

import jax
import jax.numpy as jnp


def attention(
    query_BTHE: jax.Array,
    key_BTKE: jax.Array,
    value_BTKE: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention of every position to itself and the positions before it, or to all.

    Each group of H/K neighbouring query heads shares one key and value head (grouped queries,
    arXiv 2305.13245; K = H is multi-head attention).

    Args:
      query_BTHE: queries, B sequences of T positions, H heads of width E.
      key_BTKE: keys, K heads, where K divides H.
      value_BTKE: values, shaped like the keys.
      scale: what the products of queries and keys are multiplied by before the softmax.
      causal: whether a position sees those before it and itself only.
      implementation: "xla" runs everywhere, with the softmax in float32; "cudnn" is the fused
        kernel of NVIDIA GPUs, which takes 16-bit numbers only and never holds the T x T scores.

    Returns:
      [B, T, H, E] in the type of the queries.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query_BTHE, key_BTKE, value_BTKE, scale=scale, is_causal=causal, implementation="cudnn"
        )
    # Heads before positions: products with their batch axes in front are twice as fast on CPUs.
    B, T, H, E = query_BTHE.shape
    K = key_BTKE.shape[2]
    query_BKGTE = query_BTHE.reshape(B, T, K, H // K, E).transpose(0, 2, 3, 1, 4)
    key_BKSE, value_BKSE = key_BTKE.transpose(0, 2, 1, 3), value_BTKE.transpose(0, 2, 1, 3)
    scores_BKGTS = jnp.einsum(
        "BKGTE,BKSE->BKGTS", query_BKGTE, key_BKSE, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scale * scores_BKGTS
    if causal:
        causal_TS = jnp.tril(jnp.ones((T, T), bool))
        scores_BKGTS = jnp.where(causal_TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(value_BTKE.dtype)
    mixed_BKGTE = jnp.einsum("BKGTS,BKSE->BKGTE", weights_BKGTS, value_BKSE)
    return mixed_BKGTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E)
