"""Sums over whole trees that are the same on every device."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.parameters.meshes import varying_axes
from optax_decay.product.per_matrix import accumulator_dtype


def square_sum(leaves: Iterable[jax.Array]) -> tuple[Any, Any]:
    """Σ|x|² over all leaves, and the number of their elements, both as numbers of one precision.

    Under jit arrays may be sharded in any way. Inside ``shard_map(check_vma=True)`` parts of a leaf on different
    devices are added up; under ``check_vma=False`` JAX does not say which leaves are parts, and they count as whole.
    """
    total: Any = 0.0
    number: Any = 0.0
    for x in leaves:
        part = jnp.sum(jnp.square(jnp.abs(x).astype(accumulator_dtype(x.dtype))))
        size: Any = float(x.size)
        if names := tuple(varying_axes(x)):
            part, size = jax.lax.psum(part, names), size * jax.lax.axis_size(names)
        total, number = total + part, number + size
    return total, number
