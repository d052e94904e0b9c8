"""The logits of the next token from a cache of keys and values, so that a new token costs one position, not all.

    read(tokens of the text)    keys and values of every position into the cache; logits behind the last token
    step(token, position)       keys and values of one more position;             logits behind it

Letters as in models/llama.py, and S: positions that the cache has room for. Positions behind the last one hold numbers
of no meaning, which no query attends to before they are written. The logits equal those of the model's own `forward`
up to rounding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import gpt, llama, loss, shapes

MODULES: dict[type, Any] = {llama.Config: llama.Llama, gpt.Config: gpt.GPT}


class Cache(NamedTuple):
    """Keys and values of one text."""

    key_LSKE: jax.Array
    value_LSKE: jax.Array


class Decoder(NamedTuple):
    """The two compiled functions of a model; `step` overwrites the cache that it is given."""

    read: Any  # (params, tokens [S], last position) -> (logits [V], Cache)
    step: Any  # (params, token, its position, Cache) -> (logits [V], Cache)


@functools.lru_cache(maxsize=4)
def decoder(model: Any, room: int) -> Decoder:
    """For texts of up to `room` tokens; `model` is the Config of a language model."""
    heads = getattr(model, "kv_heads", None) or model.heads
    shape = (model.layers, room, heads, model.head_width)

    def read(params: Any, tokens_S: jax.Array, last: jax.Array) -> tuple[jax.Array, Cache]:
        empty = Cache(*(jnp.zeros(shape, model.dtype) for _ in range(2)))
        return advance(model, params, tokens_S, jnp.int32(0), last, empty)

    def step(params: Any, token: jax.Array, at: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        return advance(model, params, token[None], at, jnp.int32(0), cache)

    return Decoder(jax.jit(read), jax.jit(step, donate_argnums=3))


def advance(
    model: Any, params: Any, tokens_T: jax.Array, first: jax.Array, last: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Reads tokens into the cache.

    Args:
        model: Config of a language model.
        params: its weights.
        tokens_T: the tokens of T positions.
        first: the first of these positions.
        last: the one among these T positions whose logits are wanted, from 0.
        cache: of all positions before the first.

    Returns:
        float32 logits [V] of the token behind `last`, and the cache with the T positions.
    """
    graph = nnx.split(nnx.eval_shape(lambda: MODULES[type(model)](model, nnx.Rngs(0))))[0]
    network = nnx.merge(graph, params)
    T, S = len(tokens_T), cache.key_LSKE.shape[1]
    position_T = first + jnp.arange(T)
    x_1TD = network.embed.embedding[...][tokens_T][None]
    rotated = isinstance(model, llama.Config)
    if not rotated:
        x_1TD += network.position.embedding[...][position_T]
    x_1TD = x_1TD.astype(model.dtype)
    angles_TE = None
    if rotated:
        angles_SE = llama.rotary_angles(S, model.head_width, model.rope_base)
        angles_TE = angles_SE[position_T]

    def layer(x_1TD: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        block, key_SKE, value_SKE = part
        own, y_1TD = block.attention, block.attention_norm(x_1TD)
        query_1THE, key_1TKE, value_1TKE = own.query(y_1TD), own.key(y_1TD), own.value(y_1TD)
        if angles_TE is not None:
            query_1THE = llama.rotate(query_1THE, angles_TE)
            key_1TKE = llama.rotate(key_1TKE, angles_TE)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
        key_SKE, value_SKE = write(key_SKE, key_1TKE[0]), write(value_SKE, value_1TKE[0])
        mixed_THE = attend(query_1THE[0], key_SKE, value_SKE, position_T, own.scale)
        x_1TD += own.out(mixed_THE[None])
        return x_1TD + block.mlp(block.mlp_norm(x_1TD)), (key_SKE, value_SKE)

    x_1TD, written = jax.lax.scan(layer, x_1TD, (network.blocks, *cache))
    x_11D = network.final_norm(x_1TD[:, last][:, None]) * shapes.readout(model)
    return loss.logits(x_11D, network.head_matrix())[0, 0], Cache(*written)


def attend(
    query_THE: jax.Array,
    key_SKE: jax.Array,
    value_SKE: jax.Array,
    position_T: jax.Array,
    scale: float,
) -> jax.Array:
    """Attention of T positions to themselves and all before them: [T, H, E], with the softmax in float32."""
    T, H, E = query_THE.shape
    S, K, _ = key_SKE.shape
    query_TKGE = query_THE.reshape(T, K, H // K, E)
    scores_KGTS = scale * jnp.einsum(
        "tkge,ske->kgts", query_TKGE, key_SKE, preferred_element_type=jnp.float32
    )
    seen_TS = jnp.arange(S) <= position_T[:, None]
    scores_KGTS = jnp.where(seen_TS, scores_KGTS, jnp.finfo(jnp.float32).min)
    weights_KGTS = jax.nn.softmax(scores_KGTS).astype(value_SKE.dtype)
    return jnp.einsum("kgts,ske->tkge", weights_KGTS, value_SKE).reshape(T, H, E)
