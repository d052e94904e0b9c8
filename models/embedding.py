"""Rows of an embedding, with a gradient that has the same bits in every run on a GPU.

    ∂table[v] = Σ_n ∂x_n  over the positions n with token v

XLA for GPUs adds the rows ∂x_n with atomic instructions, in whatever order they arrive. Here the positions are sorted
by token, and each block of `BLOCK` sorted positions is summed per token by one product with a matrix of zeros and ones.
A token that is not the first one of a block has no positions in earlier blocks. Its sum is therefore added to the table
by this block alone. The sums of the first tokens, one row per block, are again sorted by token, and they are summed in
the same way. So no row of the table is added to twice at a time, and no atomic instructions are needed.
"""

import functools

import jax
import jax.numpy as jnp

from models.products import aligned, padded, platform, split_by_mesh

BLOCK = 128  # positions
SMALL = (
    1024  # tokens; for smaller vocabularies one product with all positions is cheaper than sorting
)


def rows(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """The rows of the table for the tokens, [*tokens.shape, D].

    On one GPU the gradient is `gradient`. Elsewhere it is that of indexing: CPUs and TPUs add in a fixed order, and
    several devices would have to sort the positions of all of them.
    """
    if platform() != "gpu" or split_by_mesh():
        return table_VD[tokens]
    return _rows(table_VD.shape[0], table_VD, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(V: int, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    del V
    return table_VD[tokens]


def _forward(V: int, table_VD: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    del V
    return table_VD[tokens], tokens


def _backward(V: int, tokens: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
    return gradient(V, tokens.reshape(-1), dx.reshape(-1, dx.shape[-1])), None


_rows.defvjp(_forward, _backward)


def gradient(V: int, tokens_N: jax.Array, dx_ND: jax.Array) -> jax.Array:
    """The sum of the rows of every token, [V, D] in the dtype of `dx_ND`; summed in float32.

    Args:
      V: the number of tokens.
      tokens_N: integers. As in indexing, negative ones count from the end, and those outside of the table are dropped.
      dx_ND: one row per position.
    """
    tokens_N = jnp.where(tokens_N < 0, tokens_N + V, tokens_N)
    if V <= SMALL:
        hot_VN = jnp.arange(V)[:, None] == tokens_N
        return _product(hot_VN, dx_ND).astype(dx_ND.dtype)
    order_N = jnp.argsort(tokens_N)
    sums_VD = jnp.zeros_like(dx_ND, jnp.float32, shape=(V, dx_ND.shape[1]))
    return _add(sums_VD, tokens_N[order_N], dx_ND[order_N]).astype(dx_ND.dtype)


def _product(hot: jax.Array, x: jax.Array) -> jax.Array:
    D = x.shape[-1]
    hot, x = hot.astype(x.dtype), padded(x, aligned(D))
    # Without this precision float32 would be rounded to TF32 on GPUs.
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(hot, x, precision=highest, preferred_element_type=jnp.float32)[..., :D]


def _add(sums_VD: jax.Array, tokens_N: jax.Array, x_ND: jax.Array) -> jax.Array:
    """Adds the rows of sorted tokens to the rows of the table."""
    (V, D), N = sums_VD.shape, len(tokens_N)
    blocks = -(-N // BLOCK)
    missing = blocks * BLOCK - N
    token_bn = jnp.pad(tokens_N, (0, missing), constant_values=V).reshape(blocks, BLOCK)
    x_bnD = jnp.pad(x_ND, ((0, missing), (0, 0))).reshape(blocks, BLOCK, D)
    # The rank of each position's token among the tokens of its block.
    new_bn = token_bn[:, 1:] != token_bn[:, :-1]
    rank_bn = jnp.pad(jnp.cumsum(new_bn, axis=1), ((0, 0), (1, 0)))
    hot_brn = rank_bn[:, None, :] == jnp.arange(BLOCK)[:, None]
    sum_brD = _product(hot_brn, x_bnD)
    token_br = jnp.max(jnp.where(hot_brn, token_bn[:, None, :], -1), axis=-1)
    here_br = (token_br >= 0) & (token_br < V)
    if blocks > 1:
        here_br &= jnp.arange(BLOCK) > 0
    # Rows that are left out get different indices behind the table, because indices must be unique.
    behind_br = V + jnp.arange(blocks * BLOCK).reshape(blocks, BLOCK)
    row_br = jnp.where(here_br, token_br, behind_br)
    sums_VD = sums_VD.at[row_br.reshape(-1)].add(
        sum_brD.reshape(-1, D), mode="drop", unique_indices=True
    )
    return sums_VD if blocks == 1 else _add(sums_VD, token_bn[:, 0], sum_brD[:, 0])
