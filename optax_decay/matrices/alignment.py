"""Matrices whose sides accelerators multiply at full speed: padded with zeros to multiples of `MULTIPLE`.

GPUs need rows of a multiple of 16 bytes, or products take several times as long; MLPs of 5461 features and vocabularies
of 50257 tokens have others. Zeros change neither the product of two matrices nor an orthogonal factor. On CPUs nothing
is padded, so that results there do not depend on this file.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MULTIPLE = 16  # elements; halves of a matrix are then aligned as well, in types of two bytes


def aligned(size: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-size // MULTIPLE) * MULTIPLE


def pad(x: jax.Array) -> jax.Array:
    """``[..., m, n]`` with zeros behind the last rows and columns."""
    sides = [(0, aligned(size) - size) for size in x.shape[-2:]]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + sides)


def with_aligned(function: Callable[..., jax.Array], x: jax.Array, *others: Any) -> jax.Array:
    """``function(x, *others)``; on accelerators that of the padded x, if a side of x is not aligned.

    Args:
        function: of matrices ``[..., m, n]`` and other arrays. Zeros behind the matrices may change its result only
            behind the shape that it has without them; that part is cut off.
        x: the matrices.
        others: arrays that are passed on as they are.
    """
    if all(size == aligned(size) for size in x.shape[-2:]):
        return function(x, *others)
    cut = jax.eval_shape(function, x, *others).shape

    def padded(x: jax.Array, *others: Any) -> jax.Array:
        return function(pad(x), *others)[tuple(slice(size) for size in cut)]

    return jax.lax.platform_dependent(x, *others, cpu=function, default=padded)
